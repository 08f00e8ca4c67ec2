"""What a flow remembers of its last pair, and what tells it that the parameters have changed."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor
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


class OptimizerSteps:
    """Count the steps of all optimizers: some edit ``parameter.data``, which has no version."""

    count = 0

    @classmethod
    def increase(cls, *_: Any) -> None:
        cls.count += 1


register_optimizer_step_post_hook(OptimizerSteps.increase)
