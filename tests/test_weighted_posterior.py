"""What importance weights say of the draws that carry them."""

import math

import pytest
import torch
from torch import Tensor

from pyroflows.diagnostics import effective_sample_size, log_evidence, psis
from pyroflows.svi.weighted_posterior import WeightedPosterior


class Plain(WeightedPosterior):
    """A posterior of one number."""

    @property
    def verdict(self) -> str:
        return "close" if self.is_close else "reliable" if self.is_reliable else "bad"

    def site_values(self, z: Tensor) -> dict[str, Tensor]:
        return {"x": z[:, 0]}


def weighted(log_weights: Tensor, **options: int) -> Plain:
    draws = torch.linspace(0, 1, len(log_weights)).unsqueeze(-1)
    return Plain(draws, log_weights, torch.zeros_like(log_weights), **options)


def pareto(shape: float, size: int = 1000) -> Tensor:
    """Return log-weights at the quantiles of a Pareto distribution."""
    return -shape * ((torch.arange(size, dtype=torch.float64) + 0.5) / size).log()


def test_numbers_are_those_of_the_diagnostics() -> None:
    log_weights = pareto(0.3)
    posterior = weighted(log_weights)
    smoothed, khat = psis(log_weights)
    value, error = log_evidence(log_weights)
    assert posterior.scalars() == {
        "elbo": log_weights.mean().item(),
        "elbo_standard_error": pytest.approx(log_weights.std().item() / math.sqrt(1000)),
        "khat": khat,
        "ess": effective_sample_size(smoothed),
        "log_evidence": value,
        "log_evidence_standard_error": error,
    }
    assert torch.equal(posterior.log_weights_psis, smoothed)


@pytest.mark.parametrize(
    ("shape", "verdict"), [(0.1, "close"), (0.4, "close"), (0.6, "reliable"), (1.0, "bad")]
)
def test_trust_follows_the_tail(shape: float, verdict: str) -> None:
    """At Pareto quantiles k-hat is the shape, but for a prior worth 10 of 95 draws in the tail."""
    posterior = weighted(pareto(shape))
    assert posterior.khat == pytest.approx(shape, abs=0.1)
    assert posterior.verdict == verdict


def test_nearly_equal_weights_are_trusted_whatever_their_tail() -> None:
    log_weights = torch.zeros(1000, dtype=torch.float64)
    log_weights[:100] = 0.01 * pareto(1.0, 100).exp() / 200
    posterior = weighted(log_weights)
    assert posterior.khat > 0.7
    assert posterior.is_close
    assert posterior.is_reliable
    assert weighted(60 * log_weights).is_close  # the largest is 1.8 times the average
    assert not weighted(80 * log_weights).is_reliable  # 2.2 times


def test_bounded_weights_that_differ_are_not_nearly_equal() -> None:
    """Half of the draws count three times as much as the others: 1.5 times the average."""
    log_weights = math.log(3) * (torch.arange(1000) % 2).double()
    posterior = weighted(log_weights)
    posterior.khat = 1.0
    assert posterior.ess == pytest.approx(800)
    assert not posterior.is_reliable


def test_too_few_draws_have_no_weights() -> None:
    posterior = weighted(pareto(0.3), min_weighted_draws=1001)
    assert not posterior.is_weighted
    assert not posterior.is_close
    assert not posterior.is_reliable
    assert posterior.elbo == weighted(pareto(0.3), min_weighted_draws=1000).elbo
    assert math.isnan(posterior.khat)
    assert posterior.to_frame()["log_weight_psis"].isna().all()
    assert posterior.summary()["weighted_mean"].isna().all()


def test_tables_hold_draws_weights_and_the_verdict() -> None:
    posterior = weighted(pareto(0.3))
    weights = posterior.log_weights_psis.exp()
    table = posterior.summary()
    expected = (weights * posterior.draws[:, 0]).sum().item()
    assert table.loc["x", "weighted_mean"] == pytest.approx(expected, abs=1e-6)
    assert table.attrs == {**posterior.scalars(), "verdict": "close"}
    assert list(posterior.to_frame().columns) == ["x", "log_weight_psis"]
