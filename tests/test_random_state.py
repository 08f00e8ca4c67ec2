"""Blocks that draw from seeds of their own."""

from collections.abc import Callable

import pytest
import torch

from pyroflows.random_state import preserved, seeded


def test_a_block_without_a_seed_goes_on_from_the_random_state() -> None:
    torch.manual_seed(0)
    expected = torch.randn(2)
    torch.manual_seed(0)
    with seeded(None):
        first = torch.randn(1)
    assert torch.equal(torch.cat([first, torch.randn(1)]), expected)


@pytest.mark.parametrize("block", [preserved, lambda: seeded(1)])
def test_the_random_state_survives_errors(block: Callable) -> None:
    def draw_and_stop() -> None:
        with block():
            torch.randn(1)
            raise RuntimeError("stop")

    before = torch.get_rng_state()
    with pytest.raises(RuntimeError, match="stop"):
        draw_and_stop()
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_the_random_state_of_a_gpu_is_left_alone() -> None:
    torch.randn(1, device="cuda")
    before = torch.cuda.get_rng_state()
    with seeded(1):
        torch.randn(1, device="cuda")
    assert torch.equal(torch.cuda.get_rng_state(), before)
