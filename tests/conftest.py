"""Settings of all tests. Torch is optional here: some tests run where it is not installed."""

import os
from collections.abc import Iterator

import pytest

os.environ["OMP_NUM_THREADS"] = "1"  # of processes that tests start: pytest runs one a core

try:
    import pyro
    import torch
except ImportError:
    torch = None
else:
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _fresh_state() -> Iterator[None]:
    """Start each test from the same seed, in float32, with an empty parameter store."""
    if torch is None:
        yield
        return
    torch.manual_seed(0)
    pyro.clear_param_store()
    yield
    torch.set_default_dtype(torch.float32)
