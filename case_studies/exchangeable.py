"""Samples of any size: one training for 2 to 30 points, checked against the conjugate answer.

Points in a plate are exchangeable: their order tells nothing, and there may be more of them one day
than another. A permutation-invariant network [1] summarises them, and flow matching is trained on
samples of all sizes at once, parts of the simulated ones. One posterior then serves them all.

Here the points are normal with unknown mean and variance under the conjugate prior [2],

    variance ~ InverseGamma(3, 2), mean ~ Normal(0, 3 variance), x_i ~ Normal(mean, variance),

so that the exact posterior is known for each size. What to look at: that the learned posterior
narrows with the size as the exact one does, from 2 points to 30, without knowing the formula; and
that it is calibrated at each size.

[1] M. Zaheer, S. Kottur, S. Ravanbakhsh, B. Póczos, R. Salakhutdinov, A. Smola. Deep sets.
    arXiv:1703.06114, 2017.
[2] A. Gelman, J. B. Carlin, H. S. Stern, D. B. Dunson, A. Vehtari, D. B. Rubin. Bayesian data
    analysis, third edition, section 3.3, 2013.
"""

from __future__ import annotations

import time
from typing import Any

import matplotlib.pyplot as plt
import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

import pyroflows as pf
from pyroflows.diagnostics import sbc
from pyroflows.plots import plot_pair

from .accuracy import accuracy
from .budget import Budget
from .calibration import calibration_metrics
from .command_line import parse, save_figure, write_json

SHAPE, RATE, STRENGTH = 3.0, 2.0, 1 / 3  # of the prior; its strength counts as so many points
SIZES = (2, 5, 12, 30)
NUM_EXACT = 20_000  # draws
NAMES = ("mean", "log variance")
TRUTH = {"mean": torch.tensor(1.0), "variance": torch.tensor(0.5)}


def normal_points(num_points: int = SIZES[-1]) -> Tensor:
    """Draw points from a normal distribution of unknown mean and variance."""
    variance = pyro.sample("variance", dist.InverseGamma(SHAPE, RATE))
    mean = pyro.sample("mean", dist.Normal(0.0, (variance / STRENGTH).sqrt()))
    with pyro.plate("points", num_points):
        return pyro.sample("x", dist.Normal(mean, variance.sqrt()))


def exact_draws(x: Tensor, num_draws: int, seed: int = 0) -> Tensor:
    """Draw mean and log variance ``(num_draws, 2)`` from the exact posterior given points."""
    number, average = len(x), x.mean()
    strength = STRENGTH + number
    spread = (x - average).square().sum() + STRENGTH * number / strength * average.square()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        variance = dist.InverseGamma(SHAPE + number / 2, RATE + spread / 2).sample((num_draws,))
        location = number * average / strength
        mean = location + (variance / strength).sqrt() * torch.randn(num_draws)
    return torch.stack([mean, variance.log()], -1)


def stack(draws: dict[str, Tensor]) -> Tensor:
    """Return mean and log variance side by side."""
    return torch.stack([draws["mean"], draws["variance"].log()], -1).cpu()


def calibrate(posterior: pf.sbi.Posterior, size: int, budget: Budget, seed: int) -> dict[str, Any]:
    """Check the ranks of the truth among draws given fresh samples of one size."""
    fresh = pf.sbi.simulate(
        normal_points, budget.num_replicates, args=(size,), seed=seed, progress=False
    )
    return calibration_metrics(sbc(posterior, fresh, num_draws=budget.num_ranked, seed=seed))


def draw_posteriors(learned: dict[int, Tensor], exact: dict[int, Tensor]) -> plt.Figure:
    """Draw the learned posterior of each size, and contours of the exact one."""
    figure, axes = plt.subplots(
        1, len(SIZES), figsize=(2.8 * len(SIZES), 3), sharex=True, sharey=True
    )
    for ax, size in zip(axes, SIZES, strict=True):
        plot_pair(learned[size], exact[size], NAMES, ax=ax)
        ax.plot(TRUTH["mean"], TRUTH["variance"].log(), "+", color="black", markersize=14)
        ax.set(title=f"{size} points", xlim=(-2, 3), ylim=(-3, 2))
        ax.label_outer()
    return figure


def main() -> None:
    """Train once, compare with the exact posterior at each size, write the files."""
    options = parse("exchangeable", __doc__)
    budget, seed, out = Budget.of(options.fast), options.seed, options.out
    start = time.perf_counter()
    estimator = pf.sbi.FlowMatching(normal_points, min_size=SIZES[0], device=options.device)
    posterior = estimator.fit(num_simulations=budget.num_simulations, seed=seed, **budget.training)
    seconds = time.perf_counter() - start

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        x = pyro.condition(normal_points, data=TRUTH)()
    learned = {
        size: stack(posterior.sample(budget.num_draws, x=x[:size], seed=seed)) for size in SIZES
    }
    exact = {size: exact_draws(x[:size], NUM_EXACT, seed) for size in SIZES}
    metrics: dict[str, Any] = {
        "simulations": budget.num_simulations,
        "training seconds": seconds,
        "by size": {
            size: {
                **accuracy(learned[size], exact[size], NAMES),
                **calibrate(posterior, size, budget, seed + size),
            }
            for size in SIZES
        },
    }
    for size, found in metrics["by size"].items():
        print(f"{size} points: C2ST {found['C2ST']:.3f}, SBC p {found['SBC smallest p-value']:.2g}")
    write_json(out / "metrics.json", metrics)
    posterior.to_arviz(x=x, seed=seed).to_netcdf(out / "exchangeable.nc")
    save_figure(draw_posteriors(learned, exact), out / "posteriors.png")
    print("\nwritten:", *sorted(str(path) for path in out.iterdir()))


if __name__ == "__main__":
    main()
