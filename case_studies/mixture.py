"""Six equal modes: a mixture whose components have no names.

Numbers come from three normal distributions of unit scale in equal parts; where are their means?
The likelihood does not change when components swap their labels, nor does the prior, so the
posterior has 3! = 6 modes of mass 1/6 each [1]. Which point belongs to which component is summed
out. The means of a labelling and its mirror images make a hexagon, seen along the diagonal.

Fitted as it stands, a guide settles in part of the hexagon, and what it draws tells it little of
the rest: in two modes of six its ELBO falls short by log 3 at least. Fits from other starts settle
elsewhere, which restarts reveal. A fit that begins at a high temperature sees one broad hill, which
parts into the modes as it cools. Modes part suddenly, and a guide that has lost one does not get it
back: it has to see enough of the target at each step, and take small ones. With 1024 draws a step
it kept all six modes from each of the eight seeds that were tried; with 256, the default, from one
of three. The other two lost the same pair of modes, and their R-hat was 1.001: fits that disagree
are wrong, fits that agree need not be right. The other way out is a model without the symmetry:
means in ascending order. It has a sixth of the evidence, and one mode. (The rough run, ``--fast``,
cools in a hurry.)

The truth: the evidence is an integral over three means, done on a grid; each labelling has mass
1/6. What to look at: the share of draws in each labelling (a < b < c and so on), the gap between
ELBO and exact log evidence, R-hat between restarts, and the picture.

[1] A. Jasra, C. C. Holmes, D. A. Stephens. Markov chain Monte Carlo methods and the label switching
    problem in Bayesian mixture modeling. Statistical Science, 2005.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
import pyro
import pyro.distributions as dist
import torch
from pyro.distributions.transforms import OrderedTransform
from pyro.infer.autoguide import init_to_sample
from torch import Tensor

import pyroflows as pf
from pyroflows.plots import plot_pair

from .command_line import parse, save_figure, write_json

CENTRES = [-2.5, 0.0, 2.5]
NUM_POINTS = 30
PRIOR_SCALE = 5.0
LABELLINGS = list(itertools.permutations(range(3)))
NAMES = [" < ".join("abc"[i] for i in labelling) for labelling in LABELLINGS]

PLAIN = {"num_steps": 300, "num_restarts": 3}
COOLED = {
    "num_steps": 2000,
    "num_restarts": 2,
    "num_particles": 1024,
    "initial_temperature": 20.0,
    "learning_rate": 2e-3,
}
ORDERED = {"num_steps": 300}
FAST = {"num_steps": 150, "num_particles": 64}
FAST_COOLED = {"num_steps": 600, "num_particles": 256}


def observe() -> Tensor:
    """Return the points ``(30,)``."""
    generator = torch.Generator().manual_seed(0)
    component = torch.arange(NUM_POINTS) % 3
    return torch.tensor(CENTRES)[component] + torch.randn(NUM_POINTS, generator=generator)


def draw_points(means: Tensor, y: Tensor) -> None:
    """Draw points from three normal distributions, memberships summed out."""
    components = dist.Normal(means, 1.0)
    with pyro.plate("point", len(y)):
        memberships = dist.Categorical(logits=torch.zeros_like(means))
        pyro.sample("y", dist.MixtureSameFamily(memberships, components), obs=y)


def unordered(y: Tensor) -> None:
    """Draw three means, alike."""
    means = pyro.sample("means", dist.Normal(y.new_zeros(3), PRIOR_SCALE).to_event(1))
    draw_points(means, y)


def ordered(y: Tensor) -> None:
    """Draw three means in ascending order: a sixth of the prior above."""
    normal = dist.Normal(y.new_zeros(3), PRIOR_SCALE).to_event(1)
    ascending = dist.TransformedDistribution(normal, [OrderedTransform()]).mask(False)  # flat
    means = pyro.sample("means", ascending)
    pyro.factor("prior", normal.log_prob(means))
    draw_points(means, y)


def exact_log_evidence(y: Tensor, bound: float = 8.0, cells: int = 100) -> float:
    """Integrate over the three means on a grid, which is exact for so smooth a density."""
    axis = torch.linspace(-bound, bound, cells + 1, dtype=torch.float64)
    density = dist.Normal(axis.unsqueeze(-1), 1.0).log_prob(y.double().cpu()).exp() / 3
    log_prior = dist.Normal(0.0, PRIOR_SCALE).log_prob(axis)
    pairs = density.unsqueeze(1) + density
    slices = [
        ((pairs + third).log().sum(-1) + log_prior.unsqueeze(-1) + log_prior + prior).flatten()
        for third, prior in zip(density, log_prior, strict=True)
    ]
    log_volume = 3 * math.log(2 * bound / cells)
    return torch.stack([part.logsumexp(0) for part in slices]).logsumexp(0).item() + log_volume


def shares(means: Tensor) -> list[float]:
    """Return how many of the draws ``(S, 3)`` have each of the six labellings."""
    labels = means.argsort(-1).cpu()
    return [
        (labels == torch.tensor(labelling)).all(-1).double().mean().item()
        for labelling in LABELLINGS
    ]


def start_anywhere(model: Callable) -> pf.AutoSpline:
    """Build a guide that starts at a draw from the prior."""
    return pf.AutoSpline(model, init_loc_fn=init_to_sample)


def describe(result: pf.VariationalPosterior, log_evidence: float) -> dict[str, float]:
    """Compare a fit with the truth."""
    plain = shares(result.sample(20_000, seed=1)["means"])
    weighted = shares(result.sample(20_000, resample=True, seed=1)["means"])
    return {
        "ELBO": result.elbo,
        "gap": log_evidence - result.elbo,
        "error of log evidence": result.log_evidence - log_evidence,
        "k-hat": result.khat,
        **{f"share of {name}": share for name, share in zip(NAMES, plain, strict=True)},
        **{f"weighted {name}": share for name, share in zip(NAMES, weighted, strict=True)},
    }


def hexagon(means: Tensor) -> Tensor:
    """Look at means ``(S, 3)`` along the diagonal: points ``(S, 2)``."""
    first, second, third = means.cpu().unbind(-1)
    return torch.stack([(first - second) / 2**0.5, (first + second - 2 * third) / 6**0.5], -1)


def relabel(means: Tensor) -> Tensor:
    """Give each of the draws ``(S, 3)`` of the ordered model a labelling at random."""
    generator = torch.Generator().manual_seed(0)
    order = torch.rand(means.shape, generator=generator).argsort(-1).to(means.device)
    return means.gather(-1, order)


def draw_picture(fits: dict[str, pf.VariationalPosterior], exact: Tensor, out: Path) -> None:
    """Draw the draws of each fit, and contours of the posterior behind."""
    figure, axes = plt.subplots(1, len(fits), figsize=(3.1 * len(fits), 3.4), sharey=True)
    for ax, (name, result) in zip(axes, fits.items(), strict=True):
        plot_pair(hexagon(result.sample(2000, seed=2)["means"]), hexagon(exact), ax=ax)
        ax.set(title=f"{name}\nk-hat {result.khat:.2f}", xlabel="(a - b) / $\\sqrt{2}$", ylabel="")
        ax.set(xlim=(-5.5, 5.5), ylim=(-5.5, 5.5), aspect="equal")
    axes[0].set_ylabel("(a + b - 2c) / $\\sqrt{6}$")
    save_figure(figure, out / "modes.png")


def main() -> None:
    """Fit three ways, compare, write the files."""
    options = parse("mixture", __doc__)
    y = observe().to(options.device)
    log_evidence = exact_log_evidence(y)
    print(f"exact log evidence: {log_evidence:.4f}")
    plain, cooled, one = PLAIN, COOLED, ORDERED
    if options.fast:
        plain, cooled, one = PLAIN | FAST, COOLED | FAST_COOLED, ORDERED | FAST
    restarts = {
        name: pf.fit_restarts(unordered, start_anywhere, (y,), seed=options.seed, **budget)
        for name, budget in (("plain", plain), ("cooled", cooled))
    }
    one_mode = pf.fit(ordered, pf.AutoSpline(ordered), (y,), seed=options.seed, **one)

    fits = {
        f"{name} {i + 1}": result
        for name, group in restarts.items()
        for i, result in enumerate(group.results)
    }
    table = {name: describe(result, log_evidence) for name, result in fits.items()}
    table["ordered"] = describe(one_mode, log_evidence - math.log(len(LABELLINGS)))
    print(pd.DataFrame.from_dict(table, orient="index").round(3).T.to_string())
    rhat = {name: float(group.rhat.max()) for name, group in restarts.items()}
    print("\nlargest R-hat between restarts:", {name: round(r, 3) for name, r in rhat.items()})

    best = restarts["cooled"].best
    print(f"\nbest cooled fit: {best.verdict}")
    restarts["cooled"].to_arviz().to_netcdf(options.out / "mixture.nc")
    write_json(
        options.out / "metrics.json",
        {"log evidence": log_evidence, "fits": table, "largest R-hat": rhat},
    )
    draw_picture(
        fits, relabel(one_mode.sample(20_000, resample=True, seed=3)["means"]), options.out
    )
    print("\nwritten:", *sorted(str(path) for path in options.out.iterdir()))


if __name__ == "__main__":
    main()
