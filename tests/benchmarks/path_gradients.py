"""Times gradients along the path of the draws against total ones, for every registered flow.

A call of `PathwiseELBO.loss_and_grads` and one of `Trace_ELBO`, of the same guide, are timed in
turn. The model is a normal distribution: the cheaper the model, the larger the ratio. Run it from
the root of the repository:

    python -m tests.benchmarks.path_gradients --flows iaf realnvp --dims 16
"""

import argparse
from collections.abc import Callable

import pandas as pd
import pyro
import pyro.distributions as dist
import torch
from pyro.infer import Trace_ELBO
from pyro.infer.elbo import ELBO

import pyroflows as pf

from .timing import interleave

KINDS: dict[str, type[ELBO]] = {"total": Trace_ELBO, "path": pf.PathwiseELBO}
FLOWS = [name for name in pf.flows.names() if pf.flows.spec(name).support == "real"]


def estimate(kind: type[ELBO], flow: str, dim: int, particles: int, perturb: float) -> Callable:
    """Return an estimate of the gradient, to be timed."""

    def model() -> None:
        pyro.sample("z", dist.Normal(torch.zeros(dim), 1.0).to_event(1))

    guide = pf.AutoFlow(model, flow)
    guide()
    with torch.no_grad():
        for parameter in guide.parameters():
            parameter.add_(perturb * torch.randn_like(parameter))
    elbo = kind(particles, vectorize_particles=True, max_plate_nesting=0)
    return lambda: elbo.loss_and_grads(model, guide)


def measure(flow: str, dim: int, arguments: argparse.Namespace) -> dict:
    """Time both kinds of gradients of one flow in one dimension."""
    calls = {
        name: estimate(kind, flow, dim, arguments.particles, arguments.perturb)
        for name, kind in KINDS.items()
    }
    times = interleave(calls, arguments.repeats, arguments.budget)
    medians = {name: 1e3 * pd.Series(taken).median() for name, taken in times.items()}
    return {"flow": flow, "D": dim, **medians, "ratio": medians["path"] / medians["total"]}


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks.path_gradients",
        description=__doc__.split("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--flows", nargs="+", choices=FLOWS, default=FLOWS, help="flows")
    add("--dims", type=int, nargs="+", default=[16], help="dimensions")
    add("--particles", type=int, default=256, help="draws of an estimate")
    add("--perturb", type=float, default=0.03, help="scale of the noise added to fresh weights")
    add("--threads", type=int, default=1, help="threads of torch")
    add("--repeats", type=int, default=50, help="timed rounds")
    add("--budget", type=float, default=60.0, help="seconds for one kind of one flow")
    add("--csv", help="file for the medians in ms")
    return parser.parse_args()


def main() -> None:
    """Run the benchmark and print its table."""
    arguments = parse()
    torch.manual_seed(0)
    torch.set_num_threads(arguments.threads)
    rows = []
    for flow in arguments.flows:
        for dim in arguments.dims:
            rows.append(measure(flow, dim, arguments))
            table = pd.DataFrame(rows[-1:]).round(2)
            print(table.to_string(index=False, header=len(rows) == 1), flush=True)
    if arguments.csv:
        pd.DataFrame(rows).to_csv(arguments.csv, index=False)


if __name__ == "__main__":
    main()
