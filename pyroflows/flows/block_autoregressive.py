"""The named stack of block autoregressive layers."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from ..transforms import BlockAutoregressive, Compose
from .registry import FlowSpec, register_flow
from .stacks import check_num_layers


def block_autoregressive(
    input_dim: int,
    context_dim: int = 0,
    num_layers: int = 3,
    hidden_factors: Sequence[int] = (8, 8),
    hidden_dims: Sequence[int] = (64, 64),
    activation: type[nn.Module] = nn.Tanh,
) -> Compose:
    """Stack block autoregressive layers that run through the entries back and forth in turn.

    ``hidden_factors`` are the numbers of hidden units per entry; ``hidden_dims`` and ``activation``
    are those of the networks of the context.

    References
    ----------
    [1] N. De Cao, I. Titov, W. Aziz. Block neural autoregressive flow.
        `arXiv:1904.04676 <https://arxiv.org/abs/1904.04676>`_, 2019.

    Examples
    --------
    >>> import torch
    >>> block_autoregressive(4)(torch.zeros(4)).shape
    torch.Size([4])
    """
    check_num_layers(num_layers)
    order = range(input_dim)
    return Compose(
        BlockAutoregressive(
            input_dim, context_dim, hidden_factors, order[:: (-1) ** i], hidden_dims, activation
        )
        for i in range(num_layers)
    )


register_flow(
    FlowSpec(
        "block_autoregressive",
        block_autoregressive,
        fast_forward=True,
        fast_inverse=False,
        paper="arXiv:1904.04676",
        closed_form_inverse=False,
    )
)
