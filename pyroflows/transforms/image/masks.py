"""Masks: which entries of an image a coupling moves, and which say how."""

from __future__ import annotations

from typing import Literal, Protocol, TypeAlias

import torch
from torch import Tensor, nn

MaskName: TypeAlias = Literal["channel", "checkerboard"]


class Mask(Protocol):
    """Say what a coupling asks of a mask.

    Attributes
    ----------
    kept_channels
        Number of channels that the network reads.
    moved_channels
        Number of channels that the bijection maps, each with parameters of its own.
    """

    kept_channels: int
    moved_channels: int

    def split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return what the network reads and what the bijection maps."""

    def merge(self, x: Tensor, y: Tensor, log_derivative: Tensor) -> tuple[Tensor, Tensor]:
        """Return the image ``x`` with moved entries as in ``y``, and their log-determinant."""


class ChannelMask(nn.Module):
    """Keep the first half of the channels and move the last; the other way round with ``swap``.

    Examples
    --------
    >>> kept, moved = ChannelMask((3, 2, 2)).split(torch.zeros(7, 3, 2, 2))
    >>> kept.shape, moved.shape
    (torch.Size([7, 1, 2, 2]), torch.Size([7, 2, 2, 2]))
    """

    def __init__(self, event_shape: tuple[int, int, int], swap: bool = False) -> None:
        super().__init__()
        channels = event_shape[0]
        if channels < 2:
            raise ValueError(
                f"a channel mask needs at least two channels, got an image of shape {event_shape}"
            )
        self.sizes = (channels // 2, channels - channels // 2)
        self.swap = swap
        self.kept_channels, self.moved_channels = self.sizes[::-1] if swap else self.sizes

    def split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        first, last = x.split(self.sizes, 1)
        return (last, first) if self.swap else (first, last)

    def merge(self, x: Tensor, y: Tensor, log_derivative: Tensor) -> tuple[Tensor, Tensor]:
        kept, _ = self.split(x)
        return torch.cat([y, kept] if self.swap else [kept, y], 1), log_derivative.sum((1, 2, 3))

    def extra_repr(self) -> str:
        return f"{sum(self.sizes)}, swap={self.swap}"


class CheckerboardMask(nn.Module):
    """Keep the fields of one colour of a checkerboard and move those of the other.

    The upper left field is kept, or moves with ``swap``. The network sees zeros for fields that
    move; the bijection runs on all fields, and half of its results are used.

    Examples
    --------
    >>> CheckerboardMask((1, 2, 2)).split(torch.ones(1, 1, 2, 2))[0]
    tensor([[[[1., 0.],
              [0., 1.]]]])
    """

    kept: Tensor

    def __init__(self, event_shape: tuple[int, int, int], swap: bool = False) -> None:
        super().__init__()
        channels, height, width = event_shape
        if height * width < 2:
            raise ValueError(
                f"a checkerboard needs at least two pixels, got an image of shape {event_shape}"
            )
        self.kept_channels = self.moved_channels = channels
        self.swap = swap
        colour = (torch.arange(height).unsqueeze(-1) + torch.arange(width)) % 2
        self.register_buffer("kept", colour == int(swap), persistent=False)

    def split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return torch.where(self.kept, x, 0.0), x

    def merge(self, x: Tensor, y: Tensor, log_derivative: Tensor) -> tuple[Tensor, Tensor]:
        log_det = torch.where(self.kept, 0.0, log_derivative).sum((1, 2, 3))
        return torch.where(self.kept, x, y), log_det

    def extra_repr(self) -> str:
        return f"{tuple(self.kept.shape)}, swap={self.swap}"
