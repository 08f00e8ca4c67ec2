"""The amortized guide: local latent variables of plates, by one network for all data."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Predictive, Trace_ELBO, TraceEnum_ELBO
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import pyroflows as pf
from tests.models import SUPPORTS

PRIOR_SD, LOCAL_SD, NOISE_SD = 3.0, 1.0, 0.5
SMALL = {"flow": "realnvp", "num_layers": 1, "global_flow": "realnvp"}
DATA = torch.tensor([1.4, 3.1, 2.2, 0.7, 2.9, 3.6, 1.8, 2.4])


def hierarchical(data: Tensor, batch: int | None = None) -> None:
    """Model data by normal distributions around normal means, of a normal mean."""
    loc = pyro.sample("loc", dist.Normal(data.new_zeros(()), PRIOR_SD))
    with pyro.plate("data", len(data), subsample_size=batch) as index:
        z = pyro.sample("z", dist.Normal(loc, LOCAL_SD))
        pyro.sample("x", dist.Normal(z, NOISE_SD), obs=data[index])


def evidence(data: Tensor) -> float:
    """Return the exact log evidence of the hierarchical model."""
    covariance = torch.eye(len(data)) * (LOCAL_SD**2 + NOISE_SD**2) + PRIOR_SD**2
    return float(dist.MultivariateNormal(torch.zeros(len(data)), covariance).log_prob(data))


def global_posterior(data: Tensor) -> tuple[float, float]:
    """Return the exact posterior mean and standard deviation of ``loc``."""
    variance = LOCAL_SD**2 + NOISE_SD**2
    precision = PRIOR_SD**-2 + len(data) / variance
    return float(data.sum() / variance / precision), precision**-0.5


def local_posterior(x: Tensor, loc_mean: float, loc_sd: float) -> tuple[Tensor, float]:
    """Return exact means and the standard deviation of ``z`` of data, for a posterior of ``loc``.

    Given ``loc``, ``z`` has precision 1 / LOCAL_SD^2 + 1 / NOISE_SD^2.
    """
    precision = LOCAL_SD**-2 + NOISE_SD**-2
    pull = LOCAL_SD**-2 / precision
    mean = x * NOISE_SD**-2 / precision + pull * loc_mean
    return mean, math.sqrt(1 / precision + (pull * loc_sd) ** 2)


def only_local(data: Tensor, batch: int | None = None) -> None:
    """Model data without global variables."""
    with pyro.plate("data", len(data), subsample_size=batch) as index:
        z = pyro.sample("z", dist.Normal(data.new_zeros(()), 1.0))
        pyro.sample("x", dist.Normal(z, 0.5), obs=data[index])


def small(model: Callable = hierarchical, **options: Any) -> pf.AmortizedFlow:
    return pf.AmortizedFlow(model, "data", **{**SMALL, **options})


def perturbed(guide: pf.AmortizedFlow, *args: Any) -> pf.AmortizedFlow:
    """Set a guide up and move it away from its start."""
    guide(*args)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in guide.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator).to(parameter))
    return guide


def train(guide: pf.AmortizedFlow, steps: int, *args: Any, elbo: Any = None) -> None:
    elbo = elbo or pf.PathwiseELBO(num_particles=8, vectorize_particles=True)
    optimizer = pyro.optim.ClippedAdam({"lr": 0.02, "lrd": 0.02 ** (1 / steps)})
    svi = SVI(guide.model, guide, optimizer, elbo)
    for _ in range(steps):
        svi.step(*args)


@pytest.fixture(scope="module")
def fitted() -> pf.AmortizedFlow:
    """Return a guide fitted to ``DATA`` by minibatches of four."""
    with pyro.get_param_store().scope():
        torch.manual_seed(1)
        guide = small()
        train(guide, 300, DATA, 4)
    return guide


def test_the_elbo_reaches_the_exact_log_evidence(fitted: pf.AmortizedFlow) -> None:
    elbo = pf.PathwiseELBO(num_particles=4000, vectorize_particles=True)
    bound = -elbo.loss(hierarchical, fitted, DATA)
    # At a gap of 0.05 nats log-weights have a standard deviation of about sqrt(2 * 0.05), the
    # mean of 4000 one of 0.005: five of these on either side.
    assert evidence(DATA) - 0.08 < bound < evidence(DATA) + 0.025


def test_draws_have_the_exact_moments(fitted: pf.AmortizedFlow) -> None:
    draws = fitted.sample(20_000, DATA)
    mean, sd = global_posterior(DATA)
    # Means of 20 000 draws are off by 0.007 sd; the fit may add a twentieth of an sd, and more
    # for the locals at the ends of the data.
    assert draws["loc"].shape == (20_000,)
    assert abs(draws["loc"].mean() - mean) < 0.1 * sd
    assert abs(draws["loc"].std() / sd - 1) < 0.1
    means, sd = local_posterior(DATA, mean, sd)
    assert draws["z"].shape == (20_000, len(DATA))
    assert ((draws["z"].mean(0) - means).abs() < 0.2 * sd).all()
    assert ((draws["z"].std(0) / sd - 1).abs() < 0.15).all()


@pytest.mark.parametrize("batch", [None, 2])
def test_new_data_of_another_number(fitted: pf.AmortizedFlow, batch: int | None) -> None:
    new = torch.tensor([2.0, 1.0, 3.3])
    draws = fitted.sample(10_000, new, batch)
    means, sd = local_posterior(new, *global_posterior(DATA))
    assert draws["z"].shape == (10_000, 3)
    assert ((draws["z"].mean(0) - means).abs() < 0.2 * sd).all()
    # Of the pull of loc on z, a fifth, the correlation is what the conditional flow has learned.
    correlation = torch.corrcoef(torch.stack([draws["loc"], draws["z"][:, 0]]))[0, 1]
    pull = (LOCAL_SD / NOISE_SD) ** -2 / (1 + (LOCAL_SD / NOISE_SD) ** -2)
    # Sampling error 0.01.
    assert abs(correlation - pull * global_posterior(DATA)[1] / sd) < 0.12


@pytest.mark.parametrize("model", [hierarchical, only_local])
@pytest.mark.parametrize("kind", [Trace_ELBO, pf.PathwiseELBO])
def test_subsampling_leaves_the_elbo_unbiased(model: Callable, kind: type) -> None:
    guide = perturbed(small(model, init_scale=0.5), DATA)
    elbo = kind(num_particles=50, vectorize_particles=True)
    batches = torch.tensor([elbo.loss(model, guide, DATA, 2) for _ in range(250)])
    full = torch.tensor([elbo.loss(model, guide, DATA) for _ in range(100)])
    error = (batches.var() / 250 + full.var() / 100).sqrt()
    # Five standard errors: a false alarm in two million runs.
    assert abs(batches.mean() - full.mean()) < 5 * error
    assert error < 0.05 * abs(full.mean())  # or the test could not fail


class Work(TorchDispatchMode):
    """Count the floating point numbers that operations return."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, tuple | list) else [result]:
            if isinstance(value, Tensor) and value.is_floating_point():
                self.count += value.numel()
        return result


def test_a_step_costs_the_same_for_any_number_of_data() -> None:
    def work(number: int) -> tuple[int, list]:
        runs: list[torch.Size] = []

        def model(data: Tensor) -> None:
            loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
            with pyro.plate("data", len(data), subsample_size=5) as index:
                z = pyro.sample("z", dist.Normal(loc, 1.0))
                runs.append(z.shape)
                pyro.sample("x", dist.Normal(z, 1.0), obs=data[index])

        pyro.clear_param_store()
        guide = small(model)
        data = torch.randn(number)
        elbo = pf.PathwiseELBO(3, vectorize_particles=True)
        svi = SVI(model, guide, pyro.optim.Adam({"lr": 1e-3}), elbo)
        svi.step(data)
        runs.clear()
        with Work() as work:
            svi.step(data)
        return work.count, runs

    count, runs = work(100)
    assert (count, runs) == work(100_000)
    # The guide reads the data to draw, and again for the density of its draws.
    assert runs == [(5,), (3, 5), (5,)]


def test_draws_visit_all_data_in_order_and_once() -> None:
    seen: list[Tensor] = []

    class Spy(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(x)
            return x

    guide = small(encoder=Spy())
    guide(DATA, 3)
    for batch, sizes in ((3, [3, 3, 2]), (8, [8]), (None, [8])):
        seen.clear()
        assert guide.sample(2, DATA, batch)["z"].shape == (2, 8)
        assert [len(rows) for rows in seen] == sizes
        rows = torch.cat(seen) * guide.local.feature_scale + guide.local.feature_loc
        assert torch.allclose(rows, DATA.unsqueeze(-1), atol=1e-5)


def test_indices_of_the_model_are_kept() -> None:
    def model(index: Tensor) -> None:
        with pyro.plate("data", len(DATA), subsample=index):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=DATA[index])

    guide = small(model)
    index = torch.tensor([5, 1, 2])
    trace = poutine.trace(guide).get_trace(index)
    assert trace.nodes["data"]["value"] is index
    assert trace.nodes["z"]["scale"] == pytest.approx(8 / 3)
    assert guide.sample(4, index)["z"].shape == (4, 3)


def test_the_model_gets_the_data_that_the_guide_has_read() -> None:
    # Features are read again for the density of the draws: by the same indices, or the two
    # would disagree.
    guide = perturbed(small(only_local), DATA)
    trace = poutine.trace(guide).get_trace(DATA, 2)
    index = trace.nodes["data"]["value"]
    replayed = poutine.trace(poutine.replay(guide, trace)).get_trace(DATA, 2)
    assert torch.equal(replayed.nodes["data"]["value"], index)
    latent = "_AmortizedFlow_local_latent"
    trace.compute_log_prob()
    replayed.compute_log_prob()
    assert torch.allclose(replayed.nodes[latent]["log_prob"], trace.nodes[latent]["log_prob"])
    model = poutine.trace(poutine.replay(only_local, trace)).get_trace(DATA, 2)
    assert torch.equal(model.nodes["x"]["value"], DATA[index])


def pairs(data: Tensor, batch: int | None = None) -> None:
    """Model pairs of data by two global and two local variables."""
    loc = pyro.sample("loc", dist.Normal(torch.zeros(2), PRIOR_SD).to_event(1))
    with pyro.plate("data", len(data), subsample_size=batch) as index:
        z = pyro.sample("z", dist.Normal(loc, LOCAL_SD).to_event(1))
        pyro.sample("x", dist.Normal(z.sum(-1), NOISE_SD), obs=data[index])


@pytest.mark.parametrize("vectorize", [False, True])
@pytest.mark.parametrize("model", [pairs, only_local])
@pytest.mark.parametrize("kind", [Trace_ELBO, pf.PathwiseELBO])
def test_gradients_reach_every_parameter(kind: type, model: Callable, vectorize: bool) -> None:
    guide = perturbed(small(model, flow="spline_coupling"), DATA)
    elbo = kind(num_particles=3, vectorize_particles=vectorize)
    elbo.loss_and_grads(model, guide, DATA, 4)
    for name, parameter in guide.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize("names", [["positive"], ["simplex"], ["interval", "cholesky"], ["vector"]])
def test_density_in_constrained_space(names: list[str]) -> None:
    """Importance weights of a model whose data do not depend on its latents average to p(x)."""
    data = torch.tensor([0.3, -0.2])

    def model() -> None:
        with pyro.plate("data", 2):
            for name in names:
                pyro.sample(name, SUPPORTS[name]())
            pyro.sample("x", dist.Normal(0.0, 1.0), obs=data)

    def particles(function: Callable) -> Callable:
        return pyro.plate("particles", 40_000, dim=-2)(function)

    guide = small(model, init_scale=1.2)
    guide()
    with torch.no_grad():
        drawn = poutine.trace(particles(guide)).get_trace()
        joint = poutine.trace(poutine.replay(particles(model), drawn)).get_trace()
        for name in names:
            assert SUPPORTS[name]().support.check(drawn.nodes[name]["value"]).all()
        drawn.compute_log_prob()
        joint.compute_log_prob()
    terms = [
        sign * site["log_prob"]
        for trace, sign in ((joint, 1), (drawn, -1))
        for site in trace.nodes.values()
        if site["type"] == "sample" and site["log_prob"].dim()
    ]
    weights = sum(term.expand(40_000, 2) for term in terms).exp()  # of each datum
    exact = dist.Normal(0.0, 1.0).log_prob(data).exp()
    error = weights.std(0) / 200
    assert (error < 0.05 * exact).all()
    # Five standard errors, a false alarm in two million runs; six for the skewness of weights.
    assert ((weights.mean(0) - exact).abs() < 6 * error).all()


def test_plates_around_the_observations_of_a_datum() -> None:
    table = torch.arange(12.0).reshape(4, 3)  # 4 groups of 3 observations

    def model(table: Tensor, groups_first: bool) -> None:
        dims = (-2, -1) if groups_first else (-1, -2)
        scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0).expand([2]).to_event(1))
        group = pyro.plate("data", len(table), subsample_size=2, dim=dims[0])
        with group as index:
            mean = pyro.sample("mean", dist.Normal(0.0, scale[..., 0, None, None]))
            with pyro.plate("item", 3, dim=dims[1]):
                rows = table[index] if groups_first else table[index].T
                pyro.sample("y", dist.Normal(mean, 1.0), obs=rows)

    for groups_first in (True, False):
        guide = small(model, encoder=nn.Identity())
        trace = poutine.trace(guide).get_trace(table, groups_first)
        assert guide.local.feature_loc.shape == (3,)
        minibatch = guide.reader.read((table, groups_first), {})
        assert torch.equal(minibatch.features, table[minibatch.index])
        assert trace.nodes["mean"]["value"].shape == ((2, 1) if groups_first else (2,))
        elbo = pf.PathwiseELBO(num_particles=5, vectorize_particles=True)
        assert math.isfinite(elbo.loss(guide.model, guide, table, groups_first))
        draws = guide.sample(7, table, groups_first)
        assert draws["mean"].shape == ((7, 4, 1) if groups_first else (7, 4))
        assert draws["scale"].shape == (7, 2)


def test_global_variables_in_plates_of_their_own() -> None:
    def model(data: Tensor) -> None:
        with pyro.plate("season", 3, dim=-2):
            effect = pyro.sample("effect", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(data)):
            z = pyro.sample("z", dist.Normal(effect.sum(-2, keepdim=True), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=data)

    guide = small(model)
    elbo = pf.PathwiseELBO(num_particles=5, vectorize_particles=True)
    SVI(model, guide, pyro.optim.Adam({"lr": 1e-3}), elbo).step(DATA)
    draws = guide.sample(7, DATA)
    assert draws["effect"].shape == (7, 3, 1)
    assert draws["z"].shape == (7, 8)


def test_features_replace_what_is_observed() -> None:
    covariate = torch.linspace(0, 1, 8)

    def model(covariate: Tensor, batch: int) -> None:
        with pyro.plate("data", 8, subsample_size=batch) as index:
            z = pyro.sample("z", dist.Normal(covariate[index], 1.0))
            pyro.factor("energy", -z.square())

    with pytest.raises(ValueError, match="observes nothing in plate 'data'"):
        small(model)(covariate, 3)
    guide = small(model, features=lambda index, c, _: torch.stack([c[index], DATA[index]], -1))
    assert guide(covariate, 3)["z"].shape == (3,)
    assert guide.local.feature_loc.shape == (2,)
    with pytest.raises(ValueError, match=r"features must return .* \(3, F\)"):
        small(model, features=lambda index, c, _: c[index])(covariate, 3)


def test_integer_data_and_standardised_features() -> None:
    counts = torch.arange(200)

    def model(batch: int) -> None:
        with pyro.plate("data", 200, subsample_size=batch) as index:
            rate = pyro.sample("rate", dist.Gamma(1.0, 0.01))
            pyro.deterministic("double", 2 * rate)
            pyro.sample("x", dist.Poisson(rate), obs=counts[index])

    guide = small(model)
    guide(20)
    assert guide.local.feature_loc.shape == (1,)  # no latent variable in disguise
    # 1000 draws of 0..199, sd 58: five standard errors of a mean are 9.
    assert abs(guide.local.feature_loc.item() - 99.5) < 10
    assert abs(guide.local.feature_scale.item() - 57.7) < 7


def test_enumerated_sites_are_left_to_the_elbo() -> None:
    def model(data: Tensor, batch: int | None = None) -> None:
        with pyro.plate("data", len(data), subsample_size=batch) as index:
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            sign = pyro.sample("sign", dist.Bernoulli(0.5), infer={"enumerate": "parallel"})
            pyro.sample("x", dist.Normal(z + sign, 0.5), obs=data[index])

    guide = small(model)
    elbo = TraceEnum_ELBO(max_plate_nesting=1, num_particles=20, vectorize_particles=True)
    before = elbo.loss(model, guide, DATA)
    train(guide, 60, DATA, 4, elbo=elbo)
    assert "sign" not in guide.sample(2, DATA)
    assert elbo.loss(model, guide, DATA) < before


@pytest.mark.parametrize("parallel", [False, True])
def test_predictive(parallel: bool) -> None:
    guide = small()
    guide(DATA)
    draws = Predictive(guide, num_samples=6, parallel=parallel)(DATA)
    assert draws["z"].shape == (6, 8)
    assert draws["loc"].numel() == 6
    latents = {name: draws[name] for name in ("loc", "z")}
    assert Predictive(hierarchical, latents, parallel=parallel)(DATA)["x"].shape == (6, 8)


def test_float64() -> None:
    torch.set_default_dtype(torch.float64)
    guide = small(flow="spline_coupling")
    train(guide, 2, DATA.double(), 4)
    assert {p.dtype for p in guide.parameters()} == {torch.float64}
    torch.set_default_dtype(torch.float32)
    guide = small(flow="spline_coupling")
    train(guide, 2, DATA.double(), 4)  # by the dtype of the model
    assert guide.sample(3, DATA.double())["z"].dtype == torch.float64


@pytest.mark.parametrize("model", [hierarchical, only_local])
def test_state_dict_into_a_fresh_guide(model: Callable) -> None:
    guide = perturbed(small(model), DATA)
    other = small(model)
    other.load_state_dict(guide.state_dict())
    other(DATA)
    for same in (other, copy.deepcopy(guide)):
        torch.manual_seed(6)
        expected = guide.sample(4, DATA, 3)
        torch.manual_seed(6)
        draws = same.sample(4, DATA, 3)
        assert draws.keys() == expected.keys()
        assert all(torch.equal(draws[name], expected[name]) for name in draws)
    wrong = small(only_local if model is hierarchical else hierarchical)
    wrong.load_state_dict(guide.state_dict())
    with pytest.raises(ValueError, match="the loaded state is that of a guide of 1 latent"):
        wrong(DATA)


def test_a_deep_copy_is_independent() -> None:
    guide = perturbed(small(), DATA)
    other = copy.deepcopy(guide)
    before = guide.state_dict()["local.transform.parts.3.loc"].clone()
    pyro.clear_param_store()
    train(other, 3, DATA, 4)
    assert torch.equal(guide.state_dict()["local.transform.parts.3.loc"], before)
    assert not torch.equal(other.state_dict()["local.transform.parts.3.loc"], before)
    del guide
    assert other(DATA)["z"].shape == (8,)


def test_pickling_says_what_to_do_instead() -> None:
    with pytest.raises(TypeError, match="state_dict"):
        pickle.dumps(small())


# Errors.


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"flow": "nosuch"}, ValueError, "unknown flow"),
        ({"flow": "circular_spline"}, ValueError, "angles"),
        ({"flow": 3}, TypeError, "flow must be"),
        ({"global_flow": "nosuch"}, ValueError, "unknown flow"),
        ({"encoder": len}, TypeError, "encoder must be"),
        ({"embedding_dim": 0}, ValueError, "embedding_dim must be"),
        ({"features": 3}, TypeError, "features must be"),
        ({"init_scale": 0.0}, ValueError, "init_scale must be positive"),
    ],
)
def test_bad_arguments(options: dict, error: type, match: str) -> None:
    with pytest.raises(error, match=match):
        small(**options)


def test_bad_model_and_plate() -> None:
    with pytest.raises(TypeError, match="model must be a callable"):
        pf.AmortizedFlow(None, "data")
    with pytest.raises(TypeError, match="plate must be the name"):
        pf.AmortizedFlow(hierarchical, 3)
    with pytest.raises(ValueError, match=r"got 'datum'; the model's plates: \['data'\]"):
        pf.AmortizedFlow(hierarchical, "datum")(DATA)
    with pytest.raises(ValueError, match="num_samples must be at least 1"):
        small().sample(0, DATA)


def in_plate(site: Callable[[], Any], **plate: Any) -> Callable:
    """Build a model with a latent site in the plate of the data."""

    def model() -> None:
        with pyro.plate("data", len(DATA), **plate):
            site()
            pyro.sample("x", dist.Normal(0.0, 1.0), obs=DATA)

    return model


@pytest.mark.parametrize(
    ("site", "match"),
    [
        (lambda: None, "no continuous latent variables in plate"),
        (lambda: pyro.sample("z", dist.Poisson(3.0)), "site 'z' is discrete"),
        (
            lambda: pyro.plate("inner", 3, dim=-2)(pyro.sample)("z", dist.Normal(0.0, 1.0)),
            "may lie in plate 'data' alone",
        ),
        (
            lambda: pyro.sample("z", dist.Uniform(0.0, DATA)),
            "support of site 'z' differs between data",
        ),
    ],
)
def test_models_it_cannot_do(site: Callable, match: str) -> None:
    guide = small(in_plate(site))
    for _ in range(2):  # a guide that has failed fails again
        with pytest.raises(ValueError, match=match):
            guide()


def test_sequential_plates_are_refused() -> None:
    def model() -> None:
        for i in pyro.plate("data", 3):
            z = pyro.sample(f"z_{i}", dist.Normal(0.0, 1.0))
            pyro.sample(f"x_{i}", dist.Normal(z, 1.0), obs=DATA[i])

    with pytest.raises(ValueError, match="'data' is sequential"):
        small(model)()


def test_unusable_observations() -> None:
    with pytest.raises(ValueError, match="NaN or infinities"), pyro.validation_enabled(False):
        small()(torch.tensor([1.0, torch.nan]))
    guide = small(only_rows)
    guide(torch.randn(4, 3))
    with pytest.raises(ValueError, match=r"reads 3 features .* got 2"):
        guide(torch.randn(4, 2))


def only_rows(rows: Tensor) -> None:
    with pyro.plate("data", len(rows)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z.unsqueeze(-1), 1.0).expand(rows.shape).to_event(1), obs=rows)
