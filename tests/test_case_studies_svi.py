"""The case studies of variational inference with exact answers: these answers, and runs."""

import json
import math
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import arviz as az
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from case_studies import mixture, regression


def log_prob_sum(model, values: dict[str, Tensor], *args: Tensor) -> float:
    """Return the log-density of a model at given values of its latent sites."""
    return pyro.poutine.trace(pyro.condition(model, values)).get_trace(*args).log_prob_sum().item()


# Regression


def hyperparameters(num_draws: int) -> tuple[Tensor, Tensor]:
    """Return some factors ``(S, 2, 2)`` and noises ``(S, 3)``."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        correlation = dist.LKJCholesky(2, torch.tensor(2.0).double()).sample((num_draws,))
        scales = torch.rand(num_draws, 2, 1).double() + 0.1
        return scales * correlation, torch.rand(num_draws, 3).double() + 0.1


def test_lines_are_integrated_as_a_normal_distribution_of_all_flowers():
    """All widths are jointly normal: their covariance is that of means, lines and noise."""
    data = regression.load_data()
    factors, noises = hyperparameters(4)
    found, mean = regression.collapse(regression.least_squares(data), factors, noises)
    length, width, species = data
    design = torch.stack([torch.ones_like(length), length], -1).double()
    same = species.unsqueeze(-1) == species
    for i, (factor, noise) in enumerate(zip(factors, noises, strict=True)):
        shared = design @ design.T
        covariance = shared + same * (design @ factor @ factor.T @ design.T)
        covariance = covariance + noise[species].square().diag()
        normal = dist.MultivariateNormal(torch.zeros(150).double(), covariance)
        assert found[i].item() == pytest.approx(normal.log_prob(width.double()).item(), abs=1e-6)
        expected = design.T @ torch.linalg.solve(covariance, width.double())
        torch.testing.assert_close(mean.loc[i], expected, rtol=1e-6, atol=1e-8)


def test_the_regression_is_the_same_however_written():
    """Lines made from raw numbers have a density lower by the determinant of the factor."""
    data = regression.load_data()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        mean, scales, raw = torch.randn(2), torch.rand(2) + 0.1, torch.randn(3, 2)
        correlation, noise = dist.LKJCholesky(2, torch.tensor(2.0)).sample(), torch.rand(3) + 0.1
    shared = {"mean": mean, "scales": scales, "correlation": correlation, "noise": noise}
    factor = scales.unsqueeze(-1) * correlation
    centred = log_prob_sum(regression.centred, {**shared, "lines": mean + raw @ factor.T}, *data)
    other = log_prob_sum(regression.non_centred, {**shared, "raw": raw}, *data)
    assert centred + 3 * factor.logdet().item() == pytest.approx(other, rel=1e-4)


def test_the_evidence_of_the_regression_does_not_hang_on_the_seed():
    """The difference of two estimates is within 4.5 standard errors but once in 100 000."""
    data = regression.load_data()
    one, other = (regression.integrate(data, 50_000, seed) for seed in (1, 2))
    error = math.hypot(one.standard_error, other.standard_error)
    assert error < 0.05
    assert abs(one.log_evidence - other.log_evidence) < 4.5 * error


# Mixture


def test_the_grid_of_the_mixture_agrees_with_draws_from_the_prior():
    """Two points, so that the prior is a fair proposal; five standard errors."""
    y = torch.tensor([0.3, -1.1])
    exact = mixture.exact_log_evidence(y, bound=40.0, cells=160)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        means = mixture.PRIOR_SCALE * torch.randn(200_000, 1, 3).double()
    density = dist.Normal(means, 1.0).log_prob(y.unsqueeze(-1)).exp().mean(-1).prod(-1)
    error = density.std() / density.mean() / len(density) ** 0.5
    assert error < 0.01
    assert exact == pytest.approx(density.mean().log().item(), abs=5 * error.item())


def test_the_grid_of_the_mixture_is_fine_and_wide_enough():
    y = mixture.observe()
    exact = mixture.exact_log_evidence(y)
    assert mixture.exact_log_evidence(y, cells=80) == pytest.approx(exact, abs=1e-4)
    assert mixture.exact_log_evidence(y, bound=12.0, cells=150) == pytest.approx(exact, abs=1e-4)


def test_the_ordered_mixture_has_the_same_density_and_no_other_labelling():
    y, means = mixture.observe(), torch.tensor([-1.0, 0.5, 2.0])
    expected = log_prob_sum(mixture.unordered, {"means": means}, y)
    assert log_prob_sum(mixture.ordered, {"means": means}, y) == pytest.approx(expected, rel=1e-5)
    swapped = log_prob_sum(mixture.unordered, {"means": means[[2, 0, 1]]}, y)
    assert swapped == pytest.approx(expected, rel=1e-5)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        draws = pyro.poutine.trace(mixture.ordered).get_trace(y).nodes["means"]["value"]
    assert all(low < high for low, high in pairwise(draws.tolist()))


def test_labellings_are_counted():
    ascending = torch.tensor([[-1.0, 0.0, 1.0]]).expand(60_000, 3)
    assert mixture.shares(ascending) == [1.0, 0, 0, 0, 0, 0]
    shares = mixture.shares(mixture.relabel(ascending))
    assert sum(shares) == pytest.approx(1.0)
    assert shares == pytest.approx([1 / 6] * 6, abs=0.01)  # six standard errors


# Runs


def run(name: str, out: Path) -> dict:
    """Run a case study in fast mode; return its metrics."""
    command = [sys.executable, "-m", f"case_studies.{name}", "--fast", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for picture in out.glob("*.png"):
        assert picture.stat().st_size > 5000
    return json.loads((out / "metrics.json").read_text())


@pytest.mark.slow
def test_regression_in_fast_mode(tmp_path):
    metrics = run("regression", tmp_path)
    assert len(metrics["fits"]) == 4
    normal, spline = (
        metrics["fits"][f"centred, {guide}"] for guide in ("full-rank normal", "spline")
    )
    assert 0 < spline["gap"] < normal["gap"] < 2
    assert abs(spline["error of log evidence"]) < 0.3
    assert spline["weighted error of means"] < 0.5
    assert min(metrics["predictive p-values"].values()) > 0.01
    assert {path.name for path in tmp_path.glob("*.png")} == {"posteriors.png", "predictions.png"}
    data = az.from_netcdf(tmp_path / "regression.nc")
    assert data.posterior["lines"].dims[:3] == ("chain", "draw", "species")


@pytest.mark.slow
def test_mixture_in_fast_mode(tmp_path):
    metrics = run("mixture", tmp_path)
    fits = metrics["fits"]
    assert abs(fits["ordered"]["error of log evidence"]) < 0.1
    assert fits["ordered"]["share of a < b < c"] == 1
    # A guide in one mode of six falls short by log 6.
    assert fits["plain 1"]["gap"] > 0.5
    assert fits["cooled 1"]["gap"] < 0.5 * fits["plain 1"]["gap"]
    assert metrics["largest R-hat"]["plain"] > 1.05
    assert (tmp_path / "modes.png").exists()
    assert az.from_netcdf(tmp_path / "mixture.nc").posterior["means"].shape[0] == 2
