"""Observations with parts hidden at random: what makes a density ready for any of them."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ...distributions.maximum_likelihood import Rows
from ...random_state import seeded
from .observations import ObservationSpace

WHOLE = 0.2  # share of observations of which nothing is hidden


class Masking:
    r"""Hide entries of observations, and elements of sets, at random.

    With ``missing="random"``, each observation gets a rate of its own, 0 for a fifth of them and
    uniform on the unit interval for the others, at which its entries are missing; in half of the
    sets whole elements are missing instead. The number of elements ``n`` of sets is log-uniform.

    Parameters
    ----------
    observations
        What may be missing, and the sizes of sets.
    """

    def __init__(self, observations: ObservationSpace) -> None:
        self.common_size = observations.common_size
        self.hides_entries = observations.missing == "random"
        self.sizes = observations.sizes

    def check(self, x: Tensor) -> None:
        """Raise ``ValueError`` if simulations hold NaN that would be taken for chance."""
        if self.hides_entries and bool(x.isnan().any()):
            raise ValueError(
                "simulations must be finite with missing='random', got NaN: if the simulator says "
                "what is missing, train with missing='simulated'"
            )

    def batch(self, x: Tensor) -> Tensor:
        """Return a batch to train on; the sets in it have one size, which saves time."""
        if self._varies():
            number = int(self._numbers(1))
            x = x[:, torch.randperm(x.shape[1], device=x.device)[:number]]
        return self._hide_entries(x)

    def frozen(self, x: Tensor, seed: int) -> Tensor:
        """Return observations with the same masks each time; elements left out are all NaN."""
        rows = x.cpu()
        with seeded(seed):
            if self._varies():
                absent = torch.arange(x.shape[1]) >= self._numbers(len(x)).unsqueeze(-1)
                rows = rows.masked_fill(absent.unsqueeze(-1), torch.nan)
            return self._hide_entries(rows).to(x)

    def validation(self, rows: Rows, seed: int) -> Rows:
        """Return rows to validate on, their observations with masks."""
        assert rows.context is not None
        return Rows(rows.data, self.frozen(rows.context, seed))

    def _varies(self) -> bool:
        return self.sizes is not None and self.sizes[0] < self.sizes[1]

    def _numbers(self, count: int) -> Tensor:
        """Return numbers of elements."""
        assert self.sizes is not None
        low, high = math.log(self.sizes[0]), math.log(self.sizes[1] + 1)
        numbers = (low + (high - low) * torch.rand(count)).exp().long()
        return numbers.clamp(*self.sizes)

    def _hide_entries(self, x: Tensor) -> Tensor:
        if not self.hides_entries:
            return x
        draws = torch.rand_like(x)
        row = (len(x), *[1] * (x.dim() - 1))
        if x.dim() == 3:
            draws = _by_elements(draws, row, self.common_size)
        rate = (torch.rand(row, device=x.device) - WHOLE) / (1 - WHOLE)
        return x.masked_fill(draws < rate, torch.nan)


def _by_elements(draws: Tensor, row: tuple[int, ...], common_size: int) -> Tensor:
    """Tie draws that decide on whole elements, and those on entries that all elements share."""
    own = draws.shape[-1] - common_size
    elements, common = draws[..., :own], draws[:, :1, own:]
    by_element = torch.rand(row, device=draws.device) < 0.5
    elements = torch.where(by_element, elements[..., :1], elements)
    return torch.cat([elements, common.expand(-1, draws.shape[1], -1)], -1)
