"""The QR layer: any linear map by an orthogonal and a triangular factor."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from ...nn.orthogonal import Reflections
from .factorized import FactorizedLinear


class QR(FactorizedLinear):
    r"""Map the vector by an orthogonal matrix times a triangular one.

    .. math:: y = Q R x + t, \qquad R = \mathrm{diag}(s) \, U, \qquad
        \log|\det J| = \textstyle\sum_d \log s_d .

    ``Q`` is a product of Householder reflections [1], a rotation; :math:`s > 0`; ``U`` is unit
    upper triangular. With enough reflections it reaches all matrices of positive determinant. With
    a context, the shift ``t`` and :math:`\log s` depend on it. Costs ``O(D^2)`` in both directions
    and ``O(K^2 D + K D^2)`` once a batch for ``K`` reflections; the log-determinant costs ``O(D)``.

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
    num_reflections
        Number of reflections ``K`` in ``Q``, at most ``D``. Default: ``D``.

    Raises
    ------
    ValueError
        If ``num_reflections`` is not between 1 and ``D``.

    References
    ----------
    [1] J. M. Tomczak, M. Welling. Improving variational auto-encoders using Householder flow.
        `arXiv:1611.09630 <https://arxiv.org/abs/1611.09630>`_, 2016.

    Examples
    --------
    >>> import torch
    >>> flow = QR(3)
    >>> flow(torch.ones(3)).detach()
    tensor([1., 1., 1.])
    """

    def __init__(
        self,
        input_dim: int,
        context_dim: int = 0,
        hidden_dims: Sequence[int] = (64, 64),
        activation: type[nn.Module] = nn.Tanh,
        num_reflections: int | None = None,
    ) -> None:
        super().__init__(input_dim, context_dim, hidden_dims, activation)
        self.orthogonal = Reflections(input_dim, num_reflections)

    def matrix_of_left_factor(self) -> Tensor:
        return self.orthogonal()

    def solve_left_factor(self, y: Tensor) -> Tensor:
        return y @ self.orthogonal()


def qr(input_dim: int, **options: Any) -> QR:
    """Build a learned matrix of positive determinant as an orthogonal times a triangular one.

    Examples
    --------
    >>> import torch
    >>> qr(10)(torch.zeros(10)).shape
    torch.Size([10])
    """
    return QR(input_dim, **options)


def conditional_qr(
    input_dim: int, context_dim: int, hidden_dims: Sequence[int] | None = None, **options: Any
) -> QR:
    """Build an orthogonal times a triangular matrix, scales and shift dependent on a context.

    Examples
    --------
    >>> import torch
    >>> conditional_qr(10, 3).condition(torch.ones(3))(torch.zeros(10)).shape
    torch.Size([10])
    """
    hidden_dims = (input_dim * 10, input_dim * 10) if hidden_dims is None else hidden_dims
    return QR(input_dim, context_dim, hidden_dims, **options)
