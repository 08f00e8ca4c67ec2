"""A simulator that is no Pyro model: a queue in NumPy, on several processes, resumable.

Customers arrive at random and wait for one server, who takes at least so long, at most so much
longer [1]. Only departures are seen, of 50 customers: quantiles of the times between them. The
arrivals and the waiting are hidden, and integrating them out is what makes the likelihood hard.

The simulator is a function of a dict of NumPy numbers, as it might come from elsewhere.
`pf.sbi.BlackBox` joins it with a prior; `pf.sbi.simulate` runs it on a pool of processes and writes
each chunk of draws to a folder, so that a later call reads what is there and simulates what is
missing. The draws are the same whatever the number of workers.

What to look at: nobody leaves sooner after the one before than a service takes, so the posterior
of the shortest service must end at the shortest time observed; the share of draws beyond it; and
whether the calibration holds, for there is no exact posterior to compare with.

[1] M. G. B. Blum, O. François. Non-linear regression models for approximate Bayesian computation.
    arXiv:0809.4178, 2008.
"""

from __future__ import annotations

import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pyro.distributions as dist
import torch
from torch import Tensor

import pyroflows as pf
from pyroflows.diagnostics import sbc
from pyroflows.plots import plot_corner, plot_ecdf_pit

from .budget import Budget
from .calibration import calibration_metrics
from .command_line import parse, save_figure, write_json

NUM_CUSTOMERS = 50
NUM_WORKERS = 2
LEVELS = np.linspace(0, 1, 5)
PRIOR = {
    "shortest": dist.Uniform(0.0, 10.0),  # service, in minutes
    "spread": dist.Uniform(0.0, 10.0),  # from the shortest to the longest service
    "rate": dist.Uniform(0.02, 0.35),  # of arrivals, per minute
}
TRUTH = {"shortest": 4.0, "spread": 3.0, "rate": 0.15}


def queue(theta: dict[str, np.ndarray]) -> np.ndarray:
    """Simulate a queue; return quantiles of the times between departures, as logarithms."""
    arrivals = np.cumsum(np.random.exponential(1 / theta["rate"], NUM_CUSTOMERS))  # noqa: NPY002
    services = theta["shortest"] + theta["spread"] * np.random.rand(NUM_CUSTOMERS)  # noqa: NPY002
    return np.log(np.quantile(np.diff(departures(arrivals, services), prepend=0.0), LEVELS))


def departures(arrivals: np.ndarray, services: np.ndarray) -> np.ndarray:
    """Return when customers leave, who are served one after the other."""
    times = np.empty_like(arrivals)
    free = 0.0
    for i, (arrival, service) in enumerate(zip(arrivals, services, strict=True)):
        times[i] = free = max(arrival, free) + service
    return times


SIMULATOR = pf.sbi.BlackBox(PRIOR, queue)


def simulate_in_two_sittings(folder: Path, num_simulations: int, seed: int) -> tuple:
    """Draw a third of the simulations, then all of them; return these and the seconds of both."""
    seconds, batch_size = [], num_simulations // 10
    # New processes, rather than copies of this one, have no threads to inherit.
    with ProcessPoolExecutor(NUM_WORKERS, mp_context=get_context("spawn")) as executor:
        for number in (3 * batch_size, num_simulations):
            start = time.perf_counter()
            simulations = pf.sbi.simulate(
                SIMULATOR,
                number,
                seed=seed,
                executor=executor,
                batch_size=batch_size,
                path=folder,
                progress=False,
            )
            seconds.append(time.perf_counter() - start)
    return simulations, seconds


def same_without_pool(simulations: pf.sbi.Simulations, seed: int) -> bool:
    """Tell whether the first chunk is the same when this process simulates it."""
    size = len(simulations) // 10
    alone = pf.sbi.simulate(SIMULATOR, size, seed=seed, batch_size=size, progress=False)
    first = simulations[:size]
    return torch.equal(alone.observations["x"], first.observations["x"]) and all(
        torch.equal(alone.parameters[name], first.parameters[name]) for name in PRIOR
    )


def observe(seed: int) -> Tensor:
    """Simulate the departures that are given, at known parameters."""
    truth = {name: torch.tensor([value]) for name, value in TRUTH.items()}
    return pf.sbi.simulate_at(SIMULATOR, truth, seed=seed, progress=False).observations["x"][0]


def draw_prediction(predicted: Tensor, x: Tensor) -> plt.Figure:
    """Draw the quantiles that the posterior predicts, and the observed ones."""
    figure, ax = plt.subplots(figsize=(6, 4))
    ax.boxplot(
        predicted.exp().numpy(),
        positions=LEVELS,
        widths=0.1,
        whis=(5, 95),
        showfliers=False,
        medianprops={"color": "black"},
    )
    ax.plot(LEVELS, x.exp(), "o", color="tab:red", markeredgecolor="black", label="observed")
    ax.set(yscale="log", xlim=(-0.1, 1.1), xticks=LEVELS, xticklabels=[f"{u:.0%}" for u in LEVELS])
    minutes = [3, 5, 10, 20, 40]
    ax.set_yticks(minutes, [str(number) for number in minutes])
    ax.minorticks_off()
    ax.set(xlabel="quantile", ylabel="minutes between departures")
    ax.set_title("posterior predictive: 50 % boxes, 90 % whiskers")
    ax.legend()
    return figure


def main() -> None:
    """Simulate on processes, learn the posterior, check it, write the files."""
    options = parse("black_box", __doc__)
    budget, seed, out = Budget.of(options.fast), options.seed, options.out
    folder = out / f"simulations-{budget.num_simulations}-{seed}"
    simulations, seconds = simulate_in_two_sittings(folder, budget.num_simulations, seed)
    estimator = pf.sbi.FlowMatching(SIMULATOR, device=options.device)
    start = time.perf_counter()
    posterior = estimator.fit(simulations, seed=seed, **budget.training)
    training_seconds = time.perf_counter() - start

    x = observe(seed)
    draws = {n: v.cpu() for n, v in posterior.sample(budget.num_draws, x=x, seed=seed).items()}
    fresh = pf.sbi.simulate(SIMULATOR, budget.num_replicates, seed=seed + 1, progress=False)
    test = sbc(posterior, fresh, num_draws=budget.num_ranked, seed=seed)
    check = pf.sbi.predictive_check(posterior, SIMULATOR, x=x, seed=seed, progress=False)
    metrics = {
        "simulations": len(simulations),
        "seconds of the first sitting": seconds[0],
        "seconds of the second sitting": seconds[1],
        "same without pool": same_without_pool(simulations, seed),
        "impossible draws": (draws["shortest"].log() > x[0]).double().mean().item(),
        "posterior means": {name: draws[name].mean().item() for name in PRIOR},
        "posterior sds": {name: draws[name].std().item() for name in PRIOR},
        "predictive p-values": check.p_values,
        **calibration_metrics(test),
        "training seconds": training_seconds,
    }
    for name in ("same without pool", "impossible draws", "SBC smallest p-value"):
        print(f"{name}: {metrics[name]:.3g}")
    write_json(out / "metrics.json", metrics)
    posterior.to_arviz(x=x, seed=seed).to_netcdf(out / "black_box.nc")
    pairs = torch.stack([draws[name] for name in PRIOR], -1)
    truth = torch.tensor([*TRUTH.values()])
    save_figure(
        plot_corner(pairs, labels=[*PRIOR], truth=truth)[0, 0].figure, out / "posterior.png"
    )
    save_figure(plot_ecdf_pit(test).figure, out / "calibration.png")
    predicted = check.simulations.observations["x"]
    save_figure(draw_prediction(predicted, x), out / "prediction.png")
    print("\nwritten:", *sorted(str(path) for path in out.iterdir()))


if __name__ == "__main__":
    main()
