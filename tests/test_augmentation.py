"""Augmentation: pairs from a learned likelihood, used where they help."""

from pathlib import Path

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyroflows.sbi import FlowMatching, NeuralLikelihood, NeuralPosterior, simulate
from pyroflows.sbi.estimators.augmentation import can_augment, draw_pairs
from pyroflows.sbi.model.observations import ObservationSpace
from tests.simulators import conjugate

SMALL = {"width": 32, "num_blocks": 2}


def bent() -> None:
    """Draw from a model that is far from linear, with noise that depends on the parameter."""
    theta = pyro.sample("theta", dist.Uniform(-1.0, 1.0).expand([2]).to_event(1))
    first, second = theta.unbind(-1)
    loc = torch.stack([first, second - 2 * first.square()], -1)
    scale = 0.1 + 0.4 * second.abs().unsqueeze(-1)
    pyro.sample("x", dist.Normal(loc, scale).to_event(1))


def test_pairs_follow_prior_and_likelihood() -> None:
    """Moments of 100 000 pairs: five standard errors, and what 2000 simulations leave open."""
    estimator = NeuralLikelihood(conjugate, num_flows=1, num_layers=2)
    model = estimator.fit(num_simulations=2000, num_steps=300, progress=False)
    z, x = draw_pairs(model, torch.Size([3, 1]), seed=0)
    assert x.shape == (len(z), 3, 1)
    assert z.std().item() == pytest.approx(1.0, abs=0.02)
    noise = x.squeeze(-1) - z
    assert noise.mean().item() == pytest.approx(0.0, abs=0.1)
    assert noise.std().item() == pytest.approx(1.0, abs=0.05)
    # Points are independent given the parameter.
    assert torch.corrcoef(noise.T).sub(torch.eye(3)).abs().max() < 0.05


def test_pairs_are_reproducible_and_leave_the_random_state_alone() -> None:
    model = NeuralLikelihood(bent, num_flows=1, num_layers=2).fit(
        num_simulations=200, num_steps=20, progress=False
    )
    state = torch.get_rng_state()
    one, other = (draw_pairs(model, torch.Size([2]), seed=3) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("estimator", [FlowMatching, NeuralPosterior])
def test_training_that_memorises_is_done_again_with_more(estimator: type, tmp_path: Path) -> None:
    """The density of fresh parameters rises, by three standard errors at least."""
    options = SMALL if estimator is FlowMatching else {"flow": "maf", "num_layers": 2}
    simulations, fresh = (
        simulate(bent, n, seed=seed, progress=False) for n, seed in ((300, 0), (2000, 1))
    )
    scores = {}
    for augment in (False, True):
        learner = estimator(bent, **options)
        posterior = learner.fit(simulations, num_steps=600, augment=augment, progress=False)
        x = fresh.observations["x"]
        scores[augment] = posterior.log_prob(fresh.parameters, x=x)
    assert posterior.about["num_pairs"] > 1000
    gain = scores[True] - scores[False]
    assert gain.mean() > 3 * gain.std() / len(gain) ** 0.5
    posterior.save(tmp_path / "posterior.safetensors")
    loaded = learner.load(tmp_path / "posterior.safetensors")
    torch.testing.assert_close(
        loaded.log_prob(fresh.parameters, x=x), posterior.log_prob(fresh.parameters, x=x)
    )


def test_only_small_complete_observations_are_augmented() -> None:
    assert can_augment(ObservationSpace({"x": torch.Size([8])}))
    assert not can_augment(ObservationSpace({"x": torch.Size([1000])}))
    assert not can_augment(ObservationSpace({"x": torch.Size([8])}, missing="random"))
    assert not can_augment(ObservationSpace({"x": torch.Size([8]), "y": torch.Size([8])}))
