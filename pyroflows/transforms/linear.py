"""Linear flows: permutations and affine maps of the whole vector."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .base import FlowTransform
from .coupling import check_order


class Permutation(FlowTransform):
    r"""Reorder the entries: :math:`y_i = x_{\pi(i)}`, with log-determinant 0.

    Parameters
    ----------
    permutation
        The permutation :math:`\pi` of ``0 .. D - 1``, kept as a buffer.

    Raises
    ------
    ValueError
        If ``permutation`` is not one.

    Examples
    --------
    >>> Permutation([2, 0, 1])(torch.tensor([10.0, 20.0, 30.0]))
    tensor([30., 10., 20.])
    """

    permutation: Tensor

    def __init__(self, permutation: Sequence[int]) -> None:
        super().__init__(len(permutation))
        order = check_order(permutation, len(permutation))
        self.register_buffer("permutation", torch.tensor(order))

    def forward_and_log_det(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x.index_select(-1, self.permutation), x.new_zeros(x.shape[:-1])

    def inverse_and_log_det(self, y: Tensor) -> tuple[Tensor, Tensor]:
        # From the stored permutation, so that it is right after `load_state_dict` too.
        return y.index_select(-1, self.permutation.argsort()), y.new_zeros(y.shape[:-1])


class TriangularAffine(FlowTransform):
    r"""Map the vector by a full-rank affine map: :math:`y = \mu + L x`, ``L`` lower triangular.

    The diagonal of :math:`L` is :math:`e^s`, so that :math:`\log|\det J| = \sum_d s_d`. On a
    standard normal vector it gives any normal distribution, with covariance :math:`L L^\top`.
    Costs ``O(D^2)`` in both directions.

    Parameters
    ----------
    loc
        The shift :math:`\mu`, shape ``(D,)``.
    scale_tril
        The matrix :math:`L`, shape ``(D, D)``, with a positive diagonal; entries above the diagonal
        are ignored.

    Raises
    ------
    ValueError
        If the shapes disagree or the diagonal is not positive.

    Examples
    --------
    >>> flow = TriangularAffine(torch.zeros(2), torch.tensor([[2.0, 0.0], [1.0, 1.0]]))
    >>> flow(torch.ones(2)).detach()
    tensor([2., 2.])
    """

    def __init__(self, loc: Tensor, scale_tril: Tensor) -> None:
        if loc.dim() != 1 or scale_tril.shape != (loc.shape[0], loc.shape[0]):
            raise ValueError(
                "loc and scale_tril must have shapes (D,) and (D, D), got "
                f"{tuple(loc.shape)} and {tuple(scale_tril.shape)}"
            )
        if not (scale_tril.diagonal() > 0).all():
            raise ValueError("scale_tril must have a positive diagonal")
        super().__init__(loc.shape[0])
        self.loc = nn.Parameter(loc.detach().clone())
        self.log_diagonal = nn.Parameter(scale_tril.detach().diagonal().log())
        self.below_diagonal = nn.Parameter(scale_tril.detach().tril(-1))

    @property
    def scale_tril(self) -> Tensor:
        """Return the matrix ``L``."""
        return self.below_diagonal.tril(-1) + self.log_diagonal.exp().diag()

    def forward_and_log_det(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.loc + x @ self.scale_tril.T, self.log_diagonal.sum().expand(x.shape[:-1])

    def inverse_and_log_det(self, y: Tensor) -> tuple[Tensor, Tensor]:
        rows = (y - self.loc).reshape(y.shape[:-1].numel(), y.shape[-1]).T
        x = torch.linalg.solve_triangular(self.scale_tril, rows, upper=False)
        return x.T.reshape(y.shape), -self.log_diagonal.sum().expand(y.shape[:-1])


class DiagonalAffine(FlowTransform):
    r"""Scale and shift each entry: :math:`y = \mu + e^s x`, with :math:`s` unbounded.

    Costs ``O(D)`` in both directions.

    Parameters
    ----------
    loc
        The shift :math:`\mu`, shape ``(D,)``.
    scale
        The scale :math:`e^s`, shape ``(D,)``, positive.

    Raises
    ------
    ValueError
        If the shapes disagree or the scale is not positive.

    Examples
    --------
    >>> flow = DiagonalAffine(torch.zeros(2), torch.tensor([2.0, 1.0]))
    >>> flow(torch.ones(2)).detach()
    tensor([2., 1.])
    """

    def __init__(self, loc: Tensor, scale: Tensor) -> None:
        if loc.dim() != 1 or scale.shape != loc.shape:
            raise ValueError(
                "loc and scale must both have shape (D,), got "
                f"{tuple(loc.shape)} and {tuple(scale.shape)}"
            )
        if not (scale > 0).all():
            raise ValueError("scale must be positive")
        super().__init__(loc.shape[0])
        self.loc = nn.Parameter(loc.detach().clone())
        self.log_scale = nn.Parameter(scale.detach().log())

    def forward_and_log_det(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.loc + self.log_scale.exp() * x, self.log_scale.sum().expand(x.shape[:-1])

    def inverse_and_log_det(self, y: Tensor) -> tuple[Tensor, Tensor]:
        return (y - self.loc) * (-self.log_scale).exp(), -self.log_scale.sum().expand(y.shape[:-1])


def permute(input_dim: int, permutation: Sequence[int] | None = None) -> Permutation:
    """Build a permutation, by default a random one, with Pyro's signature.

    Examples
    --------
    >>> permute(3, [2, 1, 0])(torch.arange(3.0))
    tensor([2., 1., 0.])
    """
    return Permutation(torch.randperm(input_dim).tolist() if permutation is None else permutation)
