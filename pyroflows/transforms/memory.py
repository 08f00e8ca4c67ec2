"""What a flow remembers of its last pair, and what tells it that the parameters have changed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook


class Memory(NamedTuple):
    """Hold the last pair a flow has mapped, and what the answer depended on.

    The storages are held so that their addresses, part of the fingerprint, are not used again.
    """

    x: Tensor
    y: Tensor
    log_det: Tensor
    fingerprint: tuple
    storages: tuple


def tensors_of(module: nn.Module) -> Iterator[Tensor]:
    """Yield the parameters and buffers of a module and its parts, shared ones repeatedly.

    Asked at every call of a flow: `Module.parameters`, which looks for repetitions, takes three
    times as long.
    """
    for tensor in (*module._parameters.values(), *module._buffers.values()):
        if tensor is not None:
            yield tensor
    for part in module._modules.values():
        if part is not None:
            yield from tensors_of(part)


class OptimizerSteps:
    """Count the steps of all optimizers: some edit ``parameter.data``, which has no version."""

    count = 0

    @classmethod
    def increase(cls, *_: Any) -> None:
        cls.count += 1


register_optimizer_step_post_hook(OptimizerSteps.increase)
