"""Augmentation: pairs from a learned likelihood, used where they help."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyroflows.distributions.maximum_likelihood import Settings, maximize_likelihood
from pyroflows.sbi import (
    FlowMatching,
    NeuralLikelihood,
    NeuralPosterior,
    Posterior,
    Simulations,
    simulate,
)
from pyroflows.sbi.estimators import augmentation, estimator, neural_likelihood
from pyroflows.sbi.estimators.augmentation import can_augment, draw_pairs
from pyroflows.sbi.estimators.estimator import augmented_steps, default_steps
from pyroflows.sbi.estimators.pairs import pairs
from pyroflows.sbi.model.observations import ObservationSpace
from tests.simulators import conjugate

SMALL: dict[str, Any] = {"width": 32, "num_blocks": 2}


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


def test_training_that_memorises_is_done_again_with_more(tmp_path: Path) -> None:
    """The density of fresh parameters rises, by three standard errors at least."""
    simulations, fresh = (
        simulate(bent, n, seed=seed, progress=False) for n, seed in ((300, 0), (2000, 1))
    )
    learner = NeuralPosterior(bent, flow="maf", num_layers=2)
    z, x = pairs(fresh, learner.space, learner.observations)
    scores = {}
    for augment in (False, True):
        posterior = learner.fit(simulations, num_steps=600, augment=augment, progress=False)
        scores[augment] = posterior.density.log_prob(z, x)
    assert posterior.about["num_pairs"] > 1000
    gain = scores[True] - scores[False]
    assert gain.mean() > 3 * gain.std() / len(gain) ** 0.5
    posterior.save(tmp_path / "posterior.safetensors")
    loaded = learner.load(tmp_path / "posterior.safetensors")
    torch.testing.assert_close(loaded.density.log_prob(z, x), scores[True])


def test_training_stops_once_it_has_memorised(monkeypatch: pytest.MonkeyPatch) -> None:
    """After a tenth of its steps without gain, rounded up to a validation; not the second one."""
    runs = []

    def spy(density: Any, training: Any, validation: Any, settings: Any, *args: Any, **kw: Any):
        fit = maximize_likelihood(density, training, validation, settings, *args, **kw)
        runs.append((settings, fit))
        return fit

    monkeypatch.setattr(estimator, "maximize_likelihood", spy)
    monkeypatch.setattr(augmentation, "NUM_PAIRS", 1000)
    learner = NeuralPosterior(bent, flow="maf", num_layers=1)
    simulations = simulate(bent, 200, progress=False)
    learner.fit(simulations, num_steps=400, learning_rate=1e-2, progress=False)
    (_, first), (settings, _) = runs
    assert 40 <= len(first.losses) - first.best_step < 40 + 50
    assert len(first.losses) < 400
    assert (settings.num_steps, settings.patience) == (800, None)
    learner.fit(simulations, num_steps=5, patience=3, progress=False)
    assert runs[2][0].patience == 3


@pytest.fixture
def always(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Augment whatever the training says, with pairs enough for a test."""
    monkeypatch.setattr(estimator, "has_memorised", lambda *_: True)
    monkeypatch.setattr(augmentation, "NUM_PAIRS", 1000)
    return monkeypatch


def fit_bent(**settings: Any) -> Posterior:
    return FlowMatching(bent, **SMALL).fit(
        num_simulations=200, num_steps=100, progress=False, **settings
    )


def density_at_zero(posterior: Posterior) -> torch.Tensor:
    return posterior.log_prob({"theta": torch.zeros(2)}, x=torch.zeros(2))


def interrupt(monkeypatch: pytest.MonkeyPatch, module: Any, after: int) -> None:
    """Interrupt the training in a module after so many evaluations of its density."""
    score, calls = module._Trained.score, []

    def interrupted(self: Any, *args: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        if len(calls) > after:
            raise KeyboardInterrupt
        return score(self, *args)

    monkeypatch.setattr(module._Trained, "score", interrupted)


@pytest.mark.filterwarnings("ignore:interrupted. the density")
def test_an_interrupt_of_the_likelihood_keeps_the_posterior(
    always: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """And the training goes on from its files to the same posterior as without an interrupt."""
    whole = fit_bent()
    with always.context() as patch:
        interrupt(patch, neural_likelihood, after=60)
        with pytest.warns(UserWarning, match="simulations alone.*interrupted"):
            posterior = fit_bent(checkpoint=tmp_path / "training")
    assert posterior.fit is not None
    assert posterior.fit.interrupted
    assert posterior.about["num_pairs"] == 180
    assert torch.equal(density_at_zero(posterior), density_at_zero(fit_bent(augment=False)))
    again = fit_bent(checkpoint=tmp_path / "training")
    assert again.about["num_pairs"] == whole.about["num_pairs"] == 1180
    torch.testing.assert_close(density_at_zero(again), density_at_zero(whole))


def test_an_interrupt_of_the_last_training_keeps_the_better(
    always: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    whole = fit_bent()
    with always.context() as patch:

        def drawn(*args: Any) -> tuple[torch.Tensor, torch.Tensor]:
            interrupt(patch, estimator, after=10)
            return draw_pairs(*args)

        patch.setattr(estimator, "draw_pairs", drawn)
        with pytest.warns(UserWarning, match="interrupted"):
            posterior = fit_bent(checkpoint=tmp_path / "training")
    assert posterior.fit is not None
    assert posterior.fit.interrupted
    assert torch.equal(density_at_zero(posterior), density_at_zero(fit_bent(augment=False)))
    again = fit_bent(checkpoint=tmp_path / "training")
    torch.testing.assert_close(density_at_zero(again), density_at_zero(whole))


@pytest.mark.usefixtures("always")
def test_what_has_no_likelihood_keeps_its_posterior() -> None:
    """An entry that never varies has no density."""

    def half_constant() -> None:
        theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
        x = pyro.sample("noisy", dist.Normal(theta, 1.0))
        pyro.deterministic("x", torch.stack([x, torch.ones_like(x)], -1), event_dim=1)

    learner = FlowMatching(half_constant, parameters=["theta"], **SMALL)
    with pytest.warns(UserWarning, match="simulations alone.*vary in every column"):
        posterior = learner.fit(num_simulations=200, num_steps=50, progress=False)
    draws = posterior.sample(10, x=torch.tensor([0.0, 1.0]))["theta"]
    assert bool(draws.isfinite().all())


def test_a_training_that_fails_keeps_the_posterior(always: pytest.MonkeyPatch) -> None:
    def failing(*_: Any) -> None:
        raise FloatingPointError("the loss is not finite")

    always.setattr(neural_likelihood._Trained, "score", failing)
    always.setattr("pyroflows.distributions.maximum_likelihood.training.MAX_RECOVERIES", 0)
    with pytest.warns(UserWarning, match="simulations alone.*the loss is not finite"):
        posterior = fit_bent()
    assert torch.equal(density_at_zero(posterior), density_at_zero(fit_bent(augment=False)))


@pytest.mark.usefixtures("always")
def test_large_observations_with_shared_noise_are_not_augmented() -> None:
    def shared() -> None:
        theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
        common = pyro.sample("common", dist.Normal(0.0, 1.0))
        with pyro.plate("points", 65):
            pyro.sample("x", dist.Normal(theta + common, 1.0))

    learner = FlowMatching(shared, parameters=["theta"], **SMALL)
    with pytest.warns(UserWarning, match="simulations alone.*65 entries"):
        learner.fit(num_simulations=150, num_steps=50, progress=False)


@pytest.mark.usefixtures("always")
def test_simulators_in_double_precision_are_augmented() -> None:
    def double() -> None:
        zero = torch.zeros((), dtype=torch.float64)
        theta = pyro.sample("theta", dist.Normal(zero, 1.0))
        pyro.sample("x", dist.Normal(theta, 1.0))

    posterior = FlowMatching(double, **SMALL).fit(num_simulations=200, num_steps=50, progress=False)
    assert posterior.sample(10, x=torch.tensor(1.0))["theta"].dtype == torch.float32
    model = NeuralLikelihood(double, num_flows=1, num_layers=2).fit(
        num_simulations=200, num_steps=20, progress=False
    )
    trace = pyro.poutine.trace(model).get_trace(torch.tensor(1.0, dtype=torch.float64))
    assert trace.log_prob_sum().isfinite()
    z, x = draw_pairs(model, torch.Size([1]), seed=0)
    assert z.dtype == x.dtype == torch.float32


def test_draws_of_the_prior_may_be_fewer_than_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    model = NeuralLikelihood(bent, num_flows=1, num_layers=2).fit(
        num_simulations=200, num_steps=20, progress=False
    )
    monkeypatch.setattr(model, "prior_draws", lambda num_draws, seed: torch.zeros(7, 2))
    z, x = draw_pairs(model, torch.Size([2]), seed=0)
    assert z.shape == x.shape == (7, 2)


def test_only_small_complete_observations_are_augmented() -> None:
    """And only draws from the whole prior: what was left out would come back."""
    vector = ObservationSpace({"x": torch.Size([8])})
    draws = {"theta": torch.zeros(2)}, {"x": torch.zeros(2, 8)}
    simulations = Simulations(*draws)
    assert can_augment(vector, simulations)
    assert not can_augment(vector, Simulations(*draws, num_invalid=1))
    for other in (
        ObservationSpace({"x": torch.Size([1000])}),
        ObservationSpace({"x": torch.Size([8])}, missing="random"),
        ObservationSpace({"x": torch.Size([8]), "y": torch.Size([8])}),
    ):
        assert not can_augment(other, simulations)


@pytest.mark.parametrize(
    ("num_simulations", "steps", "augmented"),
    [(100, 6000, 12_000), (10_000, 6000, 12_000), (320_000, 96_000, 67_882)],
)
def test_more_simulations_take_more_steps(num_simulations: int, steps: int, augmented: int) -> None:
    assert default_steps(num_simulations) == steps
    settings = Settings(steps, 512, 1e-3, 0.0, 0.1, None, True, 0)
    assert augmented_steps(settings, num_simulations) == augmented
    assert augmented_steps(replace(settings, num_steps=50), num_simulations) == 100
