"""Flows of velocity fields from one time to another, and integrals along them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple, TypeAlias

import numpy as np
import torch
from torch import Tensor

from ...transforms.continuous.solver import Solver

# Of the exponents 1 (even steps) to 2, those about 1.5 had the least error for their steps in draws
# of published tasks; quadrature gains nothing, so that its nodes stay where they are.
SLOWING = 1.5

# (time, points (*batch, D)) -> their velocities, or numbers for each, (*batch, K).
Field: TypeAlias = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Solve:
    r"""Carry points along a velocity field :math:`dw/dt = v(t, w)`.

    By default in a fixed number of steps, with Kutta's three-eighths rule [1], of fourth order:
    ``4 num_steps`` evaluations. The steps get shorter towards time 1, where noise has nearly become
    data and the field turns fastest. With a tolerance, in the steps that the fifth-order method of
    Dormand and Prince [2] needs to keep the local error of the worst point below it.

    Parameters
    ----------
    num_steps
        Number of steps, without a tolerance.
    tolerance
        Relative and absolute tolerance, for the root mean square over the entries of a point.

    Raises
    ------
    ValueError
        If ``num_steps`` is below 1 or ``tolerance`` is not positive.

    References
    ----------
    [1] W. Kutta. Beitrag zur naeherungsweisen Integration totaler Differentialgleichungen.
        Zeitschrift fuer Mathematik und Physik 46, 1901.
    [2] J. R. Dormand, P. J. Prince. A family of embedded Runge-Kutta formulae. Journal of
        Computational and Applied Mathematics 6(1), 1980.

    Examples
    --------
    >>> Solve(num_steps=4)(lambda time, w: -w, torch.ones(1), 0.0, 1.0)
    tensor([0.3679])
    """

    num_steps: int = 4
    tolerance: float | None = None

    def __post_init__(self) -> None:
        if self.num_steps < 1:
            raise ValueError(f"num_steps must be at least 1, got {self.num_steps}")
        if self.tolerance is not None and not self.tolerance > 0:
            raise ValueError(f"tolerance must be positive, got {self.tolerance}")

    def __call__(self, velocity: Field, w: Tensor, start: float, end: float) -> Tensor:
        """Return where points ``(*batch, D)`` at time ``start`` are at ``end``, both in [0, 1]."""
        if self.tolerance is not None:
            return self._adaptive(velocity, _nothing, w, start, end)[0]
        for time, after in pairwise(_times(self.num_steps, start, end)):
            w = _kutta(velocity, w, velocity(w.new_tensor(time), w), time, after)
        return w

    def integrate(
        self, velocity: Field, rate: Field, w: Tensor, start: float, end: float
    ) -> tuple[Tensor, Tensor]:
        r"""Return where points end, and integrals :math:`\int r(t, w_t) dt` along their paths.

        Without a tolerance the integral is a quadrature of Gauss and Legendre with ``4 num_steps``
        nodes, along a path of ``2 num_steps`` steps with a cubic within each: a rate that is dearer
        than the velocity is evaluated no more often than it must.

        Parameters
        ----------
        velocity
            Maps a time and points ``(*batch, D)`` to their velocities.
        rate
            Maps a time and points to numbers ``(*batch, K)``.
        w
            The points at time ``start``.
        start, end
            When.

        Returns
        -------
        Tensor, Tensor
            The points at time ``end``, and integrals of shape ``(*batch, K)``.
        """
        if self.tolerance is not None:
            return self._adaptive(velocity, rate, w, start, end)
        nodes = _gauss_legendre(4 * self.num_steps, start, end)
        total = w.new_zeros(())
        for step in _path(velocity, w, _times(2 * self.num_steps, start, end)):
            for node, weight in nodes:
                if step.includes(node):
                    total = total + weight * rate(w.new_tensor(node), step.at(node))
            w = step.after
        return w, total

    def _adaptive(
        self, velocity: Field, rate: Field, w: Tensor, start: float, end: float
    ) -> tuple[Tensor, Tensor]:
        shape = w.shape
        points = w.reshape(shape[:-1].numel(), shape[-1])
        num_rates = rate(w.new_tensor(start), w).shape[-1]

        def slopes(time: Tensor, points: Tensor) -> tuple[Tensor, ...]:
            w = points.reshape(shape)
            rates = rate(time, w).reshape(len(points), num_rates)
            return velocity(time, w).reshape(points.shape), *rates.unbind(-1)

        solver = Solver(rtol=self.tolerance, atol=self.tolerance)
        (points, *totals), _ = solver.solve(slopes, points, num_rates, (start, end), ())
        return points.reshape(shape), torch.stack(totals, -1).reshape(*shape[:-1], num_rates)


def _nothing(time: Tensor, w: Tensor) -> Tensor:
    return torch.zeros_like(w[..., :1])


class _Step(NamedTuple):
    """A step from one point to the next, and the velocities at both."""

    start: float
    end: float
    before: Tensor
    after: Tensor
    leaving: Tensor
    arriving: Tensor

    def includes(self, time: float) -> bool:
        """Tell whether a time is within the step, or where it arrives."""
        return min(self.start, self.end) < time <= max(self.start, self.end)

    def at(self, time: float) -> Tensor:
        """Return the point of the cubic that has these ends and velocities."""
        length = self.end - self.start
        done = (time - self.start) / length
        left = 1 - done
        return (
            left**2 * (1 + 2 * done) * self.before
            + done**2 * (1 + 2 * left) * self.after
            + length * done * left * (left * self.leaving - done * self.arriving)
        )


def _path(velocity: Field, w: Tensor, times: Sequence[float]) -> Iterator[_Step]:
    """Yield the steps from each time to the next."""
    leaving = velocity(w.new_tensor(times[0]), w)
    for start, end in pairwise(times):
        after = _kutta(velocity, w, leaving, start, end)
        arriving = velocity(w.new_tensor(end), after)
        yield _Step(start, end, w, after, leaving, arriving)
        w, leaving = after, arriving


def _kutta(velocity: Field, w: Tensor, leaving: Tensor, start: float, end: float) -> Tensor:
    """Make a step by the three-eighths rule: half the error of the classical one, at its price."""
    step = end - start
    times = w.new_tensor([start + step / 3, start + 2 * step / 3, end])
    second = velocity(times[0], w + step / 3 * leaving)
    third = velocity(times[1], w + step * (second - leaving / 3))
    fourth = velocity(times[2], w + step * (leaving - second + third))
    return w + step / 8 * (leaving + 3 * (second + third) + fourth)


def _times(num_steps: int, start: float, end: float) -> list[float]:
    """Return times from start to end, both between 0 and 1, denser towards 1."""
    first, last = (1 - (1 - time) ** (1 / SLOWING) for time in (start, end))
    times = 1 - (1 - np.linspace(first, last, num_steps + 1)) ** SLOWING
    return [start, *times[1:-1].tolist(), end]


def _gauss_legendre(size: int, start: float, end: float) -> list[tuple[float, float]]:
    """Return nodes, from ``start`` to ``end``, and their weights."""
    nodes, weights = np.polynomial.legendre.leggauss(size)
    half = (end - start) / 2
    return [*zip((start + half * (1 + nodes)).tolist(), (half * weights).tolist())]
