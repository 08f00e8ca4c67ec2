"""Local two-sample test on a posterior that is right in one half of the data only."""

import importlib
import math

import pytest
import torch
from torch import Tensor

from pyroflows.diagnostics import local_c2st

OBSERVED_X = torch.tensor([[-1.5, 0.0], [1.5, 0.0]])


def problem(
    size: int, left_scale: float = 1.0, right_scale: float = 1.0, seed: int = 0
) -> dict[str, Tensor]:
    """Simulate parameters around the data, and draw with scales by the sign of the first entry."""
    generator = torch.Generator().manual_seed(seed)

    def drawn(x: Tensor, *shape: int) -> Tensor:
        scale = torch.where(x[:, :1] > 0, right_scale, left_scale)
        return x + scale * torch.randn(*shape, *x.shape, generator=generator)

    x = torch.randn(size, 2, generator=generator)
    return {
        "parameters": x + torch.randn(size, 2, generator=generator),
        "x": x,
        "draws": drawn(x),
        "observed_x": OBSERVED_X,
        "observed_draws": drawn(OBSERVED_X, 500),
    }


def test_exact_posterior_passes() -> None:
    """Fails by chance once in 10 runs with a fresh seed: two observations at 1 in 20."""
    answer = local_c2st(**problem(1_000), num_null=19)
    assert answer.statistic.shape == answer.p_value.shape == (2,)
    assert answer.null.shape == (19, 2)
    assert (answer.p_value > 1 / 20).all()


@pytest.mark.parametrize("scale", [0.5, 2.0])
def test_finds_where_the_posterior_is_wrong(scale: float) -> None:
    answer = local_c2st(**problem(2_000, left_scale=scale), num_null=19)
    assert answer.p_value[0].item() == pytest.approx(1 / 20)
    assert answer.statistic[0] > 10 * answer.statistic[1]
    assert answer.statistic[0] > 5 * answer.null[:, 0].max()


def test_is_deterministic_and_leaves_the_random_state_alone() -> None:
    data = problem(100)
    state = torch.get_rng_state()
    first = local_c2st(**data, num_null=3)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(local_c2st(**data, num_null=3).null, first.null)
    assert not torch.equal(local_c2st(**data, num_null=3, seed=1).null, first.null)


@pytest.mark.slow
def test_keeps_the_rate_of_false_alarms(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails by chance once in 16 000 runs with a fresh seed: four standard deviations.

    The test is exact for any training; a short one will do.
    """
    module = importlib.import_module("pyroflows.diagnostics.local_c2st")
    monkeypatch.setattr(module, "_NUM_STEPS", 60)
    repeats, alpha = 400, 0.1
    alarms = 0
    for seed in range(repeats):
        answer = local_c2st(**problem(60, seed=seed), num_null=9, seed=seed)
        alarms += answer.p_value[0].item() < alpha + 1e-6
    assert alarms / repeats < alpha + 4 * math.sqrt(alpha * (1 - alpha) / repeats)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("parameters", lambda value: value[:, 0], "parameters must have shape"),
        ("x", lambda value: value[1:], r"x must have shape \(60, K"),
        ("x", lambda value: 0 * value, "x must vary in every column"),
        ("parameters", lambda value: 0 * value, "parameters must vary in every column"),
        ("draws", lambda value: value[:, :1], r"draws must have shape \(60, 2"),
        ("draws", lambda value: value / 0, "draws must be finite"),
        ("observed_x", lambda value: value[:, :1], r"observed_x must have shape \(M, 2"),
        ("observed_draws", lambda value: value[:, :1], r"observed_draws must have shape \(L, 2, 2"),
        ("observed_draws", lambda value: value * math.nan, "observed_draws must not hold NaN"),
    ],
)
def test_rejects_bad_tensors(name: str, change, message: str) -> None:
    data = problem(60)
    data[name] = change(data[name])
    with pytest.raises(ValueError, match=message):
        local_c2st(**data)


def test_rejects_too_little() -> None:
    with pytest.raises(ValueError, match="at least 50 simulations, got 49"):
        local_c2st(**problem(49))
    with pytest.raises(ValueError, match="num_null must be at least 1, got 0"):
        local_c2st(**problem(60), num_null=0)
