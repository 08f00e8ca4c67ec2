"""The named linear flow."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from ..transforms import PLU
from .registry import FlowSpec, register_flow


def plu(
    input_dim: int,
    context_dim: int = 0,
    hidden_dims: Sequence[int] = (64, 64),
    activation: type[nn.Module] = nn.Tanh,
) -> PLU:
    """Build one learned affine map: from a normal base it gives any normal distribution.

    With a context, the shift and the scales of the map depend on it.

    References
    ----------
    [1] D. P. Kingma, P. Dhariwal. Glow: Generative flow with invertible 1x1 convolutions.
        `arXiv:1807.03039 <https://arxiv.org/abs/1807.03039>`_, 2018.

    Examples
    --------
    >>> import torch
    >>> plu(4)(torch.zeros(4)).shape
    torch.Size([4])
    """
    return PLU(input_dim, context_dim, hidden_dims, activation)


register_flow(FlowSpec("plu", plu, fast_forward=True, fast_inverse=True, paper="arXiv:1807.03039"))
