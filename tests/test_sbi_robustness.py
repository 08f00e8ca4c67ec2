"""Estimators and posteriors where something unusual comes: other files, dtypes, interrupts."""

from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch

from pyroflows.sbi import FlowMatching, JointFlowMatching, NeuralLikelihood, SeriesEmbedding, refine
from pyroflows.sbi.densities.coupling import optimal_transport
from pyroflows.sbi.densities.velocity_density import VelocityDensity
from pyroflows.sbi.estimators import estimator
from pyroflows.sbi.posteriors.mode import climb

SHORT: dict[str, Any] = {"num_steps": 50, "progress": False, "augment": False}
SMALL: dict[str, Any] = {"width": 16, "num_blocks": 1}


def normal() -> None:
    theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
    pyro.sample("x", dist.Normal(theta, 1.0).expand([2]).to_event(1))


def with_gaps() -> None:
    """Draw an observation whose second entry is missing half of the time."""
    theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
    noise = pyro.sample("noise", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
    gap = torch.where(noise[..., 1:] > 0, torch.nan, theta.unsqueeze(-1) + noise[..., 1:])
    x = torch.cat([theta.unsqueeze(-1) + noise[..., :1], gap], -1)
    pyro.deterministic("x", x, event_dim=1)


def test_rounds_go_on_from_their_checkpoints(tmp_path: Path) -> None:
    def run() -> torch.Tensor:
        posterior = refine(
            FlowMatching(normal, **SMALL),
            torch.zeros(2),
            num_simulations=200,
            checkpoint=tmp_path / "training",
            **SHORT,
        )
        return posterior.sample(10, x=torch.zeros(2), seed=0)["theta"]

    first = run()
    assert {path.name for path in tmp_path.iterdir()} == {"training", "training.1"}
    torch.testing.assert_close(run(), first)


@pytest.mark.filterwarnings("ignore:interrupted")
def test_no_round_follows_one_that_was_interrupted(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(estimator._Trained, "score", interrupted)
    posterior = refine(
        FlowMatching(normal, **SMALL), torch.zeros(2), num_simulations=200, num_rounds=3, **SHORT
    )
    assert posterior.about["num_simulations"] == 200


def test_rounds_keep_simulations_with_missing_entries() -> None:
    learner = FlowMatching(with_gaps, parameters=["theta"], missing="simulated", **SMALL)
    x = torch.tensor([0.0, torch.nan])
    posterior = refine(learner, x, num_simulations=200, num_rounds=1, **SHORT)
    assert posterior.about["num_simulations"] == 200


def test_files_of_other_networks_are_refused(tmp_path: Path) -> None:
    """Loading draws initial weights, but not from the global random state."""
    learner = FlowMatching(normal, **SMALL)
    learner.fit(num_simulations=200, **SHORT).save(tmp_path / "posterior")
    state = torch.get_rng_state()
    learner.load(tmp_path / "posterior")
    assert torch.equal(torch.get_rng_state(), state)
    other = FlowMatching(normal, embedding=SeriesEmbedding((2, 1)), **SMALL)
    with pytest.raises(ValueError, match=r"posterior.*estimator of other networks"):
        other.load(tmp_path / "posterior")


@pytest.mark.parametrize("estimator_class", [FlowMatching, NeuralLikelihood])
def test_files_of_other_priors_are_refused(estimator_class: type, tmp_path: Path) -> None:
    """The shapes agree, the bounds do not: draws would be in the wrong place."""

    def narrow() -> None:
        theta = pyro.sample("theta", dist.Uniform(0.0, 1.0))
        pyro.sample("x", dist.Normal(theta, 1.0).expand([2]).to_event(1))

    def wide() -> None:
        theta = pyro.sample("theta", dist.Uniform(0.0, 2.0))
        pyro.sample("x", dist.Normal(theta, 1.0).expand([2]).to_event(1))

    path = tmp_path / "trained.safetensors"
    trained = estimator_class(narrow).fit(num_simulations=200, num_steps=2, progress=False)
    trained.save(path)
    estimator_class(narrow).load(path)
    with pytest.raises(ValueError, match="belongs to another estimator, of parameters"):
        estimator_class(wide).load(path)


@pytest.mark.filterwarnings("ignore:The learned posterior misses:UserWarning")  # few steps
def test_arrays_can_be_corrected() -> None:
    posterior = FlowMatching(normal, **SMALL).fit(num_simulations=500, **SHORT)
    one, other = (
        posterior.correct(x=x, num_samples=200) for x in (torch.zeros(2), np.zeros(2, np.float32))
    )
    assert one.log_evidence == other.log_evidence


def test_wrong_options_of_a_likelihood_are_refused_before_simulating() -> None:
    runs = 0

    def counted() -> None:
        nonlocal runs
        runs += 1
        normal()

    learner = NeuralLikelihood(counted, flow="nothing")
    before = runs
    with pytest.raises(ValueError, match="nothing"):
        learner.fit(num_simulations=1000, progress=False)
    assert runs == before


def test_transport_of_numbers_that_are_not_finite_can_be_recovered_from() -> None:
    """Training goes back a few steps at a ``FloatingPointError``."""
    rows = torch.zeros(4, 2)
    with pytest.raises(FloatingPointError, match="not finite"):
        optimal_transport(rows, rows, rows.fill_(torch.nan), 1.0)


def test_errors_of_a_joint_solver_are_those_of_what_is_free() -> None:
    """Both entries of ``x`` are given: a third of the vector is free."""
    posterior = JointFlowMatching(normal, num_steps=1, **SMALL).fit(num_simulations=200, **SHORT)
    x = torch.zeros(2)
    error = posterior.solver_error(x=x, num_samples=50)
    torch.manual_seed(0)
    density, condition = posterior.density, torch.tensor([torch.nan, 0.0, 0.0])
    diluted = VelocityDensity.solver_error(density, 50, condition)
    assert error.mean == pytest.approx(3 * diluted.mean)
    assert error.mean > 0
    with pytest.raises(ValueError, match="num_samples must be at least 2, got 1"):
        posterior.solver_error(x=x, num_samples=1)


def test_modes_are_found_among_densities_that_are_not_finite() -> None:
    """One start that is NaN must not stop the climbs of the others."""

    def log_prob(z: torch.Tensor) -> torch.Tensor:
        height = -(z - 1).square().sum(-1)
        return height.masked_fill(z[..., 0] < -2, torch.nan)

    draws = torch.randn(500, 3, 2, generator=torch.Generator().manual_seed(0))
    assert bool(log_prob(draws).isnan().any())
    mode = climb(log_prob, draws, log_prob(draws), 3)
    torch.testing.assert_close(mode, torch.ones(3, 2), atol=1e-2, rtol=0)


def test_modes_of_parameters_that_determine_each_other_are_found() -> None:
    draws = torch.randn(500, 1, generator=torch.Generator().manual_seed(0)).expand(500, 50)
    directions = torch.linspace(1.0, 100.0, 50)

    def log_prob(z: torch.Tensor) -> torch.Tensor:
        return -(z / directions).mean(-1).sub(0.5).square()

    mode = climb(log_prob, draws * directions, log_prob(draws * directions), 3)
    torch.testing.assert_close((mode / directions).mean(), torch.tensor(0.5), atol=1e-2, rtol=0)
