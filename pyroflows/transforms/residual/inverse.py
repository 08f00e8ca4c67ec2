"""Inverses of residual maps: the fixed-point equation and the gradient of its solution."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ...nn.lipschitz import SwishNetwork
from ..solve import ConvergenceError, cannot_test, num_iterations

_NEWTON_DIM = 64  # larger linear systems cost more than they save
_SWEEPS = 32  # Newton's method takes over then: earlier it would not pay
_TOLERANCE, _ROUNDING = 8, 1000  # units in the last place

Step = Callable[[Tensor, Tensor], Tensor]  # from a point and its residual to the next point


@torch.no_grad()
def invert(network: SwishNetwork, y: Tensor, coefficient: float, max_iterations: int) -> Tensor:
    r"""Solve :math:`x + g(x) = y` for ``x``, with :math:`g` of Lipschitz constant below 1.

    Iterates :math:`x \leftarrow y - g(x)` [1]; where that is slow, and ``D`` at most 64, Newton's
    method takes over. A step of it counts if it reduces the residual :math:`r = x + g(x) - y` by
    the factor ``coefficient``, as a sweep is sure to do, and is replaced by a sweep if not. Ends
    when the residual is within a few units in the last place of ``x``, or near that and no longer
    reduced by that factor, so that rounding is all that is left of it. The error of ``x`` is at
    most :math:`\|r\| / (1 - \mathrm{coefficient})`. Records no gradients: see
    :func:`with_gradient`.

    Parameters
    ----------
    network
        The function :math:`g`.
    y
        The right-hand sides, shape ``(*batch, D)``. Where one is not finite the solution is NaN.
    coefficient
        A Lipschitz constant of :math:`g`.
    max_iterations
        When to give up.

    Raises
    ------
    ConvergenceError
        If an equation is not solved after ``max_iterations``.

    References
    ----------
    [1] J. Behrmann, W. Grathwohl, R. T. Q. Chen, D. Duvenaud, J.-H. Jacobsen. Invertible residual
        networks. `arXiv:1811.00995 <https://arxiv.org/abs/1811.00995>`_, 2018.
    """

    def newton_step(x: Tensor, residual: Tensor) -> Tensor:
        proposal = x - _solve_linear(network.linearize(x)[1].jacobian(), residual)
        new_residual = proposal + network(proposal) - y
        shrunk = _norm(new_residual) <= coefficient * _norm(residual)
        return torch.where(shrunk, proposal, x - residual)

    return _iterate(network, y, newton_step, coefficient, max_iterations)


def with_gradient(
    x: Tensor, network: SwishNetwork, y: Tensor, coefficient: float, max_iterations: int
) -> Tensor:
    r"""Give the solution of :math:`x + g_\theta(x) = y` its gradient by implicit differentiation.

    To first order :math:`x = x_0 - (I + J)^{-1} (x_0 + g_\theta(x_0) - y)`: the step is zero up to
    rounding, its gradients with respect to :math:`\theta` and :math:`y` are not. Products with the
    inverse matrix are solutions of equations of the same kind, found in the same way. Gradients of
    gradients are not available.
    """
    value, derivative = network.linearize(x)
    residual, derivative = x + value - y, derivative.detach()
    if torch.jit.is_tracing():  # which cannot record a custom gradient
        return x - _solve_linear(derivative.jacobian(), residual)

    def through_network(rows: Tensor) -> Tensor:
        return derivative.vjp(rows.unsqueeze(-2)).squeeze(-2)

    def exact_step(rows: Tensor, residual: Tensor) -> Tensor:
        return rows - _solve_linear(derivative.jacobian().mT, residual)

    def solve_transposed(gradient: Tensor) -> Tensor:
        # Gradients may be of any size: there is no floor to their resolution.
        return _iterate(
            through_network, gradient, exact_step, coefficient, max_iterations, floor=0.0
        )

    return _ImplicitSolution.apply(residual, x, solve_transposed)


class _ImplicitSolution(torch.autograd.Function):
    r"""Return ``x`` with the gradient :math:`-(I + J)^{-1}` with respect to the residual."""

    @staticmethod
    def forward(
        ctx: Any, residual: Tensor, x: Tensor, solve_transposed: Callable[[Tensor], Tensor]
    ) -> Tensor:
        ctx.solve_transposed = solve_transposed
        return x.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return -ctx.solve_transposed(gradient), None, None


def _iterate(
    function: Callable[[Tensor], Tensor],
    target: Tensor,
    late_step: Step,
    coefficient: float,
    max_iterations: int,
    floor: float = 1.0,
) -> Tensor:
    """Solve ``x + function(x) = target`` by sweeps, and by a faster step where they are slow.

    Vectors are resolved relative to ``floor + |x|``.
    """
    unrolled = cannot_test(target)
    # Sizes are not numbers while a program is traced.
    sweeps = _SWEEPS if unrolled or target.shape[-1] <= _NEWTON_DIM else max_iterations
    unit = torch.finfo(target.dtype).eps
    x, size = target, torch.full_like(target[..., :1], torch.inf)
    solved = ~target.isfinite().all(-1, keepdim=True)
    for iteration in range(num_iterations(target, max_iterations)):
        residual = x + function(x) - target
        previous, size = size, _norm(residual)
        scale = unit * (floor + _norm(x))
        stalled = (size > coefficient * previous) & (size <= _ROUNDING * scale)
        solved |= stalled | (size <= _TOLERANCE * scale)
        if not unrolled and solved.all():
            return x - residual
        x = late_step(x, residual) if iteration >= sweeps else x - residual
    if unrolled:
        return x
    raise ConvergenceError(
        f"{int((~solved).sum())} of {solved.numel()} vectors are not inverted after "
        f"{max_iterations} iterations: raise max_iterations, lower coefficient, or try float64"
    )


def _solve_linear(jacobian: Tensor, vector: Tensor) -> Tensor:
    identity = torch.eye(vector.shape[-1], dtype=vector.dtype, device=vector.device)
    return torch.linalg.solve_ex(jacobian + identity, vector.unsqueeze(-1)).result.squeeze(-1)


def _norm(vectors: Tensor) -> Tensor:
    return vectors.norm(dim=-1, keepdim=True)
