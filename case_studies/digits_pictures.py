"""Pictures of digits, and of what densities say of them."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import cycle
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch.nn.functional as F
from sklearn.metrics import roc_curve
from torch import Tensor

from pyroflows.plots import LINE_STYLES

from .command_line import save_figure

SIDE = 3  # images along the side of a mosaic


def mosaic(images: Tensor) -> np.ndarray:
    """Put images ``(rows, columns, 1, H, W)`` next to each other, a pixel apart."""
    framed = F.pad(images.float(), (0, 1, 0, 1))
    rows, columns, _, height, width = framed.shape
    tiled = framed.permute(0, 3, 1, 4, 2).reshape(rows * height, columns * width)
    return F.pad(tiled, (1, 0, 1, 0)).cpu().numpy()


def show(ax: plt.Axes, images: Tensor) -> None:
    """Show images ``(rows, columns, 1, H, W)``, dark on light."""
    ax.imshow(mosaic(images), cmap="gray_r", vmin=0)
    ax.set(xticks=[], yticks=[])


def draw_grid(images: Tensor, path: Path) -> None:
    """Draw a grid of images ``(rows, columns, 1, H, W)``."""
    figure, ax = plt.subplots(figsize=(4, 4))
    show(ax, images)
    save_figure(figure, path)


def draw_temperatures(draws: Mapping[str, Tensor], temperatures: list[float], path: Path) -> None:
    """Draw a few images of each flow (rows) at each temperature (columns)."""
    size = (1.2 * len(temperatures), 1.3 * len(draws))
    figure, axes = plt.subplots(len(draws), len(temperatures), figsize=size, squeeze=False)
    for row, (name, images) in zip(axes, draws.items(), strict=True):
        for ax, some in zip(row, images[:, : SIDE**2], strict=True):
            show(ax, some.unflatten(0, (SIDE, SIDE)))
        row[0].set_ylabel(name, fontsize=8)
    for ax, temperature in zip(axes[0], temperatures, strict=True):
        ax.set_title(f"T = {temperature:g}", fontsize=9)
    save_figure(figure, path)


def draw_comparison(table: pd.DataFrame, path: Path) -> None:
    """Draw the bits of training and test images by each density."""
    bits = table[["bits per dim", "train bits per dim"]].dropna()
    order = bits.sort_values("bits per dim", ascending=False)
    figure, ax = plt.subplots(figsize=(6, 0.4 * len(order) + 1))
    ax.scatter(order["bits per dim"], order.index, color="black", label="test")
    ax.scatter(
        order["train bits per dim"],
        order.index,
        facecolor="white",
        edgecolor="black",
        label="train",
    )
    ax.set_xlabel("bits per pixel")
    ax.grid(axis="y", alpha=0.3)
    ax.legend()
    save_figure(figure, path)


def draw_anomalies(found: Mapping[int, Mapping[str, np.ndarray]], path: Path) -> None:
    """Draw the bits of normal and abnormal images, and the ROC curves of the likelihood."""
    figure, axes = plt.subplots(2, len(found), figsize=(4.5 * len(found), 6), squeeze=False)
    for (above, below), (digit, by_kind) in zip(axes.T, found.items(), strict=True):
        everything = np.concatenate([*by_kind.values()])
        edges = np.geomspace(everything.min(), everything.max(), 60)
        for (kind, values), style in zip(by_kind.items(), cycle(LINE_STYLES)):
            above.hist(values, edges, histtype="step", density=True, linestyle=style, label=kind)
            if kind != "normal":
                truth = np.repeat([0, 1], [len(by_kind["normal"]), len(values)])
                scores = np.concatenate([by_kind["normal"], values])
                below.plot(*roc_curve(truth, scores)[:2], linestyle=style, label=kind)
        above.set(title=f"{digit} left out", xlabel="bits per pixel", xscale="log", yticks=[])
        below.plot([0, 1], [0, 1], color="0.8", linewidth=0.8)
        below.set(xlabel="normal images rejected", ylabel="abnormal images rejected")
        above.legend(fontsize=8)
        below.legend(fontsize=8)
    save_figure(figure, path)
