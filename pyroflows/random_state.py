"""The random state: a block of code may draw from a seed of its own."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def preserved() -> Iterator[None]:
    """Leave the random state as it was before a ``with`` block, on the CPU and on all GPUs in use.

    Examples
    --------
    >>> before = torch.get_rng_state()
    >>> with preserved():
    ...     noise = torch.randn(3)
    >>> bool((torch.get_rng_state() == before).all())
    True
    """
    # To ask a GPU nobody uses for its state would start it.
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    with torch.random.fork_rng(devices):
        yield


@contextlib.contextmanager
def seeded(seed: int | None) -> Iterator[None]:
    """Draw from a seed in a ``with`` block, and leave the random state as it was.

    Parameters
    ----------
    seed
        The seed; ``None`` to go on from the random state, and change it.

    Examples
    --------
    >>> with seeded(1):
    ...     one = torch.randn(3)
    >>> with seeded(1):
    ...     other = torch.randn(3)
    >>> torch.equal(one, other)
    True
    """
    if seed is None:
        yield
        return
    with preserved():
        torch.manual_seed(seed)
        yield
