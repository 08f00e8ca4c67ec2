"""Options of the training of flow matching, and devices: all leave the posterior right."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyro.distributions as dist
import pytest
import torch
from scipy import stats
from torch import Tensor
from torch.distributions import Distribution

from pyroflows.sbi import FlowMatching, JointFlowMatching
from pyroflows.sbi.densities.conditional import ConditionalDensity
from pyroflows.sbi.densities.coupling import GROUP_SIZE, optimal_transport
from pyroflows.sbi.densities.flow_density import FlowDensity
from pyroflows.sbi.densities.flow_matching_density import FlowMatchingDensity
from pyroflows.sbi.densities.joint_flow_density import JointFlowDensity
from pyroflows.sbi.densities.time_sampling import TIME_SAMPLINGS
from pyroflows.sbi.model.observations import ObservationSpace
from pyroflows.sbi.model.space import ParameterSpace
from tests.test_sbi import linear

VECTOR = ObservationSpace({"x": torch.Size([3])})
SCALAR = ObservationSpace({"x": torch.Size([1])})
NOISE = 0.3
OPTIONS: tuple[dict, ...] = (
    {"time_sampling": "power"},
    {"time_sampling": "logit_normal"},
    {"coupling": "optimal_transport"},
    {"mixed_precision": True},
)


def trained(**options: Any) -> FlowMatchingDensity:
    """Train on ``z = sin(2 x) + .3 e``, which no linear regression solves."""
    torch.manual_seed(0)
    x = torch.randn(4000, 1)
    z = torch.sin(2 * x) + NOISE * torch.randn(4000, 1)
    density = FlowMatchingDensity(1, SCALAR, width=32, num_blocks=2, num_steps=16, **options)
    density.prepare(z, x)
    optimizer = torch.optim.AdamW(density.parameters(), 3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 400)
    for _ in range(400):
        rows = torch.randint(len(z), (512,))
        optimizer.zero_grad()
        (-density.score(z[rows], x[rows]).mean()).backward()
        optimizer.step()
        schedule.step()
    return density.eval()


def errors(density: FlowMatchingDensity) -> tuple[Tensor, Tensor]:
    """Return errors of posterior means and standard deviations, in the latter, at usual ``x``."""
    x = torch.linspace(-1.2, 1.2, 7).unsqueeze(-1)
    draws = density.sample(4000, x).squeeze(-1)
    mean = (draws.mean(0) - torch.sin(2 * x.squeeze(-1))) / NOISE
    return mean.abs(), (draws.std(0) / NOISE - 1).abs()


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_the_posterior_is_right_with_each_option(options: dict) -> None:
    """A smooth of 20 degrees of freedom errs by .07 on 4000 pairs: 4 errors are .3."""
    mean, deviation = errors(trained(**options))
    assert mean.max() < 0.3
    assert deviation.max() < 0.2


def test_without_conditions_optimal_transport_is_wrong() -> None:
    """Why conditions count, and why no coupling is the default."""
    mean, deviation = errors(trained(coupling="optimal_transport", condition_weight=0.0))
    assert mean.max() > 1.0
    assert deviation.max() > 1.0


# Times


@pytest.mark.parametrize(
    ("name", "cdf"),
    [
        ("uniform", stats.uniform.cdf),
        ("power", lambda t: t**2),
        ("logit_normal", lambda t: stats.norm.cdf(stats.logistic.ppf(t))),
    ],
)
def test_times_have_their_distribution(name: str, cdf: Callable) -> None:
    """At a false-alarm rate of 1e-4."""
    torch.manual_seed(0)
    times = TIME_SAMPLINGS[name](torch.zeros(20_000, dtype=torch.float64))
    assert stats.kstest(times.numpy(), cdf).pvalue > 1e-4


def test_validation_knows_no_option_of_training() -> None:
    """Losses compare: the same weights have the same loss, whatever they were trained with."""
    z, x = torch.randn(40, 2), torch.randn(40, 3)
    scores = []
    for options in ({}, *OPTIONS):
        if "coupling" in options:  # another field is learned, which has another loss
            continue
        torch.manual_seed(0)
        scores.append(FlowMatchingDensity(2, VECTOR, **options).eval().score(z, x))
    for score in scores[1:]:
        torch.testing.assert_close(score, scores[0], rtol=0, atol=0)


# Couplings


def test_assignments_are_optimal_in_each_group() -> None:
    """In one dimension, and without conditions, noise is in the order of the parameters."""
    torch.manual_seed(0)
    noise, w = torch.randn(2, 2 * GROUP_SIZE + 5, 1)
    moved = optimal_transport(noise, w, torch.zeros(len(w), 1), 1.0)
    for start in range(0, len(w), GROUP_SIZE):
        rows = slice(start, start + GROUP_SIZE)
        order = w[rows, 0].argsort()
        assert torch.equal(moved[rows][order], noise[rows].sort(0).values)


def test_noise_moves_only_between_equal_conditions() -> None:
    torch.manual_seed(0)
    noise, w = torch.randn(2, 100, 2)
    condition = torch.arange(100.0).unsqueeze(-1) // 2  # pairs
    moved = optimal_transport(noise, w, condition, 1e8)
    kept = (moved == noise).all(-1)
    swapped = (moved == noise.unflatten(0, (50, 2)).flip(1).flatten(0, 1)).all(-1)
    assert (kept ^ swapped).all()
    assert kept.any()
    assert swapped.any()
    distances = [(w - rows).square().unflatten(0, (50, 2)).sum((1, 2)) for rows in (moved, noise)]
    assert (distances[0] <= distances[1]).all()


def test_a_large_weight_leaves_the_noise_in_place() -> None:
    torch.manual_seed(0)
    noise, w, condition = torch.randn(3, 300, 2)
    assert torch.equal(optimal_transport(noise, w, condition, 1e8), noise)


# Precision


def test_mixed_precision_is_of_training_alone() -> None:
    density = FlowMatchingDensity(2, VECTOR, mixed_precision=True)
    seen = []
    density.network.output.register_forward_hook(lambda *call: seen.append(call[-1].dtype))
    z, x = torch.randn(10, 2), torch.randn(10, 3)
    assert density.train().score(z, x).dtype == torch.float32
    assert density.eval().score(z, x).dtype == torch.float32
    assert density.sample(4, x).dtype == torch.float32
    assert seen[0] == torch.bfloat16
    assert {*seen[1:]} == {torch.float32}


# Estimators


def test_options_reach_the_training_and_the_file(tmp_path: Path) -> None:
    options = {name: value for one in OPTIONS for name, value in one.items()}
    estimator = FlowMatching(linear, width=16, num_blocks=1, **options)
    posterior = estimator.fit(num_simulations=400, num_steps=20, progress=False)
    posterior.save(tmp_path / "posterior.safetensors")
    again = estimator.load(tmp_path / "posterior.safetensors")
    draws = [p.sample(10, x=torch.zeros(2), seed=0)["theta"] for p in (posterior, again)]
    assert torch.equal(*draws)
    plain = FlowMatching(linear, width=16, num_blocks=1).fit(
        num_simulations=400, num_steps=20, progress=False
    )
    assert not torch.equal(plain.sample(10, x=torch.zeros(2), seed=0)["theta"], draws[0])


def test_joint_training_takes_the_options() -> None:
    options = {name: value for one in OPTIONS for name, value in one.items()}
    posterior = JointFlowMatching(linear, width=16, num_blocks=1, **options).fit(
        num_simulations=400, num_steps=20, progress=False
    )
    assert posterior.sample(10, x=torch.zeros(2))["theta"].isfinite().all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"time_sampling": "cosine"}, r"time_sampling must be one of \['uniform'.*got 'cosine'"),
        ({"coupling": "sinkhorn"}, r"coupling must be one of \['independent'.*got 'sinkhorn'"),
        ({"condition_weight": -1.0}, "condition_weight must be finite and not negative, got -1.0"),
        ({"condition_weight": float("nan")}, "condition_weight must be finite .* got nan"),
    ],
)
def test_unknown_options_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FlowMatchingDensity(2, VECTOR, **options)


# Devices: the meta device refuses tensors of any other


SPACES = {
    "vector": VECTOR,
    "set": ObservationSpace({"x": torch.Size([4, 3])}, is_set=True, sizes=(2, 4)),
    "missing at random": ObservationSpace({"x": torch.Size([3])}, missing="random"),
    "missing in simulations": ObservationSpace({"x": torch.Size([3])}, missing="simulated"),
}
DENSITIES: dict[str, type] = {"flow matching": FlowMatchingDensity, "flow": FlowDensity}
CASES = {
    f"{kind}, {name}": (DENSITIES[kind], SPACES[name]) for kind in DENSITIES for name in SPACES
}
CASES["joint flow matching"] = (JointFlowDensity, VECTOR)


@pytest.fixture
def on_meta() -> Iterator[None]:
    """Leave out checks of values, which the meta device has none of."""
    Distribution.set_default_validate_args(False)
    yield
    Distribution.set_default_validate_args(True)


@pytest.mark.usefixtures("on_meta")
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_everything_is_where_the_parameters_are(
    case: tuple[type[ConditionalDensity], ObservationSpace],
) -> None:
    kind, observations = case
    steps: Any = {} if kind is FlowDensity else {"num_steps": 1}
    density = kind(2, observations, **steps).to("meta")
    z, x = (torch.zeros(5, *shape, device="meta") for shape in ((2,), (4, 3)))
    x = x if observations.is_set else x[:, 0]
    for mode in (True, False):
        assert density.train(mode).score(z, x).is_meta
    assert density.sample(3, x).shape == (3, 5, 2)
    assert density.sample(3, x).is_meta
    if kind is not JointFlowDensity:  # it looks for NaN
        assert density.log_prob(z, x).is_meta


@pytest.mark.parametrize(
    "prior",
    [
        dist.Uniform(-1.0, 1.0).expand([2]).to_event(1),
        dist.Pareto(torch.ones(2), torch.ones(2)).to_event(1),
    ],
)
def test_parameters_are_constrained_where_they_are(prior: dist.Distribution) -> None:
    space = ParameterSpace({"theta": (prior, torch.Size([2]))})
    z = torch.zeros(5, 2, device="meta")
    assert space.constrain(z)["theta"].is_meta
    assert space.log_abs_det_jacobian(z).is_meta


@pytest.mark.usefixtures("on_meta")
def test_random_signs_are_where_the_parameters_are() -> None:
    density = FlowMatchingDensity(2, VECTOR, num_steps=1, num_probes=4).to("meta").eval()
    z, x = (torch.zeros(5, size, device="meta") for size in (2, 3))
    assert density.log_prob(z, x).is_meta
