"""Amortized inference: 100 000 counts, a latent rate for each, minibatches, and new data.

Counts x_i, of events at many places say, come from rates exp(z_i) that differ from place to place:
z_i ~ Normal(loc, scale), x_i ~ Poisson(exp(z_i)). A guide with parameters of its own for each z_i
grows with the data, and knows nothing of a place that it has not seen. An amortized guide [1] is
one network for all: it reads the count and gives a conditional flow for z_i. It is fitted by
minibatches, in steps that cost the same for any number of places, and answers for new counts at
once.

Equal counts have equal posteriors, so the exact answer is within reach: z is integrated out on a
grid for each distinct count, loc and scale on another. What to look at: the gap between ELBO and
log evidence for each datum; the posteriors of new counts in the picture; and the errors of loc and
scale in units of their posterior standard deviations. These are so small with so many data that an
encoder which is off by a hundredth for all places moves loc by several of them, and the noise of
minibatches leaves the ratios of standard deviations off by a factor of up to two: minibatches serve
local latent variables better than global ones. The rough run (``--fast``) has 2000 counts.

[1] D. P. Kingma, M. Welling. Auto-encoding variational Bayes. arXiv:1312.6114, 2013.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pyro
import pyro.distributions as dist
import torch
from pyro.infer.autoguide import init_to_value
from torch import Tensor

import pyroflows as pf
from pyroflows.arviz import build

from .command_line import parse, save_figure, write_json

LOC, SCALE = 1.0, 0.8  # that the counts are made with
NEW_COUNTS = [0, 1, 3, 10, 30]
BATCH = 256


def model(counts: Tensor, batch: int | None = None) -> None:
    """Model counts by log-normal rates."""
    zero = torch.zeros((), device=counts.device)
    loc = pyro.sample("loc", dist.Normal(zero, 3.0))
    scale = pyro.sample("scale", dist.HalfNormal(zero + 2.0))
    with pyro.plate("place", len(counts), subsample_size=batch) as index:
        z = pyro.sample("z", dist.Normal(loc, scale))
        pyro.sample("count", dist.Poisson(z.exp()), obs=counts[index])


def log_counts(index: Tensor, counts: Tensor, batch: int | None = None) -> Tensor:
    """Return what the encoder reads: logarithms suit counts of all sizes."""
    return counts[index].log1p().unsqueeze(-1)


def simulate(number: int, seed: int) -> Tensor:
    """Draw counts."""
    generator = torch.Generator().manual_seed(seed)
    z = LOC + SCALE * torch.randn(number, generator=generator)
    return torch.poisson(z.exp(), generator=generator)


@dataclass(frozen=True)
class Exact:
    """Hold the exact posterior on grids: weights of pairs of loc and scale, densities of z."""

    log_evidence: float
    loc: Tensor
    scale: Tensor
    weights: Tensor
    z: Tensor

    def moments(self, name: str) -> tuple[float, float]:
        """Return the posterior mean and standard deviation of ``loc`` or ``scale``."""
        return _moments(getattr(self, name), self.weights)

    def local(self, count: int) -> Tensor:
        """Return the posterior mass of each ``z`` of the grid for a new count."""
        joint = (
            _prior(self.loc, self.scale, self.z)
            * _likelihood(torch.tensor(float(count)), self.z).exp()
        )
        return self.weights @ (joint / joint.sum(-1, keepdim=True))


def exact_posterior(counts: Tensor) -> Exact:
    """Integrate the model: z on one grid, loc and scale on another around their likeliest values.

    For smooth functions that vanish at the ends the error of the trapezoidal rule is far below
    that of floating point numbers of 32 bits.
    """
    distinct, numbers = counts.double().cpu().unique(return_counts=True)
    z = torch.linspace(-8.0, 9.0, 681, dtype=torch.float64)
    likelihood = _likelihood(distinct.unsqueeze(-1), z)
    peak = likelihood.amax(-1)
    relative = (likelihood - peak.unsqueeze(-1)).exp()

    def log_joint(loc: Tensor, scale: Tensor) -> Tensor:
        terms = (relative @ _prior(loc, scale, z).T).log() + peak.unsqueeze(-1)
        prior = dist.Normal(0.0, 3.0).log_prob(loc) + dist.HalfNormal(2.0).log_prob(scale)
        return prior + (numbers.unsqueeze(-1) * terms).sum(0)

    # Coarse grids find the place, the last holds the posterior, 8 standard deviations wide.
    centre, width = torch.tensor([1.0, 1.0]).double(), torch.tensor([0.9, 0.9]).double()
    for _ in range(4):
        loc, scale = (c + w * torch.linspace(-1, 1, 33).double() for c, w in zip(centre, width))
        loc, scale = (v.flatten() for v in torch.meshgrid(loc, scale, indexing="ij"))
        log_weights = log_joint(loc, scale)
        weights = log_weights.softmax(0)
        moments = [_moments(v, weights) for v in (loc, scale)]
        cell = (2 * width / 32).prod().log()
        centre = torch.tensor([mean for mean, _ in moments]).double()
        width = torch.tensor([max(8 * sd, w / 8) for (_, sd), w in zip(moments, width)]).double()
    return Exact(float(log_weights.logsumexp(0) + cell), loc, scale, weights, z)


def _prior(loc: Tensor, scale: Tensor, z: Tensor) -> Tensor:
    """Return masses ``(pairs, grid)`` of z given pairs of loc and scale."""
    density = dist.Normal(loc.unsqueeze(-1), scale.unsqueeze(-1)).log_prob(z).exp()
    return density * (z[1] - z[0])


def _likelihood(count: Tensor, z: Tensor) -> Tensor:
    """Return log-probabilities of counts, which broadcast with z."""
    return dist.Poisson(z.exp()).log_prob(count)


def _moments(values: Tensor, weights: Tensor) -> tuple[float, float]:
    mean = (weights * values).sum()
    return float(mean), float((weights * (values - mean).square()).sum().sqrt())


def small_flow(dim: int) -> pf.transforms.FlowTransform:
    """Build the flow of loc and scale: so many data leave them a narrow, almost normal posterior.

    Steps of a large network would throw it about by many of its standard deviations.
    """
    return pf.flow("realnvp", dim, num_layers=2, hidden_dims=(8,))


def match_moments(counts: Tensor) -> tuple[Tensor, Tensor]:
    """Return loc and scale that give counts the mean and the variance that they have."""
    mean, variance = counts.mean(), counts.var()
    spread = (1 + (variance - mean) / mean.square()).log()  # of the logarithms of the rates
    return mean.log() - spread / 2, spread.sqrt()


def fit(counts: Tensor, num_steps: int, seed: int) -> pf.VariationalPosterior:
    """Fit the guide by minibatches."""
    loc, scale = match_moments(counts)
    pyro.set_rng_seed(seed)  # of the networks' first weights
    guide = pf.AmortizedFlow(
        model,
        "place",
        num_layers=2,
        features=log_counts,
        global_flow=small_flow,
        init_loc_fn=init_to_value(values={"loc": loc, "scale": scale}),
        init_scale=0.02,
    )
    return pf.fit(model, guide, (counts, BATCH), num_steps=num_steps, num_particles=2, seed=seed)


def compare(guide: pf.AmortizedFlow, exact: Exact, counts: Tensor) -> tuple[pd.DataFrame, dict]:
    """Compare the guide with the exact posterior; return the table, and draws for new counts."""
    new = torch.tensor(NEW_COUNTS, dtype=counts.dtype, device=counts.device)
    draws = {name: value.double().cpu() for name, value in guide.sample(20_000, new).items()}
    truths = {name: (exact.moments(name), draws[name]) for name in ("loc", "scale")}
    for i, count in enumerate(NEW_COUNTS):
        truths[f"z | {count}"] = (_moments(exact.z, exact.local(count)), draws["z"][:, i])
    rows = {
        name: {
            "exact mean": mean,
            "exact sd": sd,
            "error of mean, in sd": (values.mean().item() - mean) / sd,
            "ratio of sd": values.std().item() / sd,
        }
        for name, ((mean, sd), values) in truths.items()
    }
    return pd.DataFrame.from_dict(rows, orient="index"), draws


def to_arviz(draws: dict[str, Tensor]) -> Any:
    """Return draws for the new counts as an ArviZ object."""
    groups = {
        "posterior": {name: value.numpy()[None] for name, value in draws.items()},
        "observed_data": {"count": np.array(NEW_COUNTS)},
    }
    return build(groups, dims={"z": ["place"], "count": ["place"]})


def draw_pictures(exact: Exact, draws: dict[str, Tensor], losses: Tensor, out: Path) -> None:
    """Draw posteriors of new counts beside the exact ones, and the course of the fit."""
    figure, axes = plt.subplots(1, len(NEW_COUNTS), figsize=(3 * len(NEW_COUNTS), 3))
    for i, (ax, count) in enumerate(zip(axes, NEW_COUNTS, strict=True)):
        ax.hist(draws["z"][:, i].numpy(), bins=60, density=True, alpha=0.5, label="amortized")
        ax.plot(exact.z, exact.local(count) / (exact.z[1] - exact.z[0]), "k", label="exact")
        ax.set_xlim(*np.quantile(draws["z"][:, i].numpy(), [0.0005, 0.9995]))
        ax.set_title(f"z of a new count of {count}")
    axes[0].legend()
    save_figure(figure, out / "new_counts.png")

    figure, ax = plt.subplots(figsize=(6, 4))
    ax.plot(pd.Series(losses.numpy()).rolling(50, min_periods=1).median())
    ax.axhline(-exact.log_evidence, color="k", label="exact")
    spread = np.quantile(losses[len(losses) // 4 :], [0.01, 0.99])
    ax.set_ylim(min(spread[0], -exact.log_evidence), spread[1])
    ax.set(xlabel="step", ylabel="negative ELBO, median of 50 minibatches")
    ax.legend()
    save_figure(figure, out / "elbo.png")


def main() -> None:
    """Fit the guide, print the table, write the files."""
    options = parse("amortized", __doc__)
    number, num_steps = (2000, 600) if options.fast else (100_000, 1500)
    counts = simulate(number, options.seed).to(options.device)
    exact = exact_posterior(counts)
    clock = time.perf_counter()
    result = fit(counts, num_steps, options.seed)
    seconds = time.perf_counter() - clock
    table, draws = compare(result.guide, exact, counts)
    gap = (exact.log_evidence - result.elbo) / number
    print(f"{number} counts, exact log evidence {exact.log_evidence:.2f}")
    print(f"ELBO {result.elbo:.2f}, standard error {result.elbo_standard_error:.2f}")
    print(f"gap for each datum: {gap:.5f} nats; fitted and weighed in {seconds:.0f} seconds")
    print(result.verdict)
    print(table.round(4).to_string())
    metrics = {"log evidence": exact.log_evidence, **result.scalars(), "gap for each datum": gap}
    metrics |= {"seconds": seconds, "posterior": table.to_dict(orient="index")}
    write_json(options.out / "metrics.json", metrics)
    to_arviz(draws).to_netcdf(options.out / "amortized.nc")
    draw_pictures(exact, draws, result.losses, options.out)
    print("\nwritten:", *sorted(str(path) for path in options.out.iterdir()))


if __name__ == "__main__":
    main()
