"""Arrays of images, checked and brought into one layout."""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from torch import Tensor

from .dequantization import check_levels, level_dtype

CHANNEL_COUNTS = (1, 3, 4)  # grey, colours, colours and opacity


def image_levels(
    images: np.ndarray | Tensor,
    num_levels: int = 256,
    channels: Literal["first", "last"] | None = None,
) -> Tensor:
    """Return images as integer levels of shape ``(N, C, H, W)``, what :class:`Dequantized` learns.

    An entry takes a byte, up to 256 levels: 60 000 images of 28 x 28 take 47 MB, 50 000 of
    3 x 32 x 32 take 154 MB. Only the batch at hand is ever turned into floating-point numbers.

    Parameters
    ----------
    images
        Levels, integers from 0 to ``num_levels - 1`` of any dtype, in an array of shape
        ``(N, H, W)``, ``(N, C, H, W)`` or ``(N, H, W, C)``.
    num_levels
        Number of levels.
    channels
        Where the channels of four-dimensional arrays are. Default: where the size is 1, 3 or 4.

    Raises
    ------
    TypeError
        If ``images`` is not an array.
    ValueError
        If it has another number of dimensions, channels that could be either dimension, or
        anything but levels.

    Examples
    --------
    >>> image_levels(np.zeros((10, 28, 28))).shape
    torch.Size([10, 1, 28, 28])
    >>> image_levels(np.zeros((10, 32, 32, 3), dtype=np.uint8)).shape
    torch.Size([10, 3, 32, 32])
    """
    if not isinstance(images, Tensor | np.ndarray):
        raise TypeError(f"images must be a tensor or an array, got {type(images).__name__}")
    levels = torch.as_tensor(images)
    if levels.dim() not in (3, 4) or min(levels.shape[1:]) < 1:
        raise ValueError(
            "images must have shape (N, H, W), (N, C, H, W) or (N, H, W, C), got "
            f"{tuple(levels.shape)}"
        )
    check_levels(levels, num_levels)
    levels = levels.to(level_dtype(num_levels))
    if levels.dim() == 3:
        return levels.unsqueeze(1)
    last = _channels_are_last(levels.shape) if channels is None else channels == "last"
    return levels.movedim(-1, 1).contiguous() if last else levels


def _channels_are_last(shape: torch.Size) -> bool:
    first, last = (shape[dim] in CHANNEL_COUNTS for dim in (1, -1))
    if first == last:
        raise ValueError(
            f"images of shape {tuple(shape)} may have their channels first or last: say which by "
            "channels='first' or channels='last'"
        )
    return last
