"""Discrete data made continuous."""

from __future__ import annotations

import torch
from torch import Tensor


def dequantize(data: Tensor, num_levels: int = 256, seed: int | None = None) -> Tensor:
    r"""Spread discrete levels evenly over the unit interval: :math:`x = (v + u) / K`.

    With ``u`` uniform on [0, 1), the probability of a level is the integral of a density over its
    cell, of width :math:`1 / K`: :meth:`LearnedDensity.bits_per_dim` bounds its code length [1].

    Parameters
    ----------
    data
        Levels :math:`v` in ``0 .. K - 1``, of any shape and dtype.
    num_levels
        Number of levels ``K``.
    seed
        Determines the noise. Default: the global random state does.

    Returns
    -------
    Tensor
        Numbers in [0, 1), in the dtype of ``data`` if that is a floating one, else in the default
        dtype.

    Raises
    ------
    ValueError
        If ``num_levels`` is below 2, or ``data`` holds anything but levels.

    References
    ----------
    [1] L. Theis, A. van den Oord, M. Bethge. A note on the evaluation of generative models.
        `arXiv:1511.01844 <https://arxiv.org/abs/1511.01844>`_, 2015.

    Examples
    --------
    >>> x = dequantize(torch.tensor([0, 128, 255]), 256, seed=0)
    >>> (256 * x).floor()
    tensor([  0., 128., 255.])
    """
    if num_levels < 2:
        raise ValueError(f"num_levels must be at least 2, got {num_levels}")
    levels = data if data.is_floating_point() else data.to(torch.get_default_dtype())
    valid = (levels >= 0) & (levels <= num_levels - 1) & (levels == levels.floor())
    if not bool(valid.all()):
        raise ValueError(
            f"data must hold integers from 0 to {num_levels - 1}, got "
            f"{levels[~valid].flatten()[0].item()}"
        )
    generator = None
    if seed is not None:
        generator = torch.Generator(levels.device).manual_seed(seed)
    noise = torch.rand(levels.shape, generator=generator, dtype=levels.dtype, device=levels.device)
    # The sum may round up to the next level; none may reach the upper end of the interval.
    below_next = torch.nextafter(levels + 1, torch.zeros_like(levels))
    return torch.minimum(levels + noise, below_next) / num_levels
