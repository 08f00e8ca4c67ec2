"""Solves of ordinary differential equations that count their work and fail aloud."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torchdiffeq import odeint, odeint_adjoint

from ..solve import ConvergenceError

ADAPTIVE = {"adaptive_heun": 2, "bosh3": 3, "dopri5": 5, "dopri8": 8, "fehlberg2": 2}  # orders
FIXED_STEP = ("euler", "explicit_adams", "heun3", "implicit_adams", "midpoint", "rk4")
NUM_STEPS = 20

# Relative and absolute tolerances. Half precision has no digits for more.
TOLERANCES = {
    torch.float64: (1e-9, 1e-10),
    torch.float32: (1e-5, 1e-6),
    torch.float16: (1e-2, 1e-2),
    torch.bfloat16: (1e-1, 1e-1),
}
LOG_DET_SLACK = 10.0  # how much more a log-determinant may err than an entry

# (t, x) -> the velocity (N, D) of the points x (N, D), and what to integrate along their paths,
# (N,) each, log-determinants first.
Rates = Callable[[Tensor, Tensor], tuple[Tensor, ...]]
Times = tuple[float, float]


@dataclass(frozen=True)
class Solver:
    """Say how to solve; see :class:`ContinuousFlow` for the options."""

    method: str = "dopri5"
    rtol: float | None = None
    atol: float | None = None
    num_steps: int | None = None
    adjoint: bool = False
    max_evaluations: int = 1000

    def __post_init__(self) -> None:
        methods = (*ADAPTIVE, *FIXED_STEP)
        if self.method not in methods:
            raise ValueError(f"solver must be one of {', '.join(methods)}, got {self.method!r}")
        if self.method in ADAPTIVE and self.num_steps is not None:
            raise ValueError(
                f"num_steps is for solvers of fixed step, and {self.method!r} chooses its steps "
                f"by rtol and atol; got num_steps={self.num_steps}"
            )
        for name in ("rtol", "atol"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name} must be positive, got {value}")
        for name in ("num_steps", "max_evaluations"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")

    def solve(
        self, rates: Rates, x: Tensor, num_integrals: int, times: Times, sources: tuple[Tensor, ...]
    ) -> tuple[tuple[Tensor, ...], int]:
        """Carry points from one time to another.

        Parameters
        ----------
        rates
            The velocity and what to integrate besides.
        x
            The points at the first time, shape ``(N, D)``.
        num_integrals
            How many numbers to integrate along each path.
        times
            From when to when.
        sources
            The tensors, other than ``x``, that gradients flow to.

        Returns
        -------
        tuple of Tensor
            The points at the second time, and the integrals, of shape ``(N,)`` each.
        int
            The number of evaluations of the rates.
        """
        if x.is_meta or not x.numel():  # there is nothing to choose steps by
            slopes = rates(x.new_full((), times[0]), x)
            v, *increments = ((times[1] - times[0]) * slope for slope in slopes)
            return (x + v, *increments), 1

        # The unknown is the displacement: it is small, and so are its rounding errors, which the
        # solver's interpolation at the end of the path multiplies by thirty.
        watched = _Watched(lambda t, state: rates(t, x + state[0]), self)
        start = (torch.zeros_like(x), *x.new_zeros(num_integrals, len(x)))
        path = self._integrate(watched, x, start, times, (x, *sources))
        displacement, *integrals = (values[-1] for values in path)
        end = (x + displacement, *integrals)
        if not all(values.isfinite().all() for values in end):
            raise watched.failure("the result is not finite")
        return end, watched.evaluations

    def _integrate(
        self,
        watched: _Watched,
        x: Tensor,
        start: tuple[Tensor, ...],
        times: Times,
        sources: tuple[Tensor, ...],
    ) -> tuple[Tensor, ...]:
        defaults = TOLERANCES[x.dtype]
        rtol, atol = (a or b for a, b in zip((self.rtol, self.atol), defaults))
        of_points = atol + rtol * x.detach().abs().flatten()
        of_integrals = [x.new_full((), atol)] * (len(start) - 1)
        options: dict[str, Any] = {
            "t": x.new_tensor(times),
            "method": self.method,
            "rtol": rtol,
            "atol": (of_points, *of_integrals),
            "options": self._options(times, rtol, _largest_error),
        }
        if not self.adjoint:
            return odeint(watched, start, **options)
        return odeint_adjoint(
            watched,
            start,
            **options,
            adjoint_params=sources,
            adjoint_rtol=rtol,
            adjoint_atol=atol,
            # Nothing depends on the gradients of parameters but they themselves: their errors
            # need not choose the steps.
            adjoint_options=self._options(times[::-1], rtol, "seminorm"),
        )

    def _options(self, times: Times, rtol: float, norm: Any) -> dict[str, Any]:
        if self.method in FIXED_STEP:
            return {"grid_constructor": self._grid}
        first_step = min(rtol ** (1 / ADAPTIVE[self.method]), 1.0)
        return {"norm": norm, "first_step": first_step, "step_t": torch.tensor(times[1:])}

    def _grid(self, _: Any, state: Tensor, times: Tensor) -> Tensor:
        num_steps = self.num_steps or NUM_STEPS
        steps = torch.arange(num_steps + 1, dtype=times.dtype, device=times.device)
        return times[0] + (times[-1] - times[0]) * steps / num_steps


class _Watched:
    """Count the evaluations of rates; raise where there is no point in going on."""

    def __init__(self, rates: Callable, solver: Solver) -> None:
        self.rates = rates
        self.solver = solver
        self.evaluations = 0
        self.time: Tensor | float = math.nan

    def __call__(self, t: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        if self.evaluations == self.solver.max_evaluations:
            raise self.failure(f"max_evaluations={self.evaluations} are used up")
        self.evaluations += 1
        self.time = t
        return self.rates(t, state)

    def callback_step(self, t: Tensor, _: tuple[Tensor, ...], step: Tensor) -> None:
        if t + step == t:  # also after an error that is not a number
            raise self.failure("no step is small enough, or the velocity is not finite")

    callback_step_adjoint = callback_step

    def failure(self, reason: str) -> ConvergenceError:
        return ConvergenceError(
            f"solver {self.solver.method!r} failed at t = {float(self.time):.4g} after "
            f"{self.evaluations} evaluations of the velocity: {reason}. Are all inputs and "
            "parameters finite? Raise rtol and atol, lower the learning rate, or penalise the "
            "kinetic energy and the Jacobian of the flow"
        )


@torch.no_grad()
def _largest_error(errors: tuple[Tensor, ...]) -> Tensor:
    """Return the worst error of a vector of the batch, whatever the others are.

    Errors of integrals after the first do not count: the steps are the same with and without.
    """
    displacement, log_det, *_ = errors
    worst = displacement.square().mean(-1).max().sqrt()
    return torch.maximum(worst, log_det.abs().max() / LOG_DET_SLACK)
