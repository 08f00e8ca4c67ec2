"""Times pyroflows against other normalizing flow libraries.

Every library builds the same architecture for each registered flow that it has, and what a user
waits for is timed in turn: a step of maximum likelihood, a step of variational inference, the
log-density of given points, and sampling. Run it from the root of the repository:

    python -m tests.benchmarks.flows --dims 16 64 --csv flows.csv

The peers come with the `bench` extra; `libraries.py` says where they differ.
"""

import argparse
from collections.abc import Callable

import pandas as pd
import torch
from torch import Tensor

from .libraries import LIBRARIES, Model, build, kinds
from .timing import interleave

OPERATIONS = ("train step", "guide step", "log_prob", "sample")
DRAWS = 512
MISSING = "-"


def train_step(model: Model, data: Tensor) -> Callable[[], None] | None:
    """Return one step of maximum likelihood."""
    if model.log_prob is None:
        return None
    optimizer = torch.optim.Adam(model.parameters, lr=1e-3)

    def step() -> None:
        optimizer.zero_grad()
        # Some libraries answer a tensor they have seen from a cache; a clone is new to them.
        (-model.log_prob(data.clone()).mean()).backward()
        optimizer.step()

    return step


def guide_step(model: Model) -> Callable[[], None] | None:
    """Return one step of variational inference, towards a normal distribution."""
    if model.sample_and_log_prob is None:
        return None
    optimizer = torch.optim.Adam(model.parameters, lr=1e-3)

    def step() -> None:
        optimizer.zero_grad()
        x, log_prob = model.sample_and_log_prob(DRAWS)
        (log_prob + x.square().sum(-1)).mean().backward()
        optimizer.step()

    return step


def prepare(operation: str, model: Model | None, data: Tensor) -> Callable[[], object] | None:
    """Return the call to be timed, if the model is capable of it."""
    if model is None:
        return None
    if operation == "train step":
        return train_step(model, data)
    if operation == "guide step":
        return guide_step(model)
    if operation == "log_prob":
        log_prob = model.log_prob
        return log_prob and torch.no_grad()(lambda: log_prob(data.clone()))
    return torch.no_grad()(lambda: model.sample(DRAWS))


def measure(kind: str, dim: int, arguments: argparse.Namespace) -> list[dict]:
    """Time every operation of every library on one kind of flow in one dimension."""
    rows = []
    data = torch.randn(arguments.batch, dim).clamp(-3.0, 3.0)
    for operation in arguments.operations:
        # Training moves the weights, so every operation starts from models of its own.
        calls = {
            library: prepare(operation, build(library, kind, dim, arguments.perturb), data)
            for library in arguments.libraries
        }
        calls = {library: call for library, call in calls.items() if call is not None}
        for library, times in interleave(calls, arguments.repeats, arguments.budget).items():
            rows.append(
                {
                    "kind": kind,
                    "D": dim,
                    "operation": operation,
                    "library": library,
                    "milliseconds": 1e3 * pd.Series(times, dtype=float).median(),
                    "rounds": len(times),
                }
            )
    return rows


def tabulate(rows: pd.DataFrame) -> pd.DataFrame:
    """Arrange the medians with one column per library."""
    medians = rows.set_index(["kind", "D", "operation", "library"])["milliseconds"]
    return medians.unstack("library", sort=False)


def compare(times: pd.Series, peers: pd.DataFrame) -> pd.DataFrame:
    """Divide times by those of the fastest peer, where there is one."""
    peers = peers.dropna(how="all")
    table = {"ratio": times.reindex(peers.index) / peers.min(axis=1)}
    return pd.DataFrame({**table, "best peer": peers.idxmin(axis=1)})


def show(title: str, table: pd.DataFrame) -> None:
    """Print a table, with a dash where a library has nothing to time."""
    print(f"\n{title}\n{table.round(2).astype(object).fillna(MISSING).to_string()}", flush=True)


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks.flows",
        description=__doc__.split("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--dims", type=int, nargs="+", default=[16, 64], help="dimensions of the flows")
    add("--kinds", nargs="+", choices=kinds(), default=kinds(), help="kinds of flows")
    add("--libraries", nargs="+", choices=LIBRARIES, default=LIBRARIES, help="libraries")
    add("--operations", nargs="+", choices=OPERATIONS, default=OPERATIONS, help="what to time")
    add("--batch", type=int, default=512, help="points of a training step and of a log_prob")
    add("--threads", type=int, default=1, help="threads of torch")
    add("--repeats", type=int, default=20, help="timed rounds")
    add("--budget", type=float, default=120.0, help="seconds for one operation of one library")
    add("--perturb", type=float, default=0.0, help="scale of the noise added to fresh weights")
    add("--device", default="cpu", help="device of torch")
    add("--csv", help="file for the medians")
    return parser.parse_args()


def main() -> None:
    """Run the benchmark and print its tables."""
    arguments = parse()
    torch.manual_seed(0)
    torch.set_num_threads(arguments.threads)
    torch.set_default_device(arguments.device)
    rows: list[dict] = []
    for kind in arguments.kinds:
        for dim in arguments.dims:
            rows += measure(kind, dim, arguments)
        report([row for row in rows if row["kind"] == kind])
        if arguments.csv:
            pd.DataFrame(rows).to_csv(arguments.csv, index=False)


def report(rows: list[dict]) -> None:
    """Print the medians, and how they compare with the peers'."""
    medians = tabulate(pd.DataFrame(rows))
    show("Medians in ms", medians)
    if "pyroflows" in medians and len(medians.columns) > 1:
        peers = medians.drop(columns="pyroflows")
        show("pyroflows / best peer", compare(medians["pyroflows"], peers))


if __name__ == "__main__":
    main()
