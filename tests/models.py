"""Small models with known answers and small guides, for the tests of variational inference."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.distributions import constraints
from pyro.infer import config_enumerate
from pyro.poutine.util import prune_subsample_sites
from torch import Tensor

import pyroflows as pf
from pyroflows.svi.density import ModelDensity
from tests.reference import Flat

NAMED = (
    pf.AutoBlockAutoregressive,
    pf.AutoCNF,
    pf.AutoIAF,
    pf.AutoMAF,
    pf.AutoNICE,
    pf.AutoNeuralAutoregressive,
    pf.AutoPlanar,
    pf.AutoRadial,
    pf.AutoRealNVP,
    pf.AutoResidual,
    pf.AutoSpline,
    pf.AutoSylvester,
)
SMALL = {"num_layers": 2, "hidden_dims": (8,), "bins": 4}

GuideBuilder = Callable[..., pf.AutoFlow]


def small(kind: type[pf.AutoFlow] | str, model: Callable, **options: Any) -> pf.AutoFlow:
    """Build a small guide: a named one, or ``AutoFlow`` with a registered flow."""
    cls, name = (pf.AutoFlow, kind) if isinstance(kind, str) else (kind, kind(model).flow)
    known = inspect.signature(pf.flows.spec(name).factory).parameters
    sizes = {option: value for option, value in SMALL.items() if option in known}
    flow = {"flow": name} if cls is pf.AutoFlow else {}
    return cls(model, **{**flow, **sizes, **options})


ON_VECTORS = [name for name in pf.flows.names() if pf.flows.spec(name).support == "real"]
WITH_GUIDE = {cls(lambda: None).flow for cls in NAMED}
# Every named guide, and every registered flow of vectors that has none, by a title for the tests.
GUIDES: dict[str, GuideBuilder] = {
    **{cls.__name__: partial(small, cls) for cls in NAMED},
    **{f"AutoFlow-{name}": partial(small, name) for name in ON_VECTORS if name not in WITH_GUIDE},
}
FLOWS: dict[str, GuideBuilder] = {name: partial(small, name) for name in ON_VECTORS}
realnvp = GUIDES["AutoRealNVP"]


def over(cases: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments that parametrise a fixture over the values of a dictionary."""
    return {"params": list(cases.values()), "ids": list(cases)}


def perturb(guide: pf.AutoFlow, noise: float = 0.1) -> pf.AutoFlow:
    """Move a guide that is set up away from its near-identity start."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in guide.parameters():
            parameter.add_(noise * torch.randn(parameter.shape, generator=generator))
    return guide


def density_of(model: Callable, *args: Any, **kwargs: Any) -> ModelDensity:
    """Return a model's log-density in the coordinates of a small guide."""
    return ModelDensity(model, realnvp(model), args, kwargs)


def latent_vectors(density: ModelDensity, count: int, scale: float = 0.5, seed: int = 1) -> Tensor:
    """Draw vectors ``(count, D)`` around the start of a density's guide."""
    generator = torch.Generator().manual_seed(seed)
    start = density.guide._init_loc()
    return start + scale * torch.randn(count, len(start), generator=generator).to(start)


def log_normal(x: Tensor | float, mean: Tensor | float, sd: Tensor | float) -> Tensor:
    """Return the log-density of a normal distribution, written out."""
    log_sd = sd.log() if isinstance(sd, Tensor) else math.log(sd)
    standardised = (x - mean) / sd
    return -0.5 * standardised * standardised - log_sd - 0.5 * math.log(2 * math.pi)


# A normal mean: posterior and evidence in closed form.

HEIGHTS = torch.tensor([1.0, 2.0, 3.0, 2.5])
PRIOR_SD = 2.0


def conjugate(y: Tensor) -> None:
    """Model data by a normal distribution with a normal mean."""
    mean = pyro.sample("mean", dist.Normal(y.new_tensor(0.0), PRIOR_SD))
    with pyro.plate("item", len(y)):
        pyro.sample("y", dist.Normal(mean, 1.0), obs=y)


def conjugate_answer(y: Tensor) -> tuple[float, float, float]:
    """Return the posterior mean and standard deviation and the log evidence."""
    y = y.double()
    precision = 1 / PRIOR_SD**2 + len(y)
    covariance = torch.eye(len(y)).double() + PRIOR_SD**2
    evidence = dist.MultivariateNormal(torch.zeros(len(y)).double(), covariance)
    return float(y.sum() / precision), precision**-0.5, float(evidence.log_prob(y))


# A Gaussian in three dimensions, two sites.

GAUSSIAN_MEAN = torch.tensor([1.0, -2.0, 0.5])
GAUSSIAN_FACTOR = torch.tensor([[2.0, 0.0, 0.0], [0.8, 0.6, 0.0], [-0.5, 0.3, 1.0]])
GAUSSIAN_SD = GAUSSIAN_FACTOR.square().sum(-1).sqrt()


def gaussian() -> None:
    """Spread a Gaussian of known mean and covariance over a number and a vector."""
    a = pyro.sample("a", Flat(constraints.real, (), ()))
    b = pyro.sample("b", Flat(constraints.real_vector, (), (2,)))
    x = torch.cat([a.unsqueeze(-1), b.expand(*a.shape, 2)], -1)
    factor = GAUSSIAN_FACTOR.to(x)
    pyro.factor(
        "energy", dist.MultivariateNormal(GAUSSIAN_MEAN.to(x), scale_tril=factor).log_prob(x)
    )


# One site for each kind of support.

SUPPORTS: dict[str, Callable[[], dist.Distribution]] = {
    "real": lambda: dist.Normal(1.0, 2.0),
    "positive": lambda: dist.Gamma(3.0, 2.0),
    "interval": lambda: dist.Uniform(-1.0, 3.0),
    "vector": lambda: dist.Normal(torch.zeros(2), 1.0).to_event(1),
    "simplex": lambda: dist.Dirichlet(torch.tensor([2.0, 3.0, 4.0])),
    "ordered": lambda: dist.TransformedDistribution(
        dist.Normal(torch.zeros(3), 1.0).to_event(1), [dist.transforms.OrderedTransform()]
    ),
    "cholesky": lambda: dist.LKJCholesky(3, 2.0),
}


def with_supports(*names: str) -> Callable[[], None]:
    """Build a model with a latent site for each of some kinds of support."""

    def model() -> None:
        for name in names or SUPPORTS:
            pyro.sample(name, SUPPORTS[name]())

    return model


# Plates.


def groups(y: Tensor, observe: bool = True) -> None:
    """Model a table by effects of its rows, dim -2, and its columns, dim -1."""
    scale = pyro.sample("scale", dist.LogNormal(0.0, 0.5))
    rows = pyro.plate("row", y.shape[0], dim=-2)
    columns = pyro.plate("column", y.shape[1], dim=-1)
    with rows:
        row_effect = pyro.sample("row_effect", dist.Normal(0.0, scale))
    with columns:
        column_effect = pyro.sample("column_effect", dist.Normal(0.0, 1.0))
    with rows, columns:
        effect = pyro.deterministic("effect", row_effect + column_effect)
        pyro.sample("y", dist.Normal(effect, 1.0), obs=y if observe else None)


def groups_log_joint(values: dict[str, Tensor], y: Tensor) -> Tensor:
    """Return the log joint of ``groups`` for values stacked on the first dimension."""
    scale, rows, columns = values["scale"], values["row_effect"], values["column_effect"]
    log_scale = scale.log()
    return (
        log_normal(log_scale, 0.0, 0.5)
        - log_scale
        + log_normal(rows, 0.0, scale[:, None, None]).sum((1, 2))
        + log_normal(columns, 0.0, 1.0).sum(1)
        + log_normal(y, rows + columns[:, None, :], 1.0).sum((1, 2))
    )


TABLE = torch.tensor([[0.5, 1.0, -0.3], [2.0, 1.5, 0.7]])


def regression(x: Tensor, y: Tensor) -> None:
    """Model data by a line with a simplex among its latents."""
    weights = pyro.sample("weights", dist.Dirichlet(torch.ones(3)))
    sigma = pyro.sample("sigma", dist.HalfNormal(1.0))
    slope = pyro.deterministic("slope", 2 * weights[..., 0])
    with pyro.plate("item", len(y)):
        pyro.sample("y", dist.Normal(slope * x, sigma), obs=y)


# Discrete sites.


@config_enumerate
def mixture(y: Tensor) -> None:
    """Model data by two normal distributions, membership left to enumeration."""
    weight = pyro.sample("weight", dist.Beta(2.0, 2.0))
    means = pyro.sample("means", dist.Normal(torch.tensor([-1.0, 1.0]), 1.0).to_event(1))
    with pyro.plate("item", len(y)):
        member = pyro.sample("member", dist.Bernoulli(weight))
        mean = torch.where(member == 1, means[..., 1], means[..., 0])
        pyro.sample("y", dist.Normal(mean, 0.5), obs=y)


def mixture_log_joint(values: dict[str, Tensor], y: Tensor) -> Tensor:
    """Return the log joint of ``mixture``, membership summed out."""
    weight, means = values["weight"].unsqueeze(-1), values["means"]
    first = (1 - weight).log() + log_normal(y, means[:, :1], 0.5)
    second = weight.log() + log_normal(y, means[:, 1:], 0.5)
    prior = dist.Beta(2.0, 2.0).log_prob(weight.squeeze(-1))
    means_prior = log_normal(means, torch.tensor([-1.0, 1.0]), 1.0).sum(-1)
    return prior + means_prior + torch.logaddexp(first, second).sum(-1)


# A model that runs for one latent vector at a time only.


def one_at_a_time(y: Tensor) -> None:
    """Index a latent vector from the left, which breaks inside a plate of particles."""
    theta = pyro.sample("theta", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    with pyro.plate("item", len(y)):
        pyro.sample("y", dist.Normal(theta[0], theta[1].exp()), obs=y)


def one_at_a_time_log_joint(theta: Tensor, y: Tensor) -> Tensor:
    """Return the log joint of ``one_at_a_time`` for vectors ``(S, 2)``."""
    prior = log_normal(theta, 0.0, 1.0).sum(-1)
    return prior + log_normal(y, theta[:, :1], theta[:, 1:].exp()).sum(-1)


def sites_of(model: Callable, *args: Any) -> dict[str, dict]:
    """Return the latent sites of a model by name."""
    trace = prune_subsample_sites(poutine.trace(model).get_trace(*args))
    return dict(trace.iter_stochastic_nodes())
