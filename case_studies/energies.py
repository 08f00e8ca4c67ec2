"""Four energies: planar flows of growing depth against splines, residual and continuous flows.

The figure with which normalizing flows came to variational inference [1]: densities proportional to
exp(-U) with two modes, waves and forks, fitted by reverse Kullback-Leibler divergence with planar
flows of 2, 8 and 32 layers. Each energy is a Pyro model: flat priors and one factor. The
normalisers are known exactly, so log Z minus the ELBO is the divergence from flow to target, in
nats.

U1 has two modes far apart, and a guide that starts from the best normal distribution would settle
in one of them. There it is fitted twice: to a tenth of the energy, where the modes are joined, and
then, from there, to the energy itself.

What to look at: how the divergence falls with depth, what planar flows of 2 layers cannot bend, the
bridges between modes, and k-hat, which stays below 0.7 where weighted draws are reliable.

[1] D. J. Rezende, S. Mohamed. Variational inference with normalizing flows. arXiv:1505.05770, 2015.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch
from torch import Tensor

import pyroflows as pf
from pyroflows.plots import plot_density

from .command_line import parse, save_figure, tabulate, write_json
from .energy_functions import BOUND, ENERGIES

ANNEALED = {"U1"}
HOT = 0.1  # inverse temperature of their first fit
HOT_STEPS = 300
NUM_DRAWS = 100_000  # behind the verdict
LIMITS = ((-BOUND, BOUND), (-BOUND, BOUND))


@dataclass(frozen=True)
class Recipe:
    """Hold a flow, its options, and those of its fit to the target."""

    flow: str
    options: dict[str, Any] = field(default_factory=dict)
    budget: dict[str, Any] = field(default_factory=dict)


# Flexible guides are thrown off by the steep walls between modes, unless they go slowly.
CAREFUL = {"num_particles": 1024, "learning_rate": 1e-3}

RECIPES = {
    "planar-2": Recipe("planar", {"num_layers": 2}),
    "planar-8": Recipe("planar", {"num_layers": 8}),
    "planar-32": Recipe("planar", {"num_layers": 32}),
    "spline": Recipe("spline_coupling", {"bins": 16}, CAREFUL),
    "residual": Recipe("residual", budget=CAREFUL),
    "cnf": Recipe("cnf", budget={"num_steps": 1000, "learning_rate": 2e-3}),
}
FAST_GUIDES = ["planar-8", "spline"]
FAST = {"num_steps": 600, "num_particles": 256, "learning_rate": 4e-3}


def fit(
    name: str, recipe: Recipe, fast: bool, seed: int, device: str
) -> tuple[pf.VariationalPosterior, dict[str, float]]:
    """Fit a guide to an energy; say how close it comes."""
    start = time.perf_counter()
    energy, annealed = ENERGIES[name], name in ANNEALED
    hot, target = torch.tensor(HOT, device=device), torch.tensor(1.0, device=device)
    budget = {"num_draws": NUM_DRAWS, **recipe.budget, **(FAST if fast else {})}
    torch.manual_seed(seed)
    guide = pf.AutoFlow(energy.model, flow=recipe.flow, **recipe.options)
    if annealed:
        pf.fit(energy.model, guide, (hot,), seed=seed, **budget | {"num_steps": HOT_STEPS})
    result = pf.fit(energy.model, guide, (target,), seed=seed, warm_start=not annealed, **budget)
    return result, {
        "KL": energy.log_normaliser - result.elbo,
        "standard error": result.elbo_standard_error,
        "k-hat": result.khat,
        "error of log Z": result.log_evidence - energy.log_normaliser,
        "seconds": time.perf_counter() - start,
    }


def density_of(result: pf.VariationalPosterior) -> Callable[[Tensor], Tensor]:
    """Return a fitted guide's log-density as a function of points in the plane."""

    def log_prob(z: Tensor) -> Tensor:
        return result.log_prob({"z1": z[:, 0], "z2": z[:, 1]})

    return log_prob


def draw_picture(
    results: dict[str, dict[str, pf.VariationalPosterior]], device: str, out: Path
) -> None:
    """Draw the targets, one a row, and beside each the densities of its guides."""
    rows, columns = len(results), 1 + len(next(iter(results.values())))
    figure, axes = plt.subplots(rows, columns, figsize=(2.4 * columns, 2.6 * rows), squeeze=False)
    for row, (name, guides) in zip(axes, results.items(), strict=True):
        energy = ENERGIES[name]
        plot_density(lambda z, e=energy: -e.potential(z), LIMITS, device=device, ax=row[0])
        row[0].set_title(name)
        for ax, (label, result) in zip(row[1:], guides.items(), strict=True):
            plot_density(density_of(result), LIMITS, device=device, ax=ax)
            ax.set_title(f"{label}\nKL {energy.log_normaliser - result.elbo:.3f}")
        for ax in row:
            ax.set(xticks=[], yticks=[])
    save_figure(figure, out / "energies.png")


def main() -> None:
    """Fit every guide to every energy, print the table, write the files."""
    options = parse("energies", __doc__, energies=ENERGIES, guides=RECIPES)
    guides = options.guides or (FAST_GUIDES if options.fast else list(RECIPES))
    results: dict[str, dict[str, pf.VariationalPosterior]] = {}
    metrics: dict[str, dict[str, dict[str, float]]] = {}
    for name in options.energies or list(ENERGIES):
        results[name], metrics[name] = {}, {}
        for label in guides:
            results[name][label], metrics[name][label] = fit(
                name, RECIPES[label], options.fast, options.seed, options.device
            )
            print(f"{name}, {label}: KL {metrics[name][label]['KL']:.4f}", flush=True)
        best = min(guides, key=lambda label, rows=metrics[name]: rows[label]["KL"])
        results[name][best].to_arviz().to_netcdf(options.out / f"{name}.nc")
        write_json(options.out / "metrics.json", metrics)
    print("\nKullback-Leibler divergence from guide to target, in nats:")
    print(tabulate(metrics, "KL").round(3).to_string())
    draw_picture(results, options.device, options.out)
    print("\nwritten:", *sorted(str(path) for path in options.out.iterdir()))


if __name__ == "__main__":
    main()
