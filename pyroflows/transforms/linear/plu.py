"""The PLU layer: any linear map by its triangular factors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...nn.linalg import solve_unit_triangular
from .factorized import FactorizedLinear


class PLU(FactorizedLinear):
    r"""Map the vector by an invertible matrix in factors, the "1x1 convolution" of Glow [1].

    .. math:: y = W x + t, \qquad W = P L \, \mathrm{diag}(s) \, U, \qquad
        \log|\det J| = \textstyle\sum_d \log |s_d| .

    The permutation ``P`` and the signs of ``s`` are fixed; :math:`\log |s|`, the unit triangular
    matrices ``L`` (lower) and ``U`` (upper), and the shift ``t`` are learned. On a standard normal
    vector it gives any normal distribution. With a context, ``t`` and :math:`\log |s|` depend on
    it. Costs ``O(D^2)`` in both directions, by triangular products and solves; the log-determinant
    costs ``O(D)``.

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
    weight
        The initial :math:`W`, an invertible matrix of shape ``(D, D)``, which fixes ``P`` and the
        signs. Default: the identity.

    Raises
    ------
    ValueError
        If ``weight`` has another shape or is not invertible.

    References
    ----------
    [1] D. P. Kingma, P. Dhariwal. Glow: Generative flow with invertible 1x1 convolutions.
        `arXiv:1807.03039 <https://arxiv.org/abs/1807.03039>`_, 2018.

    Examples
    --------
    >>> flow = PLU(2, weight=torch.tensor([[0.0, 2.0], [1.0, 3.0]]))
    >>> flow(torch.ones(2)).detach()
    tensor([2., 4.])
    """

    permutation: Tensor
    signs: Tensor

    def __init__(
        self,
        input_dim: int,
        context_dim: int = 0,
        hidden_dims: Sequence[int] = (64, 64),
        activation: type[nn.Module] = nn.Tanh,
        weight: Tensor | None = None,
    ) -> None:
        super().__init__(input_dim, context_dim, hidden_dims, activation)
        self.register_buffer("permutation", torch.arange(input_dim))
        self.register_buffer("signs", torch.ones(input_dim))
        if weight is not None:
            self._start_from(weight)

    def matrix_of_left_factor(self) -> Tensor:
        lower = self.factors.tril(-1) * self.signs + self.signs.diag()
        return lower.index_select(0, self.permutation)

    def solve_left_factor(self, y: Tensor) -> Tensor:
        permuted = y.index_select(-1, self.permutation.argsort())
        return solve_unit_triangular(self.factors, permuted, upper=False) * self.signs

    @torch.no_grad()
    def _start_from(self, weight: Tensor) -> None:
        input_dim = self.event_shape[0]
        if weight.shape != (input_dim, input_dim):
            raise ValueError(
                f"weight must have shape {(input_dim, input_dim)}, got {tuple(weight.shape)}"
            )
        permutation, lower, upper = torch.linalg.lu(weight)
        pivots = upper.diagonal()
        if not bool(((pivots != 0) & pivots.isfinite()).all()):
            raise ValueError(f"weight must be invertible, got pivots {pivots.tolist()}")
        self.to(weight)
        self.permutation.copy_(permutation.argmax(-1))
        self.signs.copy_(pivots.sign())
        self.factors.copy_(lower.tril(-1) + upper.triu(1) / pivots.unsqueeze(-1))
        self.shift_and_log_scale.constant[input_dim:] = pivots.abs().log()


def plu(input_dim: int, **options: Any) -> PLU:
    """Build a learned invertible matrix, the "1x1 convolution" of Glow.

    Examples
    --------
    >>> plu(10)(torch.zeros(10)).shape
    torch.Size([10])
    """
    return PLU(input_dim, **options)


def conditional_plu(
    input_dim: int, context_dim: int, hidden_dims: Sequence[int] | None = None, **options: Any
) -> PLU:
    """Build a learned invertible matrix whose scales and shift depend on a context.

    Examples
    --------
    >>> conditional_plu(10, 3).condition(torch.ones(3))(torch.zeros(10)).shape
    torch.Size([10])
    """
    hidden_dims = (input_dim * 10, input_dim * 10) if hidden_dims is None else hidden_dims
    return PLU(input_dim, context_dim, hidden_dims, **options)
