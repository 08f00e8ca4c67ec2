"""The continuous flow: a vector carried along a velocity field for a unit of time."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ...nn.velocity import VelocityField
from ..base import FlowTransform
from .solver import Rates, Solver, Times
from .trace import NOISES, bind, derivative_along, exact

FORWARD, BACKWARD = (0.0, 1.0), (1.0, 0.0)


class Regularization(NamedTuple):
    r"""Hold what makes a continuous flow costly to solve, along each path: shape ``(*batch,)``.

    Attributes
    ----------
    kinetic
        :math:`\int_0^1 \|v(t, x_t)\|^2 dt`.
    jacobian
        :math:`\int_0^1 \|\partial v / \partial x\|_F^2 dt`, an unbiased estimate.

    Examples
    --------
    >>> flow = cnf(2)
    >>> y, log_det, path = flow.forward_and_regularization(torch.randn(5, 2))
    >>> path.kinetic.shape
    torch.Size([5])
    """

    kinetic: Tensor
    jacobian: Tensor


class ContinuousFlow(FlowTransform):
    r"""Carry the vector along a velocity field: a continuous normalizing flow [1, 2].

    .. math:: y = x_1, \quad x_0 = x, \quad \frac{dx_t}{dt} = v(t, x_t, c), \qquad
        \log|\det J| = \int_0^1 \mathrm{tr} \frac{\partial v}{\partial x}(t, x_t, c) \, dt .

    The inverse solves the same equation from :math:`t = 1` back to :math:`t = 0`. Both directions
    cost a number of evaluations of the field that its shape decides, not ``D``:
    ``flow.num_evaluations`` tells that of the last solve. The exact trace of a
    :class:`~pyroflows.nn.VelocityField` of one or two hidden layers costs as much as the field
    itself; that of any other field ``D`` times as much, which ``trace="hutchinson"`` avoids [2].

    Parameters
    ----------
    field
        A module that maps a time ``()`` and points ``(N, D)`` to velocities ``(N, D)``; with a
        context, of shape ``(context_dim,)`` or ``(N, context_dim)``, as a third argument. Each
        velocity may depend on its own point alone.
    input_dim
        Number of entries ``D``.
    context_dim
        Size of the context :math:`c`, 0 for none.
    trace
        ``"exact"``, or ``"hutchinson"`` for the estimate :math:`\epsilon^\top J \epsilon`, with
        one fresh probe :math:`\epsilon` for each vector and solve: log-determinants are then
        unbiased, and differ from call to call and from one direction to the other.
    noise
        Law of the probe: ``"rademacher"`` or ``"gaussian"``.
    solver
        A method of torchdiffeq: of adaptive step ``"dopri5"``, ``"dopri8"``, ``"bosh3"``,
        ``"fehlberg2"``, ``"adaptive_heun"``; of fixed step ``"euler"``, ``"midpoint"``, ``"rk4"``,
        ``"heun3"``, ``"explicit_adams"``, ``"implicit_adams"``.
    rtol, atol
        Relative and absolute tolerance of adaptive solvers, for the root mean square over the
        entries of the worst vector of the batch. Default: 1e-5 and 1e-6 in float32, 1e-9 and 1e-10
        in float64.
    num_steps
        Number of steps of solvers of fixed step. Default: 20. The inverse is then as exact as the
        steps are small.
    adjoint
        Whether gradients come from solving the adjoint equation backwards in time, in memory that
        does not grow with the number of steps, instead of from back-propagation through the steps.
        They are then as exact as the tolerances, not those of the very numbers computed.
    max_evaluations
        Number of evaluations of the field after which a solve is given up.

    Raises
    ------
    ValueError
        If an option is not among those listed, or not positive.
    ConvergenceError
        By the solve, if the field is not finite, or too many evaluations would be needed.
    RuntimeError
        By ``torch.jit.trace``: the steps depend on the inputs.

    References
    ----------
    [1] R. T. Q. Chen, Y. Rubanova, J. Bettencourt, D. Duvenaud. Neural ordinary differential
        equations. `arXiv:1806.07366 <https://arxiv.org/abs/1806.07366>`_, 2018.
    [2] W. Grathwohl, R. T. Q. Chen, J. Bettencourt, I. Sutskever, D. Duvenaud. FFJORD: Free-form
        continuous dynamics for scalable reversible generative models.
        `arXiv:1810.01367 <https://arxiv.org/abs/1810.01367>`_, 2018.

    Examples
    --------
    >>> flow = ContinuousFlow(VelocityField(10), 10)
    >>> x = torch.randn(100, 10)
    >>> bool(torch.allclose(flow.inv(flow(x)), x, atol=1e-4))
    True
    """

    def __init__(
        self,
        field: nn.Module,
        input_dim: int,
        context_dim: int = 0,
        *,
        trace: str = "exact",
        noise: str = "rademacher",
        solver: str = "dopri5",
        rtol: float | None = None,
        atol: float | None = None,
        num_steps: int | None = None,
        adjoint: bool = False,
        max_evaluations: int = 1000,
    ) -> None:
        super().__init__(input_dim, context_dim)
        if trace not in ("exact", "hutchinson"):
            raise ValueError(f"trace must be 'exact' or 'hutchinson', got {trace!r}")
        if noise not in NOISES:
            raise ValueError(f"noise must be 'rademacher' or 'gaussian', got {noise!r}")
        self.field = field
        self.trace = trace
        self.noise = noise
        self.solver = Solver(solver, rtol, atol, num_steps, adjoint, max_evaluations)
        self.num_evaluations = 0

    def forward_and_log_det(
        self, x: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        y, log_det = self._solve(x, context, FORWARD)
        return y, log_det

    def inverse_and_log_det(
        self, y: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        x, log_det = self._solve(y, context, BACKWARD)
        return x, log_det

    def forward_and_regularization(
        self, x: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Regularization]:
        r"""Map ``x`` to ``y``; return ``y``, ``log|det dy/dx|`` and the penalties of the path.

        Straight paths of even speed take few evaluations: add a multiple of the penalties to the
        loss [1]. They come out of the same solve, for one more derivative of the field along a
        probe, which ``trace="hutchinson"`` computes anyway.

        References
        ----------
        [1] C. Finlay, J.-H. Jacobsen, L. Nurbekyan, A. M. Oberman. How to train your neural ODE:
            the world of Jacobian and kinetic regularization.
            `arXiv:2002.02798 <https://arxiv.org/abs/2002.02798>`_, 2020.
        """
        y, log_det, *penalties = self._solve(self._check(x, context), context, FORWARD, True)
        return y, log_det, Regularization(*penalties)

    def inverse_and_regularization(
        self, y: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Regularization]:
        """Map ``y`` back to ``x``; see :meth:`forward_and_regularization`."""
        x, log_det, *penalties = self._solve(self._check(y, context), context, BACKWARD, True)
        return x, log_det, Regularization(*(-penalty for penalty in penalties))

    def trajectory(
        self, x: Tensor, times: Sequence[float], context: Tensor | None = None
    ) -> Tensor:
        """Return where points are at given times on their way along the field.

        Parameters
        ----------
        x
            The points at the first time, shape ``(*batch, D)``.
        times
            ``T`` times between 0 and 1, ascending or descending: from 0 to 1 the path leads from
            ``x`` to ``flow(x)``, from 1 to 0 from ``x`` to ``flow.inv(x)``. Each stretch between
            two of them is a solve of its own, with as many steps as a whole one where the solver
            has steps of fixed size.
        context
            Shape ``(*batch, context_dim)``, as for ``forward_and_log_det``.

        Returns
        -------
        Tensor
            Shape ``(T, *batch, D)``; the first is ``x``.

        Raises
        ------
        ValueError
            If there are no times, or they leave 0 to 1 or turn back.

        Examples
        --------
        >>> cnf(2).trajectory(torch.randn(5, 2), times=[0.0, 0.5, 1.0]).shape
        torch.Size([3, 5, 2])
        """
        times = [float(time) for time in times]
        _check_times(times)
        states = [self._check(x, context)]
        for stretch in pairwise(times):
            state, _ = self._solve(states[-1], context, stretch)
            states.append(state)
        return torch.stack(states)

    def _solve(
        self,
        x: Tensor,
        context: Tensor | None,
        times: Times,
        regularized: bool = False,
    ) -> tuple[Tensor, ...]:
        if torch.jit.is_tracing():
            raise RuntimeError(
                f"{type(self).__name__} cannot be traced: the steps of its solver depend on the "
                "inputs. Use it without torch.jit, as in Trace_ELBO instead of JitTrace_ELBO"
            )
        batch_shape = x.shape[:-1]
        points = x.reshape(batch_shape.numel(), x.shape[-1])
        if context is not None:
            context = _along_points(context, batch_shape)
        sources = (*self.field.parameters(), *(() if context is None else (context,)))
        rates = self._rates(points, context, regularized)
        num_integrals = 3 if regularized else 1
        end, self.num_evaluations = self.solver.solve(rates, points, num_integrals, times, sources)
        return (end[0].reshape(x.shape), *(values.reshape(batch_shape) for values in end[1:]))

    def _rates(self, points: Tensor, context: Tensor | None, regularized: bool) -> Rates:
        velocity = bind(self.field, context)
        divergence = exact(self.field, context) if self.trace == "exact" else None
        if divergence is not None and not regularized:
            return divergence
        probe = NOISES[self.noise](points)

        def rates(t: Tensor, x: Tensor) -> tuple[Tensor, ...]:
            v, tangent = derivative_along(velocity, t, x, probe)
            if divergence is None:
                trace = (tangent * probe).sum(-1)
            else:
                _, trace = divergence(t, x)
            if not regularized:
                return v, trace
            return v, trace, v.square().sum(-1), tangent.square().sum(-1)

        return rates

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, trace={self.trace!r}, solver={self.solver.method!r}"


def _check_times(times: Sequence[float]) -> None:
    steps = [after - before for before, after in pairwise(times)]
    one_way = all(step > 0 for step in steps) or all(step < 0 for step in steps)
    if not times or not all(0 <= time <= 1 for time in times) or not one_way:
        raise ValueError(
            f"times must ascend or descend between 0 and 1, and be one at least, got {times}"
        )


def _along_points(context: Tensor, batch_shape: torch.Size) -> Tensor:
    """Flatten the batch of the context; one context for all points stays one."""
    if context.shape[:-1].numel() == 1:
        return context.reshape(context.shape[-1])
    size = context.shape[-1]
    return context.expand(*batch_shape, size).reshape(batch_shape.numel(), size)


def cnf(input_dim: int, hidden_dims: Sequence[int] | None = None, **options: Any) -> ContinuousFlow:
    """Build a continuous flow along a network's velocity field, of layers ``(64, 64)`` by default.

    Examples
    --------
    >>> cnf(10)(torch.zeros(10)).shape
    torch.Size([10])
    """
    return conditional_cnf(input_dim, 0, hidden_dims, **options)


def conditional_cnf(
    input_dim: int,
    context_dim: int,
    hidden_dims: Sequence[int] | None = None,
    activation: type[nn.Module] = nn.Tanh,
    **options: Any,
) -> ContinuousFlow:
    """Build a continuous flow with a context, see :func:`cnf`.

    Examples
    --------
    >>> conditional_cnf(10, 3).condition(torch.ones(3))(torch.zeros(10)).shape
    torch.Size([10])
    """
    hidden_dims = (64, 64) if hidden_dims is None else hidden_dims
    field = VelocityField(input_dim, hidden_dims, context_dim, activation)
    return ContinuousFlow(field, input_dim, context_dim, **options)
