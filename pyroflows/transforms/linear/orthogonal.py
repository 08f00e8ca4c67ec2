"""The orthogonal layer: a learned rotation."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

from ...nn.orthogonal import Reflections, Rotation, cayley, exponential
from ..base import FlowTransform

_MATRICES: dict[str, Callable[[int], nn.Module]] = {
    "householder": Reflections,
    "exponential": lambda size: Rotation(size, exponential),
    "cayley": lambda size: Rotation(size, cayley),
}


class Orthogonal(FlowTransform):
    r"""Rotate the vector: :math:`y = Q x` with an orthogonal matrix ``Q`` and log-determinant 0.

    Starts as the identity. Costs ``O(D^2)`` in both directions and ``O(D^3)`` once a batch.

    Parameters
    ----------
    input_dim
        Number of entries ``D``.
    method
        What ``Q`` is made of: ``"householder"`` for a product of ``D`` reflections [1],
        ``"exponential"`` for the exponential of a skew-symmetric matrix, ``"cayley"`` for the
        Cayley transform of one. All but the last reach all rotations, the last almost all. The
        first is the fastest.

    Raises
    ------
    ValueError
        If there is no such method.

    References
    ----------
    [1] J. M. Tomczak, M. Welling. Improving variational auto-encoders using Householder flow.
        `arXiv:1611.09630 <https://arxiv.org/abs/1611.09630>`_, 2016.

    Examples
    --------
    >>> import torch
    >>> Orthogonal(3, method="cayley")(torch.ones(3)).detach()
    tensor([1., 1., 1.])
    """

    def __init__(self, input_dim: int, method: str = "householder") -> None:
        super().__init__(input_dim)
        if method not in _MATRICES:
            raise ValueError(f"method must be one of {', '.join(_MATRICES)}, got {method!r}")
        self.method = method
        self.matrix = _MATRICES[method](input_dim)

    def forward_and_log_det(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return F.linear(x, self.matrix()), x.new_zeros(x.shape[:-1])

    def inverse_and_log_det(self, y: Tensor) -> tuple[Tensor, Tensor]:
        return F.linear(y, self.matrix().mT), y.new_zeros(y.shape[:-1])

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, method={self.method!r}"
