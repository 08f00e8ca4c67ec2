"""What flows start from: bases, and the module that a flow holds."""

import copy
import io
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from scipy import stats
from torch import nn

import pyroflows as pf
from pyroflows.distributions import Flow, GaussianMixture, StudentT, UniformBox, standard_normal
from pyroflows.distributions.bases import DefaultBase
from pyroflows.transforms import FlowTransform, Permutation
from tests.batteries import normal, perturb

BASES: dict[str, Callable[[], nn.Module]] = {
    "student": lambda: StudentT(3),
    "student_fixed": lambda: StudentT(3, df=[2.0, 5.0, 9.0], trainable=False),
    "box": lambda: UniformBox(torch.tensor([-1.0, 0.0, 2.0]), torch.tensor([1.0, 0.5, 9.0])),
    "mixture": lambda: GaussianMixture(3, 4),
    "mixture_fixed": lambda: GaussianMixture(3, 4, trainable=False, spread=2.0, scale=0.3),
}
SWAP = Permutation([1, 0])


@pytest.fixture(params=BASES)
def base(request: pytest.FixtureRequest) -> nn.Module:
    return BASES[request.param]()


def realnvp(input_dim: int = 3, context_dim: int = 0, noise: float = 0.2) -> FlowTransform:
    torch.manual_seed(0)
    return perturb(pf.flow("realnvp", input_dim, context_dim, num_layers=2), noise)


# Every base


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gives_a_distribution_over_vectors(base: nn.Module, dtype: torch.dtype) -> None:
    distribution = base.to(dtype)()
    assert distribution.batch_shape == ()
    assert distribution.event_shape == (3,)
    x = distribution.sample((5, 2))
    assert x.shape == (5, 2, 3)
    assert x.dtype == dtype
    assert distribution.log_prob(x).shape == (5, 2)
    assert distribution.log_prob(x).isfinite().all()
    assert distribution.expand((4,)).sample((2,)).shape == (2, 4, 3)


def test_follows_its_parameters_and_its_module(base: nn.Module) -> None:
    x = base().sample((5,))
    before = base().log_prob(x)
    with torch.no_grad():
        for parameter in base.parameters():
            parameter += 0.1 * torch.rand_like(parameter)
    changed = not torch.equal(base().log_prob(x), before)
    assert changed == bool(list(base.parameters()))
    copied = copy.deepcopy(base)
    torch.testing.assert_close(copied().log_prob(x), base().log_prob(x))
    fresh = copy.deepcopy(base)
    fresh.load_state_dict(base.state_dict())
    torch.testing.assert_close(fresh().log_prob(x), base().log_prob(x))


def test_every_parameter_of_a_base_gets_a_gradient(base: nn.Module) -> None:
    parameters = list(base.parameters())
    if parameters:
        base().log_prob(base().sample((50,))).mean().backward()
    assert all(p.grad.isfinite().all() and p.grad.abs().min() > 0 for p in parameters)


def test_trainable_says_what_is_learned() -> None:
    assert {n for n, _ in GaussianMixture(2, 3).named_parameters()} == {
        "logits",
        "locs",
        "log_scales",
    }
    assert {n for n, _ in StudentT(2).named_parameters()} == {"log_df"}
    for fixed in (GaussianMixture(2, 3, trainable=False), StudentT(2, trainable=False)):
        assert not list(fixed.parameters())
        assert fixed.state_dict()


# Known values


def test_student_is_a_product_of_t_densities() -> None:
    df, x = [2.0, 5.0, 30.0], 3 * normal(50, 3, seed=1)
    expected = torch.from_numpy(stats.t.logpdf(x.numpy(), df).sum(-1))
    base = StudentT(3, df=df).double()
    torch.testing.assert_close(base().log_prob(x), expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(base.df.float(), torch.tensor(df))


def test_box_has_the_density_of_its_volume() -> None:
    base = UniformBox(torch.tensor([-1.0, 0.0]), torch.tensor([3.0, 0.5]))
    inside, outside = torch.tensor([[0.0, 0.1], [2.9, 0.4]]), torch.tensor([[0.0, 0.6]])
    torch.testing.assert_close(base().log_prob(inside).exp(), torch.tensor([0.5, 0.5]))
    assert base().log_prob(outside) == -math.inf


def test_mixture_is_a_weighted_sum_of_normal_densities() -> None:
    base = GaussianMixture(2, 3, spread=2.0).double()
    perturb(base, 0.5)
    x = 2 * normal(50, 2, seed=1)
    weights = base.logits.softmax(0)
    terms = [
        weights[k] * dist.Normal(base.locs[k], base.log_scales[k].exp()).log_prob(x).sum(-1).exp()
        for k in range(3)
    ]
    torch.testing.assert_close(base().log_prob(x), sum(terms).log())


def test_mixture_is_seeded() -> None:
    state = torch.get_rng_state()
    one, same, other = GaussianMixture(2, 5), GaussianMixture(2, 5), GaussianMixture(2, 5, seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(one.locs, same.locs)
    assert not torch.equal(one.locs, other.locs)


def test_draws_follow_the_densities() -> None:
    """Fails by chance once in 10 000 runs with fresh seeds: nine tests of level 1e-5."""
    mixture = GaussianMixture(3, 4, spread=2.0, scale=0.3)
    perturb(mixture, 0.3)
    weights, scales = mixture.logits.softmax(0).detach().numpy(), mixture.log_scales.exp()

    def mixture_cdf(entry: int) -> Callable[[np.ndarray], np.ndarray]:
        locs, widths = mixture.locs[:, entry].detach().numpy(), scales[:, entry].detach().numpy()
        return lambda x: stats.norm.cdf(x[:, None], locs, widths) @ weights

    cases = [(mixture, mixture_cdf(entry)) for entry in range(3)]
    cases += [(StudentT(3, df=3.0), stats.t(3.0).cdf)] * 3
    cases += [(UniformBox(-torch.ones(3), torch.ones(3)), stats.uniform(-1, 2).cdf)] * 3
    for index, (base, cdf) in enumerate(cases):
        draws = base().sample((10_000,))[:, index % 3].numpy()
        assert stats.kstest(draws, cdf).pvalue > 1e-5


# Gradients of draws


def test_draws_of_students_have_gradients() -> None:
    base = StudentT(3)
    base().rsample((100,)).square().sum().backward()
    assert (base.log_df.grad != 0).all()


def test_draws_of_mixtures_have_gradients_only_where_nothing_is_learned() -> None:
    learned, fixed = GaussianMixture(3, 2), GaussianMixture(3, 2, trainable=False)
    assert not learned().has_rsample
    for draw in (learned().rsample, Flow(learned, realnvp()).rsample_and_log_prob):
        with pytest.raises(NotImplementedError, match=r"not differentiable.*trainable=False"):
            draw((5,))
    assert Flow(learned, realnvp()).sample((5,)).shape == (5, 3)
    flow = Flow(fixed, realnvp())
    assert flow.has_rsample
    x, log_prob = flow.rsample_and_log_prob((5,))
    torch.testing.assert_close(log_prob, flow.log_prob(x.detach()), rtol=0, atol=1e-4)
    (log_prob + x.square().sum(-1)).mean().backward()
    assert all(p.grad.isfinite().all() for p in flow.parameters())


# Flows of such bases


def test_a_flow_learns_its_base(base: nn.Module) -> None:
    f = realnvp()
    flow = Flow(base, f)
    with torch.no_grad():
        x = flow.sample((7,))
    z, log_det = f.inverse_and_log_det(x)
    torch.testing.assert_close(flow.log_prob(x), base().log_prob(z) + log_det)
    assert {id(p) for p in flow.parameters()} == {
        id(p) for p in [*base.parameters(), *f.parameters()]
    }
    perturb(base, 0.1)
    torch.testing.assert_close(flow.log_prob(x), base().log_prob(z) + log_det)
    assert flow.base is base
    flow.log_prob(x).sum().backward()
    assert all(p.grad is not None for p in flow.parameters())


def test_a_flow_of_a_base_takes_batches_and_contexts(base: nn.Module) -> None:
    flow = Flow(base, realnvp(3, context_dim=2))
    conditioned = flow.condition(torch.ones(5, 2))
    assert conditioned.batch_shape == (5,)
    assert conditioned.sample((4,)).shape == (4, 5, 3)
    assert conditioned.log_prob(torch.ones(3)).shape == (5,)
    draws = conditioned.base_dist.sample()
    assert not torch.equal(draws[0], draws[1])
    expanded = Flow(base, realnvp()).expand((2, 5))
    assert expanded.sample((4,)).shape == (4, 2, 5, 3)
    assert flow.expand((2, 1)).condition(torch.ones(5, 2)).batch_shape == (2, 5)
    assert {id(p) for p in conditioned.parameters()} == {id(p) for p in flow.parameters()}


def test_the_default_base_is_the_standard_normal_of_the_flow() -> None:
    f = realnvp(4)
    flow = Flow(None, f)
    x = 2 * normal(7, 4, seed=1)
    expected = Flow(standard_normal(torch.zeros(4)), f)
    torch.testing.assert_close(flow.log_prob(x.float()), expected.log_prob(x.float()))
    f.double()  # the flow itself, behind the distribution's back
    assert flow.sample((3,)).dtype == torch.float64
    assert flow.log_prob(x).dtype == torch.float64
    assert flow.to("meta").sample((3,)).is_meta
    assert Flow(None, SWAP).sample().dtype == torch.get_default_dtype()


def test_the_default_base_of_angles_is_uniform() -> None:
    class Circle(Permutation):
        domain = torch.distributions.constraints.independent(
            torch.distributions.constraints.half_open_interval(-math.pi, math.pi), 1
        )

    draws = DefaultBase(Circle([1, 0]))().sample((1000,))
    assert draws.shape == (1000, 2)
    assert 3.0 < draws.abs().max() <= math.pi
    log_prob = DefaultBase(Circle([1, 0]))().log_prob(draws)
    torch.testing.assert_close(log_prob, torch.full((1000,), -2 * math.log(2 * math.pi)))


def test_a_univariate_module_is_read_as_one_event() -> None:
    class Laplace(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.log_scale = nn.Parameter(torch.zeros(3))

        def forward(self) -> dist.Distribution:
            return dist.Laplace(torch.zeros(3), self.log_scale.exp())

    flow = Flow(Laplace(), realnvp())
    assert flow.batch_shape == ()
    assert flow.log_prob(flow.sample((5,))).shape == (5,)


def test_a_flow_with_a_fixed_base_moves_it_too() -> None:
    for given in (
        dist.StudentT(torch.full((3,), 4.0)).to_event(1),
        dist.MultivariateNormal(torch.zeros(3), torch.eye(3)),
        torch.distributions.Normal(torch.zeros(3), torch.ones(3)),
    ):
        flow = Flow(given, realnvp())
        x = flow.sample((5,))
        before = flow.log_prob(x)
        assert flow.to(torch.float64) is flow
        assert flow.sample((2,)).dtype == torch.float64
        after = flow.log_prob(x.double())
        assert after.dtype == torch.float64
        torch.testing.assert_close(after.float(), before, rtol=1e-4, atol=1e-4)
        assert given.sample().dtype == torch.float32
        assert flow.to("meta").sample((2,)).is_meta


# The module in a flow


def test_a_state_goes_from_flow_to_flow(base: nn.Module) -> None:
    flow = Flow(base, realnvp())
    perturb(flow.module, 0.1)
    x = flow.sample((5,))
    other = Flow(copy.deepcopy(base), pf.flow("realnvp", 3, num_layers=2))
    assert not torch.allclose(other.log_prob(x), flow.log_prob(x))
    other.load_state_dict(flow.state_dict())
    assert torch.equal(other.log_prob(x), flow.log_prob(x.clone()))
    names = {name for name, _ in flow.named_parameters()}
    assert names <= set(flow.state_dict())
    assert {name.split(".")[0] for name in names} <= {"base", "transform"}


def test_a_flow_is_trained_and_evaluated_as_a_module() -> None:
    flow = Flow(None, realnvp())
    assert flow.eval() is flow
    assert not flow.transform.training
    assert flow.train() is flow
    assert flow.transform.training


def test_a_flow_is_copied_and_pickled(base: nn.Module) -> None:
    flow = Flow(base, realnvp())
    x = flow.sample((5,))
    buffer = io.BytesIO()
    torch.save(flow, buffer)
    buffer.seek(0)
    for other in (copy.deepcopy(flow), torch.load(buffer, weights_only=False)):
        torch.testing.assert_close(other.log_prob(x), flow.log_prob(x))
        shared = {id(p) for p in other.parameters()} & {id(p) for p in flow.parameters()}
        assert not shared
        perturb(other.module, 0.5)
        assert not torch.allclose(other.log_prob(x), flow.log_prob(x))
    default = copy.deepcopy(Flow(None, realnvp())).to(torch.float64)
    assert default.sample().dtype == torch.float64


# Guides


@pytest.mark.parametrize(
    "given", [StudentT, lambda D: StudentT(D, df=3.0), StudentT(3)], ids=["class", "function", "it"]
)
def test_a_guide_learns_its_base(given: Any) -> None:
    given = copy.deepcopy(given)

    def model() -> None:
        pyro.sample("x", dist.StudentT(torch.full((3,), 3.0)).to_event(1))

    guide = pf.AutoRealNVP(model, num_layers=2, base=given)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 1e-2}), Trace_ELBO(num_particles=5))
    guide()
    before = guide.base.log_df.clone()
    for _ in range(3):
        svi.step()
    assert any(name.endswith("log_df") for name, _ in guide.named_parameters())
    assert (guide.base.log_df != before).all()
    assert guide.get_base_dist().base_dist.df.grad_fn is not None
    fresh = pf.AutoRealNVP(model, num_layers=2, base=copy.deepcopy(given))
    fresh.load_state_dict(guide.state_dict())
    assert torch.equal(fresh.base.log_df, guide.base.log_df)


def test_a_learned_base_is_fitted_with_the_guide() -> None:
    def model() -> None:
        pyro.sample("x", dist.StudentT(torch.full((2,), 3.0, dtype=torch.float64)).to_event(1))

    guide = pf.AutoRealNVP(model, num_layers=2, base=lambda D: StudentT(D, df=30.0))
    pf.fit(model, guide, num_steps=300, num_particles=64, progress=False, num_draws=100)
    assert guide.base.df.dtype == torch.float64
    assert (guide.base.df < 20.0).all()


# Errors


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: StudentT(0), "input_dim must be at least 1, got 0"),
        (lambda: StudentT(2, df=0.0), r"df must be positive, got 0\.0"),
        (lambda: StudentT(2, df=math.nan), "df must be positive, got nan"),
        (lambda: StudentT(2, df=[1.0, 2.0, 3.0]), r"one number or 2 of them, got shape \(3,\)"),
        (lambda: UniformBox(torch.ones(2), torch.ones(2)), "low must be below high"),
        (lambda: UniformBox(torch.zeros(2), torch.ones(3)), r"same shape.*\(2,\) and \(3,\)"),
        (lambda: GaussianMixture(2, 0), "num_components must be at least 1, got 0"),
        (lambda: GaussianMixture(0, 2), "input_dim must be at least 1, got 0"),
        (lambda: GaussianMixture(2, 2, scale=0.0), r"scale must be positive, got 0\.0"),
        (lambda: GaussianMixture(2, 2, spread=-1.0), r"spread must not be negative, got -1\.0"),
        (lambda: Flow(StudentT(3), SWAP), r"event shape \(2,\).*event shape \(3,\)"),
    ],
)
def test_impossible_bases_are_refused(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_something_else_than_a_base_is_refused() -> None:
    with pytest.raises(TypeError, match=r"base must be a distribution.*got float"):
        Flow(1.0, SWAP)


def test_impossible_expansions_are_refused() -> None:
    flow = Flow(None, realnvp(3, context_dim=2)).condition(torch.ones(5, 2))
    for batch_shape in ((3,), (), (1,)):
        with pytest.raises((ValueError, RuntimeError)):
            flow.expand(batch_shape)
