"""Symmetry of ranks: whether posteriors lie to one side of the truth."""

from __future__ import annotations

import torch
from torch import Tensor


def symmetry_p_values(ranks: Tensor, num_draws: int) -> Tensor:
    r"""Test whether ranks are symmetric: as often ``r`` as ``num_draws - r``.

    The statistic is that of a Kolmogorov-Smirnov test between :math:`p` and :math:`1 - p`, with
    :math:`p` the ranks as shares. These are no independent samples. But from the outermost rank to
    the innermost, the difference of their counts is a fair random walk if the ranks are symmetric,
    and the probability that one gets that far is known by the reflection principle [1]: p-values
    are exact.

    Parameters
    ----------
    ranks
        Integer ranks from 0 to ``num_draws``, shape ``(N, D)``.
    num_draws
        The number of draws that the ranks count.

    Returns
    -------
    Tensor
        A p-value for each column, shape ``(D,)``.

    References
    ----------
    [1] C. C. Butler. A test for symmetry using the sample distribution function. Annals of
        Mathematical Statistics 40(6), 2209-2210, 1969.

    Examples
    --------
    >>> inner, low = torch.arange(25, 75), torch.arange(50)
    >>> (symmetry_p_values(torch.stack([inner, low], -1), num_draws=99) > 0.01).tolist()
    [True, False]
    """
    columns = (2 * ranks - num_draws).cpu().unbind(-1)
    return torch.tensor([_walk_p_value(column) for column in columns], dtype=torch.float64)


def _walk_p_value(offsets: Tensor) -> float:
    offsets = offsets[offsets != 0]  # ranks in the very middle favour no side
    steps = offsets[offsets.abs().argsort(descending=True)].sign()
    if len(steps) == 0:
        return 1.0
    wall = int(steps.cumsum(0).abs().max())
    ends = torch.arange(-len(steps), len(steps) + 1, 2)
    # Reflected at both walls, walks end in blocks of alternating sign, those on a wall cancel.
    block, remainder = (ends + wall) // (2 * wall), (ends + wall) % (2 * wall)
    signs = torch.where(remainder == 0, 0, 1 - 2 * (block % 2))
    stays_inside = _walk_ends(len(steps)) @ signs.double()
    return float((1 - stays_inside).clamp(0, 1))


def _walk_ends(num_steps: int) -> Tensor:
    """Return the probabilities of the ends of a fair random walk, from all down to all up."""
    ups = torch.arange(num_steps + 1, dtype=torch.float64)
    return (-torch.lgamma(ups + 1) - torch.lgamma(num_steps - ups + 1)).softmax(0)
