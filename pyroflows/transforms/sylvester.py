"""The Sylvester flow: a layer of hidden units whose Jacobian is known."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..nn import Hypernetwork
from ..nn.orthogonal import Reflections
from .base import FlowTransform
from .solve import ConvergenceError, cannot_test, num_iterations

_MARGIN = 0.01  # the least slope of a unit
_SOFTPLUS_OFFSET = math.log(math.expm1(1 - _MARGIN))  # makes a raw 0 a slope of 1
_ITERATIONS_PER_UNIT = 50


class Sylvester(FlowTransform):
    r"""Move the vector by a layer of ``M`` hidden units that see and act along orthonormal axes.

    .. math:: y = x + Q R \, h(\tilde R Q^\top x + b), \qquad
        \log|\det J| = \textstyle\sum_i \log(1 + r_{ii} \tilde r_{ii} \, h'_i) ,

    with :math:`h = \tanh`, upper triangular :math:`R, \tilde R` and orthonormal columns ``Q`` [1].
    It inverts because :math:`\tilde r_{ii} > 0` and :math:`r_{ii} \tilde r_{ii} > -1` by
    construction. The first excludes nothing, since a unit may change all its signs. With a context,
    :math:`R, \tilde R` and ``b`` depend on it.

    The inverse solves for the inputs ``z`` of the units,
    :math:`z + \tilde R R \, h(z) = \tilde R Q^\top y + b`, by Newton steps in all of them at once.
    Each depends on those after it only, and so they converge from the last to the first. Costs
    ``O(D M)`` forward, the log-determinant ``O(M)``; the inverse adds ``O(M^2)`` an iteration, of
    which there are about ten. ``Q`` costs ``O(D^2 M)`` once a batch.

    Parameters
    ----------
    input_dim
        Number of entries ``D``.
    context_dim
        Size of the context, 0 for none.
    hidden_dims
        Sizes of the hidden layers of the network of the context.
    activation
        A class of activation modules for the network of the context.
    num_units
        Number of hidden units ``M``, at most ``D``. Default: ``D``.
    axes
        A module that returns a matrix of ``D`` rows whose first ``M`` columns are ``Q``. Default: a
        product of ``M`` reflections, which can be any: see
        :class:`pyroflows.nn.orthogonal.Reflections`.

    Raises
    ------
    ValueError
        If ``num_units`` is not between 1 and ``D``.
    ConvergenceError
        By the inverse, if it is not solved to the rounding of its dtype.

    References
    ----------
    [1] R. van den Berg, L. Hasenclever, J. M. Tomczak, M. Welling. Sylvester normalizing flows for
        variational inference. `arXiv:1803.05649 <https://arxiv.org/abs/1803.05649>`_, 2018.

    Examples
    --------
    >>> flow = Sylvester(10, num_units=4)
    >>> x = torch.randn(100, 10)
    >>> bool(torch.allclose(flow.inv(flow(x)), x, atol=1e-5))
    True
    """

    def __init__(
        self,
        input_dim: int,
        context_dim: int = 0,
        hidden_dims: Sequence[int] = (64, 64),
        activation: type[nn.Module] = nn.Tanh,
        num_units: int | None = None,
        axes: nn.Module | None = None,
    ) -> None:
        super().__init__(input_dim, context_dim)
        num_units = input_dim if num_units is None else num_units
        if not 1 <= num_units <= input_dim:
            raise ValueError(
                f"num_units must be between 1 and input_dim {input_dim}, got {num_units}"
            )
        self.num_units = num_units
        self.axes = Reflections(input_dim, num_units, random=True) if axes is None else axes
        triangles = 0.01 * num_units**-0.5 * torch.randn(num_units, num_units)
        log_slopes, biases = torch.zeros(num_units, 1), torch.randn(num_units, 1)
        self.units = Hypernetwork(
            torch.cat([triangles, log_slopes, biases], dim=-1).flatten(),
            context_dim,
            hidden_dims,
            activation,
        )

    def triangles(self, context: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        r"""Return :math:`R, \tilde R` and ``b``, shapes ``(*batch, M, M)`` and ``(*batch, M)``."""
        M = self.num_units
        square, log_diagonal, bias = (
            self.units(context).unflatten(-1, (M, M + 2)).split([M, 1, 1], dim=-1)
        )
        raw = square.diagonal(dim1=-2, dim2=-1)
        inner_diagonal = log_diagonal.squeeze(-1).exp()
        outer_diagonal = (F.softplus(raw + _SOFTPLUS_OFFSET) - (1 - _MARGIN)) / inner_diagonal
        # One square holds what is off the diagonals of both: R above, the other below, transposed.
        outer = square.triu(1) + outer_diagonal.diag_embed()
        inner = square.mT.triu(1) + inner_diagonal.diag_embed()
        return outer, inner, bias.squeeze(-1)

    def forward_and_log_det(
        self, x: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        axes = self._axes()
        outer, inner, bias = self.triangles(context)
        h = torch.tanh(_product(inner, x @ axes) + bias)
        return x + _product(outer, h) @ axes.mT, _log_det(outer, inner, h)

    def inverse_and_log_det(
        self, y: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        axes = self._axes()
        outer, inner, bias = self.triangles(context)
        target, coupling = _product(inner, y @ axes) + bias, inner @ outer
        solution = _solve_units(coupling.detach(), target.detach())
        h = torch.tanh(_with_implicit_gradient(solution, coupling, target))
        return y - _product(outer, h) @ axes.mT, -_log_det(outer, inner, h)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, num_units={self.num_units}"

    def _axes(self) -> Tensor:
        return self.axes()[:, : self.num_units]


def _product(matrix: Tensor, x: Tensor) -> Tensor:
    """Multiply vectors by one matrix, or each by its own."""
    return (x.unsqueeze(-2) @ matrix.mT).squeeze(-2)


def _diagonal(matrix: Tensor) -> Tensor:
    return matrix.diagonal(dim1=-2, dim2=-1)


def _log_det(outer: Tensor, inner: Tensor, h: Tensor) -> Tensor:
    return torch.log1p(_diagonal(outer) * _diagonal(inner) * (1 - h.square())).sum(-1)


@torch.no_grad()
def _solve_units(coupling: Tensor, target: Tensor) -> Tensor:
    r"""Solve :math:`z + G \tanh(z) = a` with an upper triangular ``G``, diagonal above -1.

    An entry ``i`` sees those after it through :math:`t_i = a_i - \sum_{j > i} G_{ij} \tanh z_j` and
    solves :math:`z_i + p \tanh z_i = t_i`. For :math:`t_i > 0` its left side is concave if
    :math:`p > 0` and convex if :math:`p < 0`, and the bound below lies before or beyond the
    solution, respectively: Newton steps cut off there approach it from one side.
    """
    diagonal = _diagonal(coupling)
    above_diagonal = coupling.triu(1)
    steep = diagonal > 0
    scale = 1 + target.abs() + coupling.abs().sum(-1)
    tolerance = 4 * torch.finfo(target.dtype).eps * scale
    hopeless = target.isnan().any(-1, keepdim=True)
    units = coupling.shape[-1]
    z = target
    unrolled = cannot_test(target)
    iterations = num_iterations(target, _ITERATIONS_PER_UNIT * units) + units
    for _ in range(iterations):
        h = torch.tanh(z)
        remainder = target - _product(above_diagonal, h)
        residual = z + diagonal * h - remainder
        newton = z - residual / (1 + diagonal * (1 - h.square()))
        size, sign = remainder.abs(), remainder.sign()
        linear, saturated = size / (1 + diagonal), size - diagonal
        newton = newton * sign
        beyond = torch.minimum(newton.clamp(min=0), torch.minimum(linear, saturated))
        before = torch.maximum(newton, torch.maximum(linear, saturated))
        proposal = torch.where(steep, before, beyond) * sign
        solved = (residual.abs() <= tolerance) | hopeless
        if not unrolled and bool(solved.all()):
            return proposal
        # What is solved rests until all is: its last digits would keep those before it moving.
        z = torch.where(solved, z, proposal)
    if unrolled:
        return proposal
    raise ConvergenceError(
        f"{int((~solved).sum())} of {solved.numel()} equations of a Sylvester flow are not solved "
        f"after {iterations} iterations; the parameters or inputs may be too large for their "
        "dtype: try float64"
    )


def _with_implicit_gradient(solution: Tensor, coupling: Tensor, target: Tensor) -> Tensor:
    """Give the solution its gradient, by a last Newton step with the triangular Jacobian."""
    h = torch.tanh(solution)
    residual = solution + _product(coupling, h) - target
    if not (residual.requires_grad or torch.jit.is_tracing()):
        return solution
    with torch.no_grad():
        jacobian = (coupling * (1 - h.square()).unsqueeze(-2)).triu(1)
        slope = 1 + _diagonal(coupling) * (1 - h.square())
        jacobian = jacobian + slope.diag_embed()
    step = torch.linalg.solve_triangular(jacobian, residual.unsqueeze(-1), upper=True)
    return solution - step.squeeze(-1)


def sylvester(input_dim: int, count_transforms: int | None = None, **options: Any) -> Sylvester:
    """Build a Sylvester flow of as many units as entries, with Pyro's signature.

    ``count_transforms`` is the number of reflections that the axes are made of, by default
    ``input_dim``.

    Examples
    --------
    >>> sylvester(10, count_transforms=4)(torch.zeros(10)).shape
    torch.Size([10])
    """
    axes = Reflections(input_dim, count_transforms, random=True)
    return Sylvester(input_dim, axes=axes, **options)


def conditional_sylvester(
    input_dim: int,
    context_dim: int,
    hidden_dims: Sequence[int] | None = None,
    count_transforms: int | None = None,
    **options: Any,
) -> Sylvester:
    """Build a Sylvester flow whose triangles depend on a context.

    Examples
    --------
    >>> conditional_sylvester(10, 3).condition(torch.ones(3))(torch.zeros(10)).shape
    torch.Size([10])
    """
    hidden_dims = (input_dim * 10, input_dim * 10) if hidden_dims is None else hidden_dims
    axes = Reflections(input_dim, count_transforms, random=True)
    return Sylvester(input_dim, context_dim, hidden_dims, axes=axes, **options)
