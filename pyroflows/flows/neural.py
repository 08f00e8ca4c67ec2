"""Named stacks of autoregressive layers of monotone networks: neural autoregressive flows."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from ..transforms import Affine, Chain, Compose, DeepSigmoidal
from .autoregressive import autoregressive_stack
from .registry import FlowSpec, register_flow


def neural_autoregressive(
    input_dim: int,
    context_dim: int = 0,
    num_layers: int = 4,
    hidden_dims: Sequence[int] = (64, 64),
    hidden_units: int = 8,
    activation: type[nn.Module] = nn.Tanh,
) -> Compose:
    """Stack autoregressive layers of deep sigmoidal maps, each followed by an affine map.

    The forward map, sampling, takes one pass each. There are ``hidden_units`` sigmoids per entry.

    References
    ----------
    [1] C.-W. Huang, D. Krueger, A. Lacoste, A. Courville. Neural autoregressive flows.
        `arXiv:1804.00779 <https://arxiv.org/abs/1804.00779>`_, 2018.

    Examples
    --------
    >>> import torch
    >>> neural_autoregressive(4, num_layers=2)(torch.zeros(4)).shape
    torch.Size([4])
    """
    bijection = Chain(DeepSigmoidal(hidden_units), Affine())
    return Compose(
        autoregressive_stack(bijection, input_dim, context_dim, num_layers, hidden_dims, activation)
    )


register_flow(
    FlowSpec(
        "neural_autoregressive",
        neural_autoregressive,
        fast_forward=True,
        fast_inverse=False,
        closed_form_inverse=False,
        paper="arXiv:1804.00779",
    )
)
