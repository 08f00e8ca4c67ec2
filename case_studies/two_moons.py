"""Two moons: a posterior of two thin crescents by flow matching, checked against the exact one.

The first test of any method for simulation-based inference [1, 2]. Two parameters, uniform in a
square, shift a point that is drawn at random from a small crescent. Only |theta_1 + theta_2| is
seen, so there are always two explanations: the posterior has two crescents, each a hundredth of the
square thick, wherever the observation lies.

Flow matching [3] learns the posterior of all observations at once: a velocity field carries normal
noise to posterior draws. The exact posterior can be drawn here, for the map from the point of the
crescent back to the parameters is a rotation: draw points, turn them back, and keep those inside
the prior. What to look at: the classifier two-sample test (0.5: a network cannot tell the draws
from exact ones; 1: it always can), the bridge between the crescents, the noise on its way to the
posterior, and whether the true parameters' ranks among the draws stay within their bands.

[1] D. S. Greenberg, M. Nonnenmacher, J. H. Macke. Automatic posterior transformation for
    likelihood-free inference. arXiv:1905.07488, 2019.
[2] J.-M. Lueckmann, J. Boelts, D. S. Greenberg, P. J. Gonçalves, J. H. Macke. Benchmarking
    simulation-based inference. arXiv:2101.04653, 2021.
[3] Y. Lipman, R. T. Q. Chen, H. Ben-Hamu, M. Nickel, M. Le. Flow matching for generative modeling.
    arXiv:2210.02747, 2022.
"""

from __future__ import annotations

import math
import time
from pathlib import Path

import matplotlib.pyplot as plt
import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

import pyroflows as pf
from pyroflows.diagnostics import SBC, c2st, sbc
from pyroflows.plots import plot_ecdf_pit

from .budget import Budget
from .calibration import calibration_metrics
from .command_line import parse, save_figure, write_json

TIMES = (0.0, 0.3, 0.6, 0.8, 0.9, 1.0)
OBSERVATIONS = ((0.0, 0.0), (-0.3, 0.5), (-0.6, 0.4))
SQUARE = {"xlim": (-1, 1), "ylim": (-1, 1), "xticks": (-1, 0, 1), "yticks": (-1, 0, 1)}


def two_moons() -> None:
    """Shift a random point of a crescent by two parameters."""
    theta = pyro.sample("theta", dist.Uniform(-1.0, 1.0).expand([2]).to_event(1))
    angle = pyro.sample("angle", dist.Uniform(-math.pi / 2, math.pi / 2))
    radius = pyro.sample("radius", dist.Normal(0.1, 0.01))
    first, second = theta.unbind(-1)
    shift = torch.stack([-(first + second).abs(), second - first], -1) / 2**0.5
    pyro.deterministic("x", crescent(angle, radius) + shift, event_dim=1)


def crescent(angle: Tensor, radius: Tensor) -> Tensor:
    """Return the points of the crescent with the given polar coordinates."""
    return torch.stack([radius * angle.cos() + 0.25, radius * angle.sin()], -1)


def exact_draws(x: Tensor, num_draws: int, seed: int = 0) -> Tensor:
    """Draw from the exact posterior: turn points of the crescent back, keep those in the prior."""
    generator = torch.Generator().manual_seed(seed)
    kept = x.new_zeros(0, 2)
    while len(kept) < num_draws:
        noise = torch.rand(3, num_draws, generator=generator)
        angle = math.pi * (noise[0] - 0.5)
        radius = 0.1 + 0.01 * torch.randn(num_draws, generator=generator)
        sum_, difference = (crescent(angle, radius) - x).unbind(-1)
        size = torch.where(noise[1] < 0.5, sum_, -sum_)
        theta = torch.stack([size + difference, size - difference], -1) / 2**0.5
        kept = torch.cat([kept, theta[(sum_ >= 0) & (theta.abs() < 1).all(-1)]])
    return kept[:num_draws]


def draw_posteriors(draws: list[Tensor], exact: list[Tensor], scores: list[float]) -> plt.Figure:
    """Draw the posterior of each observation, exact above and learned below."""
    figure, axes = plt.subplots(
        2, len(draws), figsize=(3.2 * len(draws), 6.4), sharex=True, sharey=True, squeeze=False
    )
    for i, score in enumerate(scores):
        for ax, points in zip(axes[:, i], (exact[i], draws[i]), strict=True):
            ax.plot(*points[:4000].T, ".", color="black", markersize=1)
            ax.set(**SQUARE, aspect="equal")
        axes[0, i].set_title(f"observation {i + 1}: exact")
        axes[1, i].set_title(f"learned, C2ST {score:.3f}")
        axes[1, i].set_xlabel("theta 1")
    for ax in axes[:, 0]:
        ax.set_ylabel("theta 2")
    return figure


def draw_path(path: Tensor) -> plt.Figure:
    """Draw the draws at several times of the flow, those that end right of the gap darker."""
    ends_right = path[-1].sum(-1) > 0
    figure, axes = plt.subplots(1, len(path), figsize=(2.4 * len(path), 2.8), sharey=True)
    for ax, t, points in zip(axes, TIMES, path, strict=True):
        ax.plot(*points[ends_right].T, ".", color="black", markersize=1.5)
        ax.plot(*points[~ends_right].T, ".", color="0.6", markersize=1.5)
        ax.set(**SQUARE, aspect="equal", title=f"t = {t:g}", xlabel="theta 1")
    axes[0].set_ylabel("theta 2")
    return figure


def compare(
    posterior: pf.sbi.Posterior, observations: Tensor, num_draws: int, seed: int
) -> tuple[list[Tensor], list[Tensor], list[float]]:
    """Return learned draws, exact draws and how well a classifier tells them apart."""
    draws = posterior.sample(num_draws, x=observations, seed=seed)["theta"].cpu()
    learned = [*draws.unbind(1)]
    exact = [exact_draws(x, num_draws, seed) for x in observations]
    scores = [c2st(a, b) for a, b in zip(exact, learned, strict=True)]
    return learned, exact, scores


def calibrate(posterior: pf.sbi.Posterior, budget: Budget, seed: int) -> tuple[SBC, float]:
    """Rank the true parameters of fresh simulations among draws; return the seconds it takes."""
    fresh = simulate(budget.num_replicates, seed)
    start = time.perf_counter()
    test = sbc(posterior, fresh, num_draws=budget.num_ranked, seed=seed)
    return test, time.perf_counter() - start


def simulate(num_simulations: int, seed: int) -> pf.sbi.Simulations:
    """Draw parameters and observations; angle and radius are the simulator's own noise."""
    return pf.sbi.simulate(
        two_moons, num_simulations, parameters=["theta"], seed=seed, progress=False
    )


def main() -> None:
    """Learn the posterior, compare it with the exact one, write the files."""
    options = parse("two_moons", __doc__)
    budget, seed, out = Budget.of(options.fast), options.seed, Path(options.out)
    start = time.perf_counter()
    estimator = pf.sbi.FlowMatching(two_moons, parameters=["theta"], device=options.device)
    posterior = estimator.fit(simulate(budget.num_simulations, seed), seed=seed, **budget.training)
    seconds = time.perf_counter() - start

    observations = torch.tensor(OBSERVATIONS)
    draws, exact, scores = compare(posterior, observations, budget.num_draws, seed)
    test, sbc_seconds = calibrate(posterior, budget, seed + 1)
    metrics = {
        "simulations": budget.num_simulations,
        "C2ST": scores,
        "mean C2ST": sum(scores) / len(scores),
        **calibration_metrics(test),
        "training seconds": seconds,
        "SBC seconds": sbc_seconds,
    }
    for name in ("mean C2ST", "SBC smallest p-value", "training seconds"):
        print(f"{name}: {metrics[name]:.3g}")
    write_json(out / "metrics.json", metrics)
    posterior.to_arviz(x=observations[0], seed=seed).to_netcdf(out / "two_moons.nc")
    save_figure(draw_posteriors(draws, exact, scores), out / "posteriors.png")
    path = posterior.trajectory(2000, TIMES, x=observations[0], seed=seed)["theta"].cpu()
    save_figure(draw_path(path), out / "flow.png")
    save_figure(plot_ecdf_pit(test).figure, out / "calibration.png")
    print("\nwritten:", *sorted(str(path) for path in out.iterdir()))


if __name__ == "__main__":
    main()
