"""A stack of planar flows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from torch import nn

from ..transforms import Compose, Planar
from .registry import FlowSpec, register_flow
from .stacks import check_num_layers


def planar(
    input_dim: int,
    context_dim: int = 0,
    num_layers: int = 16,
    hidden_dims: Sequence[int] = (64, 64),
    activation: type[nn.Module] = nn.Tanh,
    nonlinearity: Literal["tanh", "leaky_relu"] = "tanh",
) -> Compose:
    """Stack planar flows. The hidden layers are those of the networks of the context.

    References
    ----------
    [1] D. J. Rezende, S. Mohamed. Variational inference with normalizing flows.
        `arXiv:1505.05770 <https://arxiv.org/abs/1505.05770>`_, 2015.

    Examples
    --------
    >>> import torch
    >>> planar(4, num_layers=2)(torch.zeros(4)).shape
    torch.Size([4])
    """
    check_num_layers(num_layers)
    return Compose(
        Planar(input_dim, context_dim, hidden_dims, activation, nonlinearity)
        for _ in range(num_layers)
    )


register_flow(
    FlowSpec(
        "planar",
        planar,
        fast_forward=True,
        fast_inverse=True,
        closed_form_inverse=False,
        paper="arXiv:1505.05770",
    )
)
