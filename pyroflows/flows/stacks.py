"""What the named architectures share: the number of layers and the case of one entry."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from ..transforms import Elementwise, FlowTransform, ScalarBijection


def elementwise_stack(
    bijection: ScalarBijection,
    context_dim: int,
    num_layers: int,
    hidden_dims: Sequence[int],
    activation: type[nn.Module],
) -> list[FlowTransform]:
    """Build what the stacks come down to for a single entry."""
    return [
        Elementwise(bijection, 1, context_dim, hidden_dims, activation) for _ in range(num_layers)
    ]


def check_num_layers(num_layers: int) -> None:
    if num_layers < 1:
        raise ValueError(f"num_layers must be at least 1, got {num_layers}")
