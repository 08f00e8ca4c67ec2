"""Simulation-based calibration on a conjugate normal model, right and wrong."""

import math
from types import SimpleNamespace

import pytest
import torch
from scipy.stats import chisquare
from torch import Tensor

from pyroflows.diagnostics import SBC, ranks, sbc

NUM_REPLICATES, NUM_DRAWS = 1_000, 200


def conjugate(*shape: int, seed: int = 0) -> SimpleNamespace:
    """Simulate from a standard normal prior and one observation of unit variance."""
    generator = torch.Generator().manual_seed(seed)
    mu = torch.randn(*shape, generator=generator)
    return SimpleNamespace(
        parameters={"mu": mu}, observations={"y": mu + torch.randn(*shape, generator=generator)}
    )


class Posterior:
    """Draw from the conjugate posterior, or from one that is off by a scale and a shift."""

    def __init__(self, scale: float = 1.0, shift: float = 0.0) -> None:
        self.scale, self.shift = scale, shift
        self.batch_sizes: list[int] = []

    def sample(self, num_draws: int, *, x: dict[str, Tensor]) -> dict[str, Tensor]:
        y, deviation = x["y"], math.sqrt(0.5)
        self.batch_sizes.append(len(y))
        noise = self.scale * torch.randn(num_draws, *y.shape) + self.shift
        return {"mu": y / 2 + deviation * noise, "unused": torch.zeros(num_draws)}


def test_exact_posterior_passes() -> None:
    """Fails by chance once in 100 runs with a fresh seed."""
    result = sbc(Posterior(), conjugate(NUM_REPLICATES, 3), NUM_DRAWS)
    assert result.passes(alpha=0.01)


@pytest.mark.parametrize(
    "wrong", [Posterior(scale=0.75), Posterior(scale=1.35), Posterior(shift=0.25)]
)
def test_wrong_posterior_fails(wrong: Posterior) -> None:
    result = sbc(wrong, conjugate(NUM_REPLICATES, 2), NUM_DRAWS)
    assert (result.p_values < 1e-3).all()
    assert (result.chi_square_p_values < 1e-3).all()
    assert not result.passes()


def test_both_tests_together_keep_the_rate_of_false_alarms() -> None:
    """Fails by chance once in 16 000 runs with a fresh seed: four standard deviations."""
    repeats, alpha = 400, 0.1
    generator = torch.Generator().manual_seed(0)
    alarms = 0
    for _ in range(repeats):
        uniform = torch.randint(21, (100, 2), generator=generator)
        alarms += not SBC(uniform, 20, ("a", "b")).passes(alpha)
    assert alarms / repeats < alpha + 4 * math.sqrt(alpha * (1 - alpha) / repeats)


def test_prior_as_posterior_passes() -> None:
    """Ranks of single parameters cannot tell; fails by chance once in 100 runs."""
    simulations = conjugate(NUM_REPLICATES, 1)
    draws = torch.randn(50, NUM_REPLICATES, 1, generator=torch.Generator().manual_seed(1))
    assert SBC.from_draws(draws, simulations.parameters["mu"]).passes()


def test_batches_cover_all_simulations() -> None:
    posterior, simulations = Posterior(scale=0.0), conjugate(25, 2)
    result = sbc(posterior, simulations, num_draws=7, batch_size=10)
    assert posterior.batch_sizes == [10, 10, 5]
    expected = 7 * (simulations.observations["y"] / 2 < simulations.parameters["mu"]).long()
    assert torch.equal(result.ranks, expected)


def test_names_of_entries() -> None:
    simulations = SimpleNamespace(
        parameters={"a": torch.zeros(12), "b": torch.zeros(12, 2), "c": torch.zeros(12, 1, 2)},
        observations={},
    )
    posterior = SimpleNamespace(
        sample=lambda num_draws, x: {
            name: torch.ones(num_draws, *value.shape)
            for name, value in simulations.parameters.items()
        }
    )
    result = sbc(posterior, simulations, num_draws=3)
    assert result.names == ("a", "b[0]", "b[1]", "c[0, 0]", "c[0, 1]")
    assert torch.equal(result.ranks, torch.zeros(12, 5, dtype=torch.int64))
    assert SBC.from_draws(torch.ones(3, 12, 2), torch.zeros(12, 2)).names == (
        "theta[0]",
        "theta[1]",
    )


def test_is_reproducible_and_leaves_the_random_state_alone() -> None:
    simulations = conjugate(20, 2)
    state = torch.get_rng_state()
    first = sbc(Posterior(), simulations, num_draws=50, seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(7)
    assert torch.equal(sbc(Posterior(), simulations, num_draws=50, seed=3).ranks, first.ranks)
    assert not torch.equal(sbc(Posterior(), simulations, num_draws=50, seed=4).ranks, first.ranks)


def test_ranks_count_draws_below() -> None:
    draws = torch.arange(5.0).reshape(5, 1, 1, 1).expand(5, 2, 1, 3)
    truth = torch.tensor([[[-1.0, 0.5, 1.5]], [[2.5, 3.5, 9.0]]])
    assert ranks(draws, truth).tolist() == [[[0, 1, 2]], [[3, 4, 5]]]
    assert ranks(draws.double(), truth).tolist() == [[[0, 1, 2]], [[3, 4, 5]]]
    assert ranks(torch.tensor([[1.0]]), torch.tensor([math.inf])).tolist() == [1]


def test_ties_are_broken_evenly() -> None:
    """Fails by chance once in 1 000 runs with a fresh seed."""
    draws = torch.tensor([0, 1, 1, 1, 2]).unsqueeze(-1).expand(5, 10_000)
    answer = ranks(draws, torch.ones(10_000))
    counts = answer.bincount(minlength=6)
    assert counts[[0, 5]].tolist() == [0, 0]
    assert chisquare(counts[1:5].numpy()).pvalue > 1e-3
    assert torch.equal(answer, ranks(draws, torch.ones(10_000)))
    assert not torch.equal(answer, ranks(draws, torch.ones(10_000), seed=1))


def test_chi_square_of_a_histogram() -> None:
    # 2 * 100**0.4 = 12.6 bins: 13 for the ranks 0 to 12, one each.
    uniform = torch.randint(13, (100, 1), generator=torch.Generator().manual_seed(0))
    expected = chisquare(uniform.flatten().bincount(minlength=13).numpy()).pvalue
    p_value = SBC(uniform, 12, ("a",)).chi_square_p_values
    assert p_value.tolist() == pytest.approx([expected])
    # Five ranks in two bins of three and two.
    p_value = SBC(torch.tensor([0] * 7 + [4] * 3).unsqueeze(-1), 4, ("a",)).chi_square_p_values
    assert p_value.tolist() == pytest.approx([chisquare([7, 3], [4, 6]).pvalue])


def test_pit_values_are_symmetric_midpoints() -> None:
    result = SBC(torch.arange(11).unsqueeze(-1), 10, ("a",))
    assert result.pit[[0, 5, 10], 0].tolist() == pytest.approx([0.5 / 11, 0.5, 10.5 / 11])


def test_ecdf_and_repr() -> None:
    result = SBC(torch.arange(100).unsqueeze(-1), 99, ("mu",))
    levels, difference, lower, upper = result.ecdf(0.9)
    assert difference.shape == (99, 1)
    assert difference.abs().max() < 1e-12
    assert (lower < 0).all()
    assert (upper > 0).all()
    assert levels[0].item() == pytest.approx(0.01)
    assert repr(result) == "SBC(100 replicates x 99 draws, p-values mu: 1)"


@pytest.mark.parametrize(
    ("draws", "truth", "message"),
    [
        (torch.zeros(3, 4), torch.zeros(5), r"draws must have shape \(L, 5"),
        (torch.zeros(3, 5, 1), torch.zeros(5), r"draws must have shape .* got \(3, 5, 1\)"),
        (torch.zeros(0, 5), torch.zeros(5), "draws must have shape"),
        (torch.zeros(3, 0), torch.zeros(0), "truth must have shape"),
        (torch.full((3, 5), math.nan), torch.zeros(5), "draws must not hold NaN, got 15 in 15"),
        (torch.zeros(3, 5), torch.full((5,), math.nan), "truth must not hold NaN"),
    ],
)
def test_ranks_reject_bad_tensors(draws: Tensor, truth: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ranks(draws, truth)


def test_ranks_reject_other_types() -> None:
    with pytest.raises(TypeError, match=r"draws must be a torch.Tensor, got list"):
        ranks([[1.0]], torch.zeros(1))


def test_results_reject_bad_ranks() -> None:
    good = torch.zeros(10, 2, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"ranks must have shape \(N, D\), got \(10,\)"):
        SBC(good[:, 0], 5, ("a",))
    with pytest.raises(ValueError, match="names must be as many as parameters, 2, got 1"):
        SBC(good, 5, ("a",))
    with pytest.raises(ValueError, match="at least 10 replicates, got 9"):
        SBC(good[:9], 5, ("a", "b"))


def test_sbc_rejects_bad_simulations() -> None:
    mu, y = torch.zeros(10), torch.zeros(9)
    with pytest.raises(ValueError, match="at least one parameter site"):
        sbc(Posterior(), SimpleNamespace(parameters={}, observations={"y": y}))
    with pytest.raises(ValueError, match=r"observations\['y'\] must have 10 rows"):
        sbc(Posterior(), SimpleNamespace(parameters={"mu": mu}, observations={"y": y}))
    with pytest.raises(ValueError, match=r"parameters\['b'\] must have shape \(10, ...\)"):
        sbc(Posterior(), SimpleNamespace(parameters={"a": mu, "b": y}, observations={}))
    with pytest.raises(ValueError, match="num_draws and batch_size must be at least 1"):
        sbc(Posterior(), conjugate(10), num_draws=0)


def test_sbc_rejects_bad_draws() -> None:
    simulations = conjugate(10, 2)

    def answering(**draws: Tensor) -> SimpleNamespace:
        return SimpleNamespace(sample=lambda num_draws, x: draws)

    with pytest.raises(ValueError, match=r"must draw site 'mu', it draws \['nu'\]"):
        sbc(answering(nu=torch.zeros(5, 10, 2)), simulations, num_draws=5)
    with pytest.raises(ValueError, match=r"draws of site 'mu' must have shape \(5, 10, 2"):
        sbc(answering(mu=torch.zeros(4, 10, 2)), simulations, num_draws=5)
