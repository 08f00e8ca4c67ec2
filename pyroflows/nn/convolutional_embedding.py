"""Networks that summarise time series and images."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class _ConvolutionalEmbedding(nn.Module):
    """Halve a grid by residual blocks until it is small, and read what is left of it in place.

    The last layer sees each remaining cell by itself: summaries know where something happened.
    """

    def __init__(
        self,
        channels: int,
        grid: tuple[int, ...],
        output_dim: int,
        width: int,
        smallest: int,
        convolution: Callable[..., nn.Module],
        pool: Callable[..., nn.Module],
    ) -> None:
        super().__init__()
        self.channels, self.grid = channels, grid
        counts = {"output_dim": output_dim, "width": width}
        if bad := {name: count for name, count in counts.items() if count < 1}:
            raise ValueError(f"numbers must be at least 1, got {bad}")
        self.first = convolution(2 * channels, width, 5, padding=2)
        blocks: list[nn.Module] = [_Residual(width, convolution)]
        while max(grid) > smallest:
            halved = tuple(2 if size > smallest else 1 for size in grid)
            blocks += [pool(halved, ceil_mode=True), _Residual(width, convolution)]
            grid = tuple(math.ceil(size / step) for size, step in zip(grid, halved, strict=True))
        self.blocks = nn.Sequential(*blocks)
        self.last = nn.Linear(width * math.prod(grid), output_dim)

    def summarise(self, x: Tensor) -> Tensor:
        """Return summaries of grids ``(*batch, channels, *grid)``."""
        batch_shape = x.shape[: x.dim() - 1 - len(self.grid)]
        x = x.reshape(-1, self.channels, *self.grid)
        missing = x.isnan()
        marked = torch.cat([x.masked_fill(missing, 0.0), missing.to(x)], 1)
        hidden = self.blocks(self.first(marked))
        return self.last(F.silu(hidden).flatten(1)).reshape(*batch_shape, self.last.out_features)

    def _check(self, x: Tensor, shape: tuple[int, ...]) -> None:
        if x.shape[-1:] != (math.prod(shape),):
            raise ValueError(
                f"shape {shape} has {math.prod(shape)} entries, got observations of "
                f"shape {tuple(x.shape)}"
            )


class _Residual(nn.Module):
    def __init__(self, width: int, convolution: Callable[..., nn.Module]) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.GroupNorm(1, width),
            nn.SiLU(),
            convolution(width, width, 3, padding=1),
            nn.SiLU(),
            convolution(width, width, 3, padding=1),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x)


class SeriesEmbedding(_ConvolutionalEmbedding):
    r"""Summarise a time series by one-dimensional convolutions.

    Residual blocks [1] see the series at its own resolution, then at half of it, a quarter, ...,
    until 8 times or fewer are left, which a linear layer reads. Missing entries, NaN, are marked in
    channels of their own. Costs ``O(T)``.

    Parameters
    ----------
    shape
        Number of times and of channels ``(T, C)``, that of the observed site.
    output_dim
        Size of the summary.
    width
        Number of channels inside.

    Raises
    ------
    ValueError
        If a number is below 1, or observations have another number of entries.

    References
    ----------
    [1] K. He, X. Zhang, S. Ren, J. Sun. Identity mappings in deep residual networks.
        `arXiv:1603.05027 <https://arxiv.org/abs/1603.05027>`_, 2016.

    Examples
    --------
    >>> SeriesEmbedding((100, 2), 16)(torch.randn(7, 200)).shape
    torch.Size([7, 16])
    """

    def __init__(self, shape: tuple[int, int], output_dim: int = 32, width: int = 32) -> None:
        times, channels = _checked(shape, 2, "(T, C)")
        super().__init__(channels, (times,), output_dim, width, 8, nn.Conv1d, nn.AvgPool1d)
        self.shape = (times, channels)

    def forward(self, x: Tensor) -> Tensor:
        """Return summaries ``(*batch, output_dim)`` of flat series ``(*batch, T C)``."""
        self._check(x, self.shape)
        return self.summarise(x.unflatten(-1, self.shape).transpose(-1, -2))


class ImageEmbedding(_ConvolutionalEmbedding):
    r"""Summarise an image by two-dimensional convolutions.

    Residual blocks [1] see the image at its own resolution, then at half of it, a quarter, ...,
    until 4 x 4 cells or fewer are left, which a linear layer reads. Missing pixels, NaN, are marked
    in channels of their own. Costs ``O(H W)``.

    Parameters
    ----------
    shape
        Numbers of channels, rows and columns ``(C, H, W)``, that of the observed site.
    output_dim
        Size of the summary.
    width
        Number of channels inside.

    Raises
    ------
    ValueError
        If a number is below 1, or observations have another number of entries.

    References
    ----------
    [1] K. He, X. Zhang, S. Ren, J. Sun. Identity mappings in deep residual networks.
        `arXiv:1603.05027 <https://arxiv.org/abs/1603.05027>`_, 2016.

    Examples
    --------
    >>> ImageEmbedding((3, 16, 16), 16)(torch.randn(7, 768)).shape
    torch.Size([7, 16])
    """

    def __init__(self, shape: tuple[int, int, int], output_dim: int = 32, width: int = 32) -> None:
        channels, *grid = _checked(shape, 3, "(C, H, W)")
        super().__init__(channels, tuple(grid), output_dim, width, 4, nn.Conv2d, nn.AvgPool2d)
        self.shape = (channels, *grid)

    def forward(self, x: Tensor) -> Tensor:
        """Return summaries ``(*batch, output_dim)`` of flat images ``(*batch, C H W)``."""
        self._check(x, self.shape)
        return self.summarise(x.unflatten(-1, self.shape))


def _checked(shape: tuple[int, ...], length: int, names: str) -> tuple[int, ...]:
    shape = tuple(shape)
    if len(shape) != length or min(shape) < 1:
        raise ValueError(f"shape must be {names}, numbers of at least 1, got {shape}")
    return shape
