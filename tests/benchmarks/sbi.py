"""Scores amortized posteriors on published tasks against their reference posteriors.

The score is the accuracy of a classifier that tells 10 000 draws from 10 000 reference draws, 0.5
being perfect, averaged over observations. Run it from the root of the repository:

    PYROFLOWS_REFERENCE_DIR=... python -m tests.benchmarks.sbi --tasks two_moons --budgets 10000
"""

import argparse
import time
from collections.abc import Callable

import numpy as np
import pandas as pd
import torch

from pyroflows.diagnostics import c2st
from pyroflows.sbi import FlowMatching, NeuralLikelihood, NeuralPosterior
from tests import simulators
from tests.reference import reference_folder

TASKS: dict[str, tuple[Callable, str]] = {
    "two_moons": (simulators.two_moons, "two_moons"),
    "gaussian_linear": (simulators.gaussian_linear, "gaussian_linear"),
    "gaussian_linear_uniform": (simulators.gaussian_linear_uniform, "gaussian_linear_uniform"),
    "slcp": (simulators.slcp_flat, "slcp"),
    "slcp_plate": (simulators.slcp, "slcp"),
}
ESTIMATORS = {
    "FlowMatching": FlowMatching,
    "NeuralPosterior": NeuralPosterior,
    "NeuralLikelihood": NeuralLikelihood,
}


def score(task: str, name: str, budget: int, arguments: argparse.Namespace) -> dict:
    """Train one estimator on one task and compare its draws with the reference."""
    simulator, reference = TASKS[task]
    data = np.load(reference_folder() / "sbibm" / f"{reference}.npz")
    start = time.perf_counter()
    posterior = ESTIMATORS[name](simulator, parameters=["theta"]).fit(
        num_simulations=budget, seed=arguments.seed, progress=False
    )
    trained = time.perf_counter()
    shape = posterior.observations.shapes["x"]
    scores, seconds = [], []
    for i in range(arguments.observations):
        x = torch.as_tensor(data["observations"][i], dtype=torch.float32).reshape(shape)
        begin = time.perf_counter()
        draws = posterior.sample(arguments.draws, x=x, seed=arguments.seed)["theta"]
        seconds.append(time.perf_counter() - begin)
        truth = torch.as_tensor(data["reference_posterior_samples"][i][: arguments.draws])
        scores.append(c2st(truth.float(), draws))
    return {
        "task": task,
        "estimator": name,
        "simulations": budget,
        "C2ST": np.mean(scores),
        "worst": np.max(scores),
        "train (s)": trained - start,
        "sample (s)": np.median(seconds),
        "steps": posterior.fit.num_steps,
        "best step": posterior.fit.best_step,
    }


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
        for name in arguments.estimators:
            for budget in arguments.budgets:
                rows.append(score(task, name, budget, arguments))
                print(pd.DataFrame(rows[-1:]).round(3).to_string(), flush=True)
    table = pd.DataFrame(rows).round(3)
    print(f"\n{table.to_string()}")
    if arguments.csv:
        table.to_csv(arguments.csv, index=False)


if __name__ == "__main__":
    main()
