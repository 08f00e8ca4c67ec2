"""Compares amortized posteriors with those of the library sbi, on the same simulations.

Each estimator has its library's defaults. The score is that of `tests.benchmarks.sbi`. Run it from
the root of the repository, with the `bench` extra installed:

    PYROFLOWS_REFERENCE_DIR=... python -m tests.benchmarks.sbi_peers --tasks two_moons
"""

import argparse
import contextlib
import io
import logging
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pandas as pd
import sbi.inference
import torch
from torch import Tensor

import pyroflows.sbi as pf_sbi
from pyroflows.diagnostics import c2st
from pyroflows.sbi.model.space import latent_sites
from tests.benchmarks.sbi import TASKS
from tests.reference import reference_folder

OURS = {"FlowMatching": pf_sbi.FlowMatching, "NeuralPosterior": pf_sbi.NeuralPosterior}
PEERS = {"sbi FMPE": "FMPE", "sbi NPE": "NPE"}
Sampler = Callable[[int, Tensor], Tensor]


@dataclass(frozen=True)
class Task:
    """Hold a simulator, draws of it, and the references to compare with."""

    simulator: Callable
    simulations: pf_sbi.Simulations
    observations: Tensor
    references: Tensor

    @classmethod
    def of(cls, name: str, budget: int, seed: int) -> "Task":
        """Simulate a published task and read its references."""
        simulator, file = TASKS[name]
        data = np.load(reference_folder() / "sbibm" / f"{file}.npz")
        options = {"parameters": ["theta"], "seed": seed, "progress": False}
        return cls(
            simulator,
            pf_sbi.simulate(simulator, budget, **options),
            torch.as_tensor(data["observations"]).float(),
            torch.as_tensor(data["reference_posterior_samples"]).float(),
        )


def train_ours(name: str, task: Task, seed: int) -> Sampler:
    """Train an estimator of this package."""
    estimator = OURS[name](task.simulator, parameters=["theta"])
    posterior = estimator.fit(task.simulations, seed=seed, progress=False)
    shape = posterior.observations.shapes["x"]
    return lambda n, x: posterior.sample(n, x=x.reshape(shape), seed=seed)["theta"]


def train_peer(name: str, task: Task, seed: int) -> Sampler:
    """Train an estimator of sbi, with its prior as a box or a normal distribution."""
    torch.manual_seed(seed)
    theta = task.simulations.parameters["theta"]
    x = task.simulations.observations["x"].flatten(1)
    estimator = getattr(sbi.inference, PEERS[name])(prior=_prior(task), show_progress_bars=False)
    estimator.append_simulations(theta, x).train()
    posterior = estimator.build_posterior()
    return lambda n, x: posterior.sample((n,), x=x.flatten()[None], show_progress_bars=False)


def _prior(task: Task) -> torch.distributions.Distribution:
    trace = latent_sites(task.simulator, ("x",), ["theta"], (), {})
    return trace["theta"][0]


def score(name: str, task: Task, arguments: argparse.Namespace) -> dict:
    """Train, sample, and compare with the references."""
    train = train_ours if name in OURS else train_peer
    start = time.perf_counter()
    sample = train(name, task, arguments.seed)
    trained = time.perf_counter() - start
    scores, seconds = [], []
    for x, reference in zip(
        task.observations[: arguments.observations], task.references, strict=False
    ):
        begin = time.perf_counter()
        draws = sample(arguments.draws, x)
        seconds.append(time.perf_counter() - begin)
        scores.append(c2st(reference[: arguments.draws], draws))
    return {
        "estimator": name,
        "simulations": len(task.simulations),
        "C2ST": np.mean(scores),
        "worst": np.max(scores),
        "train (s)": trained,
        "sample (s)": np.median(seconds),
    }


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks.sbi_peers",
        description=__doc__.split("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    flat = [task for task in TASKS if task != "slcp_plate"]
    names = [*OURS, *PEERS]
    add = parser.add_argument
    add("--tasks", nargs="+", choices=flat, default=["two_moons"], help="tasks")
    add("--estimators", nargs="+", choices=names, default=names, help="estimators")
    add("--budgets", type=int, nargs="+", default=[1000, 10_000], help="numbers of simulations")
    add("--observations", type=int, default=5, help="number of observations, at most 10")
    add("--draws", type=int, default=10_000, help="draws per observation, at most 10 000")
    add("--seed", type=int, default=0, help="seed")
    add("--threads", type=int, default=2, help="threads of torch")
    add("--csv", help="file for the table")
    return parser.parse_args()


def main() -> None:
    """Run the benchmark and print its table, with times as ratios to those of FlowMatching."""
    arguments = parse()
    torch.set_num_threads(arguments.threads)
    logging.disable(logging.WARNING)
    rows = []
    for name in arguments.tasks:
        for budget in arguments.budgets:
            task = Task.of(name, budget, arguments.seed)
            for estimator in arguments.estimators:
                with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
                    warnings.simplefilter("ignore")
                    row = {"task": name, **score(estimator, task, arguments)}
                rows.append(row)
                print(pd.DataFrame([row]).round(3).to_string(), flush=True)
    table = pd.DataFrame(rows)
    for column in ("train", "sample"):
        base = table.groupby(["task", "simulations"])[f"{column} (s)"].transform("first")
        table[f"{column} / first"] = table[f"{column} (s)"] / base
    print(f"\n{table.round(3).to_string()}")
    if arguments.csv:
        table.to_csv(arguments.csv, index=False)


if __name__ == "__main__":
    main()
