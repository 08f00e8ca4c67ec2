"""Posteriors refined for one observation: better at equal budget, right, and for it alone."""

import warnings
from functools import cache
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from pyroflows.sbi import FlowMatching, NeuralPosterior, Posterior, refine
from pyroflows.sbi.estimators.sequential import _draw_prior, _Region
from tests.simulators import conjugate
from tests.test_augmentation import interrupt

X = torch.tensor([2.0, 3.0])
SETTINGS = {"num_steps": 400, "progress": False}


def peaked() -> None:
    """Draw from a model whose posterior is a millionth of its prior."""
    theta = pyro.sample("theta", dist.Uniform(-10.0, 10.0).expand([2]).to_event(1))
    bent = torch.stack([theta[..., 0] + 0.05 * theta[..., 1].square(), theta[..., 1]], -1)
    pyro.sample("x", dist.Normal(bent, 0.1).to_event(1))


def estimator() -> FlowMatching:
    return FlowMatching(peaked, width=64, num_blocks=2)


def distance(posterior: Posterior) -> float:
    """Return how far mean and deviation are from those of the posterior, in deviations."""
    theta = posterior.sample(4000, x=X, seed=0)["theta"]
    # x[1] is theta[1]; given it, theta[0] = x[0] - .05 theta[1]^2, less .05 * .1^2 on average.
    mean = torch.tensor([2 - 0.05 * (9 + 0.01), 3.0])
    scale = torch.tensor([(0.01 + (0.3 * 0.1) ** 2) ** 0.5, 0.1])
    off = (theta.mean(0) - mean).abs() / scale + (theta.std(0) / scale - 1).abs()
    return off.max().item()


@cache
def one_round() -> Posterior:
    return estimator().fit(num_simulations=2000, **SETTINGS)


@cache
def two_rounds() -> Posterior:
    return refine(estimator(), X, num_simulations=1000, **SETTINGS)


@pytest.mark.slow
def test_two_rounds_are_better_than_one_at_equal_budget() -> None:
    assert distance(two_rounds()) < 1.0
    assert distance(two_rounds()) < distance(one_round()) / 3


def test_a_conjugate_posterior_stays_right() -> None:
    """Normal(.75, .5)."""
    x = torch.tensor([1.0, 0.2, 1.8])
    posterior = refine(
        FlowMatching(conjugate),
        x,
        num_simulations=1500,
        num_steps=300,
        augment=False,
        progress=False,
    )
    draws = posterior.sample(10_000, x=x, seed=0)["mean"]
    assert draws.mean().item() == pytest.approx(0.75, abs=0.1)
    assert draws.std().item() == pytest.approx(0.5, abs=0.06)


def test_the_region_holds_all_but_epsilon_of_the_posterior() -> None:
    """Of 4000 draws at 5 %, 200 +- 14 are outside at most, 100 +- 10 at least; 5 deviations off."""
    posterior = one_round()
    region = _Region(posterior, X, 0.05, seed=0)
    z = posterior.space.unconstrain(posterior.sample(4000, x=X, seed=1))
    outside = (~region.contains(z)).float().mean().item()
    assert 0.025 - 0.0125 < outside < 0.05 + 0.0175


def test_draws_come_from_the_prior_inside_the_region() -> None:
    """Against draws from the prior that lie inside: two-sample tests at a level of 1e-4."""
    from scipy.stats import ks_2samp

    posterior = one_round()
    region = _Region(posterior, X, 1e-3, seed=0)
    ours = _draw_prior(posterior, [region], 1000, seed=0)
    assert region.contains(ours).all()
    prior = torch.randn(10_000, 2)  # a uniform prior, in unconstrained coordinates
    theirs = prior[region.contains(prior)]
    assert len(theirs) > 100
    for i in range(2):
        assert ks_2samp(ours[:, i].numpy(), theirs[:, i].numpy()).pvalue > 1e-4


def test_warns_of_other_observations(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        two_rounds().sample(10, x=X)
        two_rounds().sample(10, x=X.expand(3, 2))
    two_rounds().save(tmp_path / "posterior.safetensors")
    again = estimator().load(tmp_path / "posterior.safetensors")
    for posterior in (two_rounds(), again):
        with warnings.catch_warnings(record=True) as caught:  # it may be an outlier as well
            warnings.simplefilter("always")
            posterior.sample(10, x=X + 1)
        assert any("was refined for one observation" in str(one.message) for one in caught)


def test_simulations_can_be_given() -> None:
    from pyroflows.sbi import simulate

    simulations = simulate(peaked, 300, progress=False)
    posterior = refine(
        estimator(), X, num_simulations=200, simulations=simulations, num_steps=5, progress=False
    )
    assert 200 <= posterior.about["num_simulations"] <= 500


# Interrupts and errors


class Machine:
    """Measure a number, one at a time, until something happens."""

    def __init__(self, after: int = 10**9, error: BaseException | None = None) -> None:
        self.num_measurements = 0
        self.after = after
        self.error = error

    def __call__(self) -> None:
        theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
        self.num_measurements += 1  # not where the prior alone is asked for
        if self.error is not None and self.num_measurements > self.after:
            raise self.error
        pyro.sample("x", dist.Normal(theta.item(), 0.5))


def measured(machine: Machine, num_rounds: int = 3, **settings: Any) -> Posterior:
    return refine(
        FlowMatching(machine, width=16, num_blocks=1),
        torch.tensor(1.0),
        num_simulations=100,
        num_rounds=num_rounds,
        num_steps=60,
        augment=False,
        progress=False,
        **settings,
    )


@cache
def answer(num_rounds: int) -> Tensor:
    return drawn(measured(Machine(), num_rounds))


def drawn(posterior: Posterior) -> Tensor:
    return posterior.sample(50, x=torch.tensor(1.0), seed=0)["theta"]


@pytest.mark.parametrize(
    ("after", "error", "num_finished", "message"),
    [
        (170, KeyboardInterrupt(), 1, "interrupted"),
        (290, KeyboardInterrupt(), 2, "interrupted"),
        (170, OSError("no paper"), 1, "the simulator raised OSError: no paper; parameters: theta"),
    ],
)
def test_what_stops_the_simulator_leaves_the_rounds_that_are_finished(
    after: int, error: BaseException, num_finished: int, message: str
) -> None:
    """Each round measures 100 times, and a few times before it begins."""
    found = f"round {num_finished + 1} of 3 .* posterior is that of round {num_finished}: {message}"
    with pytest.warns(UserWarning, match=found):
        posterior = measured(Machine(after, error))
    assert torch.equal(drawn(posterior), answer(num_finished))


def test_the_first_round_has_nothing_to_leave() -> None:
    with pytest.raises(KeyboardInterrupt):
        measured(Machine(50, KeyboardInterrupt()))


def test_a_first_round_alone_holds_for_all_observations() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        measured(Machine(), 1).sample(10, x=torch.tensor(-1.0))


@pytest.mark.filterwarnings("ignore:interrupted. the density")
def test_an_interrupted_training_goes_on_when_called_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Round 2 is at its second validation, of 50 steps and then 10, when it is interrupted."""
    from pyroflows.sbi.estimators import estimator as module

    checkpoint = tmp_path / "training"
    with monkeypatch.context() as patch:
        interrupt(patch, module, after=62 + 55)  # 60 steps and 2 validations of round 1
        with pytest.warns(UserWarning, match="round 2 of 2 .* is that of round 1: interrupted"):
            posterior = measured(Machine(), 2, checkpoint=checkpoint)
    assert torch.equal(drawn(posterior), answer(1))
    scored = []
    with monkeypatch.context() as patch:
        score = module._Trained.score
        patch.setattr(module._Trained, "score", lambda *a: scored.append(1) or score(*a))
        again = measured(Machine(), 2, checkpoint=checkpoint)
    assert len(scored) == 11  # the last 10 steps and their validation
    torch.testing.assert_close(drawn(again), answer(2))


def test_a_training_that_fails_leaves_the_rounds_that_are_finished(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fit, calls = FlowMatching.fit, []

    def failing(*args: Any, **settings: Any) -> Posterior:
        calls.append(1)
        if len(calls) > 1:
            raise FloatingPointError("the loss is not finite")
        return fit(*args, **settings)

    monkeypatch.setattr(FlowMatching, "fit", failing)
    with pytest.warns(UserWarning, match="is that of round 1: the loss is not finite"):
        posterior = measured(Machine())
    assert torch.equal(drawn(posterior), answer(1))


def test_wrong_requests_are_refused() -> None:
    def refused(message: str, error: type = ValueError, x: Tensor = X, **options: float) -> None:
        with pytest.raises(error, match=message):
            refine(options.pop("estimator", estimator()), x, num_simulations=10, **options)

    def hierarchical() -> None:
        mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        theta = pyro.sample("theta", dist.Normal(mean, 1.0).expand([2]).to_event(1))
        pyro.sample("x", dist.Normal(theta, 1.0).to_event(1))

    refused("the prior has no density", estimator=FlowMatching(hierarchical, parameters=["theta"]))
    refused("num_rounds must be at least 1, got 0", num_rounds=0)
    refused(r"epsilon must lie in \(0, 0.5\), got 0.7", epsilon=0.7)
    refused(r"x must be one observation, got a batch \(3,\)", x=torch.zeros(3, 2))
    refused(
        "estimator must be a FlowMatching, got NeuralPosterior",
        TypeError,
        estimator=NeuralPosterior(peaked, flow="maf"),
    )
