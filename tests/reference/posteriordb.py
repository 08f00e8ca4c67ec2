"""Pyro models of reference posteriors from posteriordb, with long MCMC runs to compare to.

Sites carry the names of the Stan parameters. Every model works unchanged inside a particle plate.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from torch import Tensor

from tests.reference import Flat, reference_folder

Draws = dict[str, Tensor]


def garch11(y: Tensor, initial_scale: float) -> None:
    """Model a series whose variance follows its own past and the last squared residual."""
    mu = pyro.sample("mu", Flat(constraints.real, (), ()))
    alpha0 = pyro.sample("alpha0", Flat(constraints.positive, (), ()))
    alpha1 = pyro.sample("alpha1", dist.Uniform(0.0, 1.0))
    # Guides freeze each support at its first value, so beta1 in (0, 1 - alpha1) is rescaled.
    fraction = pyro.sample("beta1_fraction", dist.Uniform(0.0, 1.0))
    beta1 = pyro.deterministic("beta1", fraction * (1 - alpha1))
    pyro.factor("beta1_jacobian", torch.log1p(-alpha1))

    squares = (y - mu.unsqueeze(-1)).square()
    variances = [torch.full_like(squares[..., 0], initial_scale**2)]
    for square in squares[..., :-1].unbind(-1):
        variances.append(alpha0 + alpha1 * square + beta1 * variances[-1])
    scale = torch.stack(variances, -1).sqrt()
    pyro.sample("y", dist.Normal(mu.unsqueeze(-1), scale).to_event(1), obs=y)


def hmm_example(y: Tensor) -> None:
    """Model a series driven by a hidden Markov chain with two states."""
    theta1 = pyro.sample("theta1", dist.Dirichlet(torch.ones(2)))
    theta2 = pyro.sample("theta2", dist.Dirichlet(torch.ones(2)))
    mu = pyro.sample("mu", Flat(constraints.positive_ordered_vector, (), (2,)))
    pyro.factor("mu_prior", dist.Normal(torch.tensor([3.0, 10.0]), 1.0).log_prob(mu).sum(-1))

    transition = torch.stack([theta1, theta2], -2).log()
    emission = dist.Normal(mu.unsqueeze(-2), 1.0).log_prob(y.unsqueeze(-1))
    pyro.factor("y", sum_over_paths(transition, emission))


def sum_over_paths(transition: Tensor, emission: Tensor) -> Tensor:
    """Sum out the states of a hidden Markov chain by the forward algorithm, in logarithms.

    The first state has no prior term: every state starts with weight one.
    """
    first, *others = emission.unbind(-2)
    forward = first
    for step in others:
        forward = step + torch.logsumexp(forward.unsqueeze(-1) + transition, -2)
    return forward.logsumexp(-1)


def ark(y: Tensor, order: int) -> None:
    """Model a series by a linear autoregression."""
    alpha = pyro.sample("alpha", dist.Normal(0.0, 10.0))
    beta = pyro.sample("beta", dist.Normal(0.0, 10.0).expand([order]).to_event(1))
    sigma = pyro.sample("sigma", dist.HalfCauchy(2.5))
    lags = y.unfold(0, order, 1)[:-1].flip(-1)
    with pyro.plate("times", len(lags)):
        mean = alpha + torch.einsum("...i,...i->...", lags, beta)
        pyro.sample("y", dist.Normal(mean, sigma), obs=y[order:])


def low_dim_gauss_mix(y: Tensor) -> None:
    """Model data by a mixture of two Gaussians, ordered by their means."""
    mu = pyro.sample("mu", Flat(constraints.ordered_vector, (), (2,)))
    pyro.factor("mu_prior", dist.Normal(0.0, 2.0).log_prob(mu).sum(-1))
    sigma = pyro.sample("sigma", dist.HalfNormal(2.0).expand([2]).to_event(1))
    theta = pyro.sample("theta", dist.Beta(5.0, 5.0))
    weights = dist.Categorical(torch.stack([theta, 1 - theta], -1))
    with pyro.plate("observations", len(y)):
        pyro.sample("y", dist.MixtureSameFamily(weights, dist.Normal(mu, sigma)), obs=y)


def kilpisjarvi(
    x: Tensor, y: Tensor, alpha_prior: tuple[float, float], beta_prior: tuple[float, float]
) -> None:
    """Model summer temperatures by a line over the years."""
    alpha = pyro.sample("alpha", dist.Normal(*alpha_prior))
    beta = pyro.sample("beta", dist.Normal(*beta_prior))
    sigma = pyro.sample("sigma", Flat(constraints.positive, (), ()))
    with pyro.plate("years", len(y)):
        pyro.sample("y", dist.Normal(alpha + beta * x, sigma), obs=y)


def nes2000(x: Tensor, y: Tensor) -> None:
    """Model party identification by a linear regression with flat priors."""
    beta = pyro.sample("beta", Flat(constraints.real_vector, (), x.shape[-1:]))
    sigma = pyro.sample("sigma", Flat(constraints.positive, (), ()))
    with pyro.plate("respondents", len(y)):
        mean = torch.einsum("...i,...i->...", x, beta)
        pyro.sample("y", dist.Normal(mean, sigma), obs=y)


def eight_schools(y: Tensor, sigma: Tensor) -> None:
    """Model the effects of coaching in eight schools, centred on their population."""
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("schools", len(y)):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        pyro.sample("y", dist.Normal(theta, sigma), obs=y)


def eight_schools_noncentred(y: Tensor, sigma: Tensor) -> None:
    """Model the effects of coaching in eight schools by standardised effects."""
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("schools", len(y)):
        theta_trans = pyro.sample("theta_trans", dist.Normal(0.0, 1.0))
        theta = pyro.deterministic("theta", mu + tau * theta_trans)
        pyro.sample("y", dist.Normal(theta, sigma), obs=y)


@dataclass(frozen=True)
class ReferencePosterior:
    """Hold a model, its data and what is known of its posterior.

    Attributes:
        name: Name of the posterior.
        model: Pyro model, called with ``args``.
        args: Data, in the default precision.
        log_evidence: Logarithm of the evidence, flat priors counted as density one.
        draws: Ten chains of 1000 draws, end to end, of every latent and deterministic site, in
            double precision and of shape ``(10_000, *shape)``.
    """

    name: str
    model: Callable[..., None]
    args: tuple[Any, ...]
    log_evidence: float
    draws: Draws


@dataclass(frozen=True)
class _Source:
    """Say how to build a reference posterior from its files."""

    model: Callable[..., None]
    log_evidence: float
    arguments: Callable[[dict[str, Any]], tuple[Any, ...]]
    complete: Callable[[Draws], Draws] = lambda draws: draws
    file: str | None = None


def _vector(values: Sequence[float] | np.ndarray) -> Tensor:
    return torch.tensor(values, dtype=torch.get_default_dtype())


def _nes2000_arguments(data: dict[str, Any]) -> tuple[Tensor, Tensor]:
    age = np.array(data["age_discrete"])
    ages = [age == group for group in (2, 3, 4)]
    answers = [data[name] for name in ("educ1", "gender", "income")]
    columns = [np.ones_like(age), data["real_ideo"], data["race_adj"], *ages, *answers]
    return torch.stack([_vector(column) for column in columns], -1), _vector(data["partyid7"])


def _kilpisjarvi_arguments(data: dict[str, Any]) -> tuple[Any, ...]:
    priors = (data["pmualpha"], data["psalpha"]), (data["pmubeta"], data["psbeta"])
    return _vector(data["x"]), _vector(data["y"]), *priors


def _schools_arguments(data: dict[str, Any]) -> tuple[Tensor, Tensor]:
    return _vector(data["y"]), _vector(data["sigma"])


def _with_fraction(draws: Draws) -> Draws:
    return draws | {"beta1_fraction": draws["beta1"] / (1 - draws["alpha1"])}


def _with_standardised_effects(draws: Draws) -> Draws:
    mu, tau = draws["mu"].unsqueeze(-1), draws["tau"].unsqueeze(-1)
    return draws | {"theta_trans": (draws["theta"] - mu) / tau}


_SOURCES = {
    "garch11": _Source(
        garch11, -451.001, lambda data: (_vector(data["y"]), data["sigma1"]), _with_fraction
    ),
    "hmm_example": _Source(hmm_example, -172.705, lambda data: (_vector(data["y"]),)),
    "ark": _Source(ark, 58.593, lambda data: (_vector(data["y"]), data["K"])),
    "low_dim_gauss_mix": _Source(low_dim_gauss_mix, -2115.696, lambda data: (_vector(data["y"]),)),
    "kilpisjarvi": _Source(kilpisjarvi, -103.223, _kilpisjarvi_arguments),
    "nes2000": _Source(nes2000, -957.127, _nes2000_arguments),
    "eight_schools": _Source(eight_schools, -31.3113, _schools_arguments),
    "eight_schools_noncentred": _Source(
        eight_schools_noncentred,
        -31.3113,
        _schools_arguments,
        _with_standardised_effects,
        file="eight_schools",
    ),
}


def names() -> tuple[str, ...]:
    """List the reference posteriors."""
    return tuple(_SOURCES)


def load(name: str) -> ReferencePosterior:
    """Read a reference posterior from the reference folder."""
    source = _SOURCES[name]
    stem = reference_folder() / "posteriordb" / (source.file or name)
    data = json.loads(stem.with_suffix(".data.json").read_text())
    with np.load(stem.with_suffix(".draws.npz")) as archive:
        draws = _group(archive["names"], archive["draws"])
    return ReferencePosterior(
        name, source.model, source.arguments(data), source.log_evidence, source.complete(draws)
    )


def _group(parameters: np.ndarray, draws: np.ndarray) -> Draws:
    """Flatten the chains and gather the columns ``beta[1]``, ``beta[2]``, ... into ``beta``."""
    columns: dict[str, list[int]] = {}
    for index, parameter in enumerate(parameters):
        site, _, _ = str(parameter).partition("[")
        columns.setdefault(site, []).append(index)
    flat = torch.tensor(draws).flatten(0, 1)
    return {site: flat[:, indices].squeeze(-1) for site, indices in columns.items()}
