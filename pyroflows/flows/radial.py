"""A stack of radial flows."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from ..transforms import Compose, Radial
from .registry import FlowSpec, register_flow
from .stacks import check_num_layers


def radial(
    input_dim: int,
    context_dim: int = 0,
    num_layers: int = 16,
    hidden_dims: Sequence[int] = (64, 64),
    activation: type[nn.Module] = nn.Tanh,
) -> Compose:
    """Stack radial flows. The hidden layers are those of the networks of the context.

    References
    ----------
    [1] D. J. Rezende, S. Mohamed. Variational inference with normalizing flows.
        `arXiv:1505.05770 <https://arxiv.org/abs/1505.05770>`_, 2015.

    Examples
    --------
    >>> import torch
    >>> radial(4, num_layers=2)(torch.zeros(4)).shape
    torch.Size([4])
    """
    check_num_layers(num_layers)
    return Compose(
        Radial(input_dim, context_dim, hidden_dims, activation) for _ in range(num_layers)
    )


register_flow(
    FlowSpec("radial", radial, fast_forward=True, fast_inverse=True, paper="arXiv:1505.05770")
)
