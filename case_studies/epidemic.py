"""An epidemic: infection and recovery rates from ten noisy counts, with predictions.

The SIR model of compartments [1]: in a population of a million, the susceptible are infected by the
infected, who recover. On ten days a thousand people are tested, which gives ten binomial counts.
What are the contact rate beta and the recovery rate gamma, and how many will be ill on other days?

The simulator is a Pyro model that solves the differential equation in torch, for all draws of the
parameters at once. Flow matching learns the posterior for any counts. With two parameters and a
likelihood that can be written down, the exact posterior can be had on a grid, to compare with.

What to look at: draws against the exact contours (parameters that make the same epidemic are
correlated: their ratio, the reproduction number, is known best); the bands of the predicted counts,
which should hold the observed ones; and how often intervals hold the truth in fresh simulations.

[1] W. O. Kermack, A. G. McKendrick. A contribution to the mathematical theory of epidemics.
    Proceedings of the Royal Society A, 1927. Priors and design as in J.-M. Lueckmann et al.,
    Benchmarking simulation-based inference, arXiv:2101.04653, 2021.
"""

from __future__ import annotations

import math
import time
from typing import Any

import matplotlib.pyplot as plt
import pyro
import pyro.distributions as dist
import torch
from torch import Tensor
from torchdiffeq import odeint

import pyroflows as pf
from pyroflows.diagnostics import sbc
from pyroflows.plots import plot_corner, plot_ecdf_pit

from .accuracy import accuracy
from .budget import Budget
from .calibration import calibration_metrics
from .command_line import parse, save_figure, write_json

POPULATION = 1_000_000
NUM_TESTED = 1000
NUM_EXACT = 20_000  # draws
STEP = 0.5  # days
TEST_DAYS = torch.linspace(16.0, 160.0, 10)
ALL_DAYS = torch.arange(1.0, 161.0)
BETA = dist.LogNormal(math.log(0.4), 0.5)
GAMMA = dist.LogNormal(math.log(1 / 8), 0.2)
NAMES = ("beta", "gamma", "beta / gamma")
TRUTH = {"beta": torch.tensor(0.3), "gamma": torch.tensor(0.12)}


def epidemic(days: Tensor = TEST_DAYS) -> Tensor:
    """Count the infected among those tested on some days."""
    beta = pyro.sample("beta", BETA)
    gamma = pyro.sample("gamma", GAMMA)
    _, infected, _ = compartments(beta, gamma, days).unbind(-1)
    return pyro.sample("x", dist.Binomial(NUM_TESTED, infected.clamp(0, 1)).to_event(1))


def compartments(beta: Tensor, gamma: Tensor, days: Tensor = TEST_DAYS) -> Tensor:
    """Return the shares of susceptible, infected, recovered ``(*batch, days, 3)`` of the people."""

    def rates(_: Tensor, state: Tensor) -> Tensor:
        susceptible, infected, _ = state.unbind(-1)
        infections, recoveries = beta * susceptible * infected, gamma * infected
        return torch.stack([-infections, infections - recoveries, recoveries], -1)

    start = torch.tensor([1 - 1 / POPULATION, 1 / POPULATION, 0.0]).expand(*beta.shape, 3)
    times = torch.cat([torch.zeros(1), days])
    shares = odeint(rates, start, times, method="rk4", options={"step_size": STEP})
    return shares[1:].movedim(0, -2)


def exact_draws(x: Tensor, num_draws: int, seed: int = 0) -> dict[str, Tensor]:
    """Draw from the exact posterior on a fine grid of log rates, after a coarse one."""
    mean = torch.tensor([BETA.loc, GAMMA.loc])
    spread = 4 * torch.tensor([BETA.scale, GAMMA.scale])
    for _ in range(3):  # each grid covers six standard deviations of what the last one has found
        grid, cell = _grid(mean - spread, mean + spread)
        mass = _log_joint(grid, x).softmax(0).unsqueeze(-1)
        mean = (mass * grid).sum(0)
        spread = 6 * ((mass * (grid - mean).square()).sum(0) + cell.square()).sqrt()
    generator = torch.Generator().manual_seed(seed)
    index = torch.multinomial(mass.squeeze(-1), num_draws, replacement=True, generator=generator)
    jitter = torch.rand(num_draws, 2, generator=generator) - 0.5
    beta, gamma = (grid[index] + jitter * cell).exp().unbind(-1)
    return {"beta": beta, "gamma": gamma}


def _grid(low: Tensor, high: Tensor, size: int = 120) -> tuple[Tensor, Tensor]:
    axes = [torch.linspace(*ends, size) for ends in zip(low.tolist(), high.tolist(), strict=True)]
    return torch.cartesian_prod(*axes), (high - low) / (size - 1)


def _log_joint(log_rates: Tensor, x: Tensor) -> Tensor:
    """Return the log-density of log rates ``(N, 2)`` and counts."""
    beta, gamma = log_rates.exp().unbind(-1)
    infected = compartments(beta, gamma)[..., 1].clamp(1e-9, 1)
    log_likelihood = dist.Binomial(NUM_TESTED, infected).log_prob(x).sum(-1)
    log_prior = BETA.base_dist.log_prob(beta.log()) + GAMMA.base_dist.log_prob(gamma.log())
    return log_likelihood + log_prior


def stack(draws: dict[str, Tensor]) -> Tensor:
    """Return rates and their ratio, the reproduction number, side by side."""
    beta, gamma = draws["beta"].cpu(), draws["gamma"].cpu()
    return torch.stack([beta, gamma, beta / gamma], -1)


def predict(draws: dict[str, Tensor], days: Tensor, seed: int) -> Tensor:
    """Simulate counts on some days for each of the draws: the posterior predictive."""
    rates = {name: value.cpu() for name, value in draws.items()}
    simulations = pf.sbi.simulate_at(
        epidemic, rates, kwargs={"days": days}, seed=seed, progress=False
    )
    return simulations.observations["x"]


def draw_prediction(predicted: Tensor, x: Tensor) -> plt.Figure:
    """Draw bands of the predicted counts on all days, and the observed ones."""
    figure, ax = plt.subplots(figsize=(7, 4))
    for credibility, color in ((0.9, "0.85"), (0.5, "0.65")):
        ends = torch.tensor([(1 - credibility) / 2, (1 + credibility) / 2])
        low, high = predicted.quantile(ends, dim=0)
        ax.fill_between(
            ALL_DAYS, low, high, color=color, label=f"{credibility:.0%} of predictions", linewidth=0
        )
    ax.plot(ALL_DAYS, predicted.median(0).values, color="black", label="median")
    ax.plot(TEST_DAYS, x, "o", color="tab:red", markeredgecolor="black", label="observed")
    ax.set(xlabel="day", ylabel=f"infected among {NUM_TESTED} tested", xlim=(1, 160))
    ax.legend()
    return figure


def observe(seed: int) -> Tensor:
    """Simulate the counts that are given, at known rates."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return pyro.condition(epidemic, data=TRUTH)()


def main() -> None:
    """Learn the posterior, compare it with the exact one, predict, write the files."""
    options = parse("epidemic", __doc__)
    budget, seed, out = Budget.of(options.fast), options.seed, options.out
    start = time.perf_counter()
    posterior = pf.sbi.FlowMatching(epidemic, device=options.device).fit(
        num_simulations=budget.num_simulations, seed=seed, **budget.training
    )
    seconds = time.perf_counter() - start

    x = observe(seed)
    draws = posterior.sample(budget.num_draws, x=x, seed=seed)
    learned, exact = stack(draws), stack(exact_draws(x, NUM_EXACT, seed))
    fresh = pf.sbi.simulate(epidemic, budget.num_replicates, seed=seed + 1, progress=False)
    test = sbc(posterior, fresh, num_draws=budget.num_ranked, seed=seed)
    check = pf.sbi.predictive_check(posterior, epidemic, x=x, seed=seed, progress=False)
    metrics: dict[str, Any] = {
        "simulations": budget.num_simulations,
        **accuracy(learned, exact, NAMES),
        "reproduction number, mean": learned[:, 2].mean().item(),
        "reproduction number, sd": learned[:, 2].std().item(),
        "predictive p-values": check.p_values,
        **calibration_metrics(test),
        "training seconds": seconds,
    }
    for name in ("C2ST", "reproduction number, mean", "SBC smallest p-value", "training seconds"):
        print(f"{name}: {metrics[name]:.3g}")
    write_json(out / "metrics.json", metrics)
    posterior.to_arviz(x=x, seed=seed).to_netcdf(out / "epidemic.nc")
    save_figure(
        plot_corner(learned, exact, NAMES, stack(TRUTH))[0, 0].figure, out / "posterior.png"
    )
    some = {name: value[:2000] for name, value in draws.items()}
    save_figure(draw_prediction(predict(some, ALL_DAYS, seed), x), out / "prediction.png")
    save_figure(plot_ecdf_pit(test).figure, out / "calibration.png")
    print("\nwritten:", *sorted(str(path) for path in out.iterdir()))


if __name__ == "__main__":
    main()
