"""The shapes of images."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from ...nn.layout import fold_batch


def image_shape(event_shape: Iterable[int]) -> tuple[int, int, int]:
    """Return ``(C, H, W)``; raise ``ValueError`` unless these are three positive numbers."""
    shape = (event_shape,) if isinstance(event_shape, int) else tuple(event_shape)
    if len(shape) != 3 or min(shape) < 1:
        raise ValueError(f"the shape of an image must be (C, H, W), positive, got {shape}")
    channels, height, width = shape
    return channels, height, width


def fold_images(x: Tensor) -> Tensor:
    """Turn ``(*batch, C, H, W)`` into ``(N, C, H, W)``."""
    return fold_batch(x, (x.shape[:-3].numel(), *x.shape[-3:]))


def spread_context(context: Tensor | None, batch_shape: torch.Size) -> Tensor | None:
    """Turn a context that broadcasts to a batch of ``N`` images into ``(N, context_dim)``."""
    if context is None:
        return None
    size = context.shape[-1]
    return context.expand(*batch_shape, size).reshape(batch_shape.numel(), size)
