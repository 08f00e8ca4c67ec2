"""Coupling: one part of the vector moves, the other part says how."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import constraints

from ..nn import MLP
from .base import FlowTransform
from .layout import batch_first, entries_first, parameter_planes, sum_entries
from .scalar import Affine, ScalarBijection, Shift
from .spline import Spline


class Coupling(FlowTransform):
    r"""Map some entries by a scalar bijection whose parameters depend on the others.

    .. math:: y_A = x_A, \qquad y_B = g(x_B; \theta(x_A, c)), \qquad
        \log|\det J| = \textstyle\sum_{d \in B} \log g'(x_d; \theta_d) .

    One pass in both directions. ``Coupling(Shift(), D)`` is the layer of NICE [1],
    ``Coupling(Affine(), D)`` that of RealNVP [2], ``Coupling(Spline(), D)`` that of neural spline
    flows.

    Parameters
    ----------
    bijection
        What to do to each moved entry.
    input_dim
        Number of entries ``D``, at least 2 unless there is a context.
    context_dim
        Size of the context :math:`c`, 0 for none.
    hidden_dims
        Sizes of the hidden layers of the network.
    split_dim
        Number of entries in the first part. Default: half of them.
    swap
        By default the first part is :math:`A` and the last part moves; with ``swap`` the first part
        moves as the last one says. Stack layers of both kinds, with permutations between pairs.
    activation
        A class of activation modules for the network.

    Raises
    ------
    ValueError
        If ``split_dim`` leaves nothing to move or to depend on.

    References
    ----------
    [1] L. Dinh, D. Krueger, Y. Bengio. NICE: Non-linear independent components estimation.
        `arXiv:1410.8516 <https://arxiv.org/abs/1410.8516>`_, 2014.
    [2] L. Dinh, J. Sohl-Dickstein, S. Bengio. Density estimation using Real NVP.
        `arXiv:1605.08803 <https://arxiv.org/abs/1605.08803>`_, 2016.

    Examples
    --------
    >>> from pyroflows.transforms import Spline
    >>> flow = Coupling(Spline(bins=8), 10)
    >>> x = torch.randn(100, 10)
    >>> bool(torch.allclose(flow.inv(flow(x)), x))
    True
    """

    def __init__(
        self,
        bijection: ScalarBijection,
        input_dim: int,
        context_dim: int = 0,
        hidden_dims: Sequence[int] = (64, 64),
        split_dim: int | None = None,
        swap: bool = False,
        activation: type[nn.Module] = nn.ReLU,
    ) -> None:
        super().__init__(input_dim, context_dim)
        split_dim = input_dim // 2 if split_dim is None else split_dim
        sizes = (split_dim, input_dim - split_dim)
        kept_dim, moved_dim = sizes[::-1] if swap else sizes
        if moved_dim < 1 or kept_dim < (0 if context_dim else 1):
            raise ValueError(
                f"split_dim must leave entries to move and to depend on, got {split_dim} of "
                f"input_dim {input_dim}"
            )
        self.bijection = bijection
        self.sizes = sizes
        self.kept_dim = kept_dim
        self.swap = swap
        num_outputs = bijection.num_parameters * moved_dim
        num_inputs = bijection.num_features * kept_dim
        self.network = MLP(num_inputs, num_outputs, hidden_dims, context_dim, activation)

    @property
    def domain(self) -> constraints.Constraint:
        return constraints.independent(self.bijection.domain, 1)

    def forward_and_log_det(
        self, x: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        return self._apply_bijection(self.bijection.forward, x, context)

    def inverse_and_log_det(
        self, y: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        return self._apply_bijection(self.bijection.inverse, y, context)

    def _apply_bijection(
        self, direction: Callable, x: Tensor, context: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        batch_shape = x.shape[:-1]
        first, last = entries_first(x).split(self.sizes)
        kept, moved = (last, first) if self.swap else (first, last)
        features = self.bijection.features(kept) if self.kept_dim else None
        parameters = self.network.rows(features, context, batch_shape)
        moved, log_derivative = direction(
            moved, parameter_planes(parameters, self.bijection.num_parameters)
        )
        rows = torch.cat([moved, kept] if self.swap else [kept, moved])
        return batch_first(rows, batch_shape), sum_entries(log_derivative, batch_shape)

    def extra_repr(self) -> str:
        return f"{self.bijection}, {super().extra_repr()}, sizes={self.sizes}, swap={self.swap}"


def additive_coupling(
    input_dim: int,
    hidden_dims: Sequence[int] | None = None,
    split_dim: int | None = None,
    **options: Any,
) -> Coupling:
    """Build an additive coupling, the layer of NICE.

    Examples
    --------
    >>> additive_coupling(10)(torch.zeros(10)).shape
    torch.Size([10])
    """
    return conditional_additive_coupling(input_dim, 0, hidden_dims, split_dim, **options)


def conditional_additive_coupling(
    input_dim: int,
    context_dim: int,
    hidden_dims: Sequence[int] | None = None,
    split_dim: int | None = None,
    **options: Any,
) -> Coupling:
    """Build an additive coupling with a context.

    Examples
    --------
    >>> conditional_additive_coupling(10, 3).condition(torch.ones(3))(torch.zeros(10)).shape
    torch.Size([10])
    """
    hidden_dims = (input_dim * 10,) if hidden_dims is None else hidden_dims
    return Coupling(Shift(), input_dim, context_dim, hidden_dims, split_dim, **options)


def affine_coupling(
    input_dim: int,
    hidden_dims: Sequence[int] | None = None,
    split_dim: int | None = None,
    **options: Any,
) -> Coupling:
    """Build an affine coupling, the layer of RealNVP, with Pyro's signature.

    Examples
    --------
    >>> affine_coupling(10)(torch.zeros(10)).shape
    torch.Size([10])
    """
    return conditional_affine_coupling(input_dim, 0, hidden_dims, split_dim, **options)


def conditional_affine_coupling(
    input_dim: int,
    context_dim: int,
    hidden_dims: Sequence[int] | None = None,
    split_dim: int | None = None,
    **options: Any,
) -> Coupling:
    """Build an affine coupling with a context, with Pyro's signature.

    Examples
    --------
    >>> conditional_affine_coupling(10, 3).condition(torch.ones(3))(torch.zeros(10)).shape
    torch.Size([10])
    """
    hidden_dims = (input_dim * 10,) if hidden_dims is None else hidden_dims
    return Coupling(Affine(), input_dim, context_dim, hidden_dims, split_dim, **options)


def spline_coupling(
    input_dim: int,
    split_dim: int | None = None,
    hidden_dims: Sequence[int] | None = None,
    count_bins: int = 8,
    bound: float = 3.0,
    **options: Any,
) -> Coupling:
    """Build a rational-quadratic spline coupling, with Pyro's signature.

    Examples
    --------
    >>> spline_coupling(10)(torch.zeros(10)).shape
    torch.Size([10])
    """
    return conditional_spline_coupling(
        input_dim, 0, split_dim, hidden_dims, count_bins, bound, **options
    )


def conditional_spline_coupling(
    input_dim: int,
    context_dim: int,
    split_dim: int | None = None,
    hidden_dims: Sequence[int] | None = None,
    count_bins: int = 8,
    bound: float = 3.0,
    **options: Any,
) -> Coupling:
    """Build a rational-quadratic spline coupling with a context.

    Examples
    --------
    >>> conditional_spline_coupling(10, 3).condition(torch.ones(3))(torch.zeros(10)).shape
    torch.Size([10])
    """
    hidden_dims = (input_dim * 10, input_dim * 10) if hidden_dims is None else hidden_dims
    spline = Spline(count_bins, bound)
    return Coupling(spline, input_dim, context_dim, hidden_dims, split_dim, **options)
