"""Scores amortized posteriors on published tasks, those of the library sbi among them.

The score is the accuracy of a classifier that tells 10 000 draws from 10 000 reference draws, 0.5
being perfect, averaged over observations. All estimators have their library's defaults and learn
from the same simulations; times are also given as ratios to those of the first estimator. Run it
from the root of the repository, for the estimators of sbi with the `bench` extra installed:

    PYROFLOWS_REFERENCE_DIR=... python -m tests.benchmarks.sbi --tasks two_moons --budgets 10000
"""

import argparse
import contextlib
import io
import logging
import time
import warnings
from collections.abc import Callable
from functools import partial

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from pyroflows.diagnostics import c2st
from pyroflows.sbi import FlowMatching, NeuralLikelihood, NeuralPosterior, Simulations, simulate
from pyroflows.sbi.model.space import latent_sites
from tests import simulators
from tests.reference import reference_folder

TASKS: dict[str, tuple[Callable, str]] = {
    "two_moons": (simulators.two_moons, "two_moons"),
    "gaussian_linear": (simulators.gaussian_linear, "gaussian_linear"),
    "gaussian_linear_uniform": (simulators.gaussian_linear_uniform, "gaussian_linear_uniform"),
    "slcp": (simulators.slcp_flat, "slcp"),
    "slcp_plate": (simulators.slcp, "slcp"),
}
Sampler = Callable[[int, Tensor], Tensor]


def train_ours(
    estimator: Callable, simulator: Callable, simulations: Simulations, seed: int
) -> Sampler:
    """Train an estimator of this package."""
    posterior = estimator(simulator, parameters=["theta"]).fit(
        simulations, seed=seed, progress=False
    )
    return lambda num_draws, x: posterior.sample(num_draws, x=x, seed=seed)["theta"]


def train_straight(simulator: Callable, simulations: Simulations, seed: int) -> Sampler:
    """Train a field, and another on the straight lines from noise to its draws."""
    posterior = FlowMatching(simulator, parameters=["theta"]).fit(
        simulations, seed=seed, progress=False
    )
    straight = posterior.straighten(simulations, seed=seed, progress=False)
    return lambda num_draws, x: straight.sample(num_draws, x=x, seed=seed)["theta"]


def train_peer(name: str, simulator: Callable, simulations: Simulations, seed: int) -> Sampler:
    """Train an estimator of sbi, which knows of no plates: observations are vectors."""
    import sbi.inference  # of the `bench` extra

    torch.manual_seed(seed)
    logging.disable(logging.WARNING)
    prior, _ = latent_sites(simulator, ("x",), ["theta"], (), {})["theta"]
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        estimator = getattr(sbi.inference, name)(prior=prior, show_progress_bars=False)
        x = simulations.observations["x"].flatten(1)
        estimator.append_simulations(simulations.parameters["theta"], x).train()
        posterior = estimator.build_posterior()
    return lambda num_draws, x: posterior.sample(
        (num_draws,), x=x.flatten()[None], show_progress_bars=False
    )


ESTIMATORS: dict[str, Callable[[Callable, Simulations, int], Sampler]] = {
    "FlowMatching": partial(train_ours, FlowMatching),
    "FlowMatching, straightened": train_straight,
    "NeuralPosterior": partial(train_ours, NeuralPosterior),
    "NeuralLikelihood": partial(train_ours, NeuralLikelihood),
    "sbi-FMPE": partial(train_peer, "FMPE"),
    "sbi-NPE": partial(train_peer, "NPE"),
}


def score(task: str, name: str, simulations: Simulations, arguments: argparse.Namespace) -> dict:
    """Train one estimator on one task and compare its draws with the reference."""
    simulator, reference = TASKS[task]
    data = np.load(reference_folder() / "sbibm" / f"{reference}.npz")
    start = time.perf_counter()
    sample = ESTIMATORS[name](simulator, simulations, arguments.seed)
    trained = time.perf_counter()
    shape = simulations.observations["x"].shape[1:]
    scores, seconds = [], []
    for i in range(arguments.observations):
        x = torch.as_tensor(data["observations"][i], dtype=torch.float32).reshape(shape)
        begin = time.perf_counter()
        draws = sample(arguments.draws, x)
        seconds.append(time.perf_counter() - begin)
        truth = torch.as_tensor(data["reference_posterior_samples"][i][: arguments.draws])
        scores.append(c2st(truth.float(), draws))
    return {
        "task": task,
        "simulations": len(simulations),
        "estimator": name,
        "C2ST": np.mean(scores),
        "worst": np.max(scores),
        "train (s)": trained - start,
        "sample (s)": np.median(seconds),
    }


def with_ratios(rows: list[dict]) -> pd.DataFrame:
    """Return the table, with times relative to the first estimator of each task and budget."""
    table = pd.DataFrame(rows)
    for column in ("train", "sample"):
        first = table.groupby(["task", "simulations"])[f"{column} (s)"].transform("first")
        table[f"{column} / first"] = table[f"{column} (s)"] / first
    return table.round(3)


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks.sbi",
        description=__doc__.split("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--tasks", nargs="+", choices=TASKS, default=[*TASKS], help="tasks")
    add("--estimators", nargs="+", choices=ESTIMATORS, default=["FlowMatching"], help="estimators")
    add("--budgets", type=int, nargs="+", default=[1000, 10_000], help="numbers of simulations")
    add("--observations", type=int, default=5, help="number of observations, at most 10")
    add("--draws", type=int, default=10_000, help="draws per observation, at most 10 000")
    add("--seed", type=int, default=0, help="seed")
    add("--threads", type=int, default=2, help="threads of torch")
    add("--csv", help="file for the table")
    return parser.parse_args()


def main() -> None:
    """Run the benchmark and print its table."""
    arguments = parse()
    torch.set_num_threads(arguments.threads)
    rows = []
    for task in arguments.tasks:
        for budget in arguments.budgets:
            simulations = simulate(
                TASKS[task][0],
                budget,
                parameters=["theta"],
                seed=arguments.seed,
                progress=False,
            )
            for name in arguments.estimators:
                rows.append(score(task, name, simulations, arguments))
                print(pd.DataFrame(rows[-1:]).round(3).to_string(), flush=True)
    table = with_ratios(rows)
    print(f"\n{table.to_string()}")
    if arguments.csv:
        table.to_csv(arguments.csv, index=False)


if __name__ == "__main__":
    main()
