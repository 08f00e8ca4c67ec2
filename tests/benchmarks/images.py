"""Times Glow of this package against that of normflows, on images.

Both have the same scales, steps and networks: convolutions of 3 x 3, 1 x 1 and 3 x 3 pixels with
`width` channels in between, no class labels. What is timed in turn is a step of maximum
likelihood, forward and backward, and sampling; the memory is what a step keeps from its forward
pass for the backward one. Run it from the root of the repository:

    python -m tests.benchmarks.images --csv images.csv

The peer comes with the `bench` extra. The networks differ where their interfaces leave no choice:
this package's middle convolution is residual and its kernels are normalised.
"""

import argparse
from collections.abc import Callable

import pandas as pd
import torch
from torch import Tensor

import pyroflows as pf

from .libraries import Model
from .timing import interleave

LIBRARIES = ("pyroflows", "normflows")
OPERATIONS = ("train step", "sample")


def build_pyroflows(shape: tuple[int, int, int], arguments: argparse.Namespace) -> Model:
    """Build Glow with a standard normal base."""
    options = {"num_scales": arguments.scales, "num_layers": arguments.layers}
    flow = pf.Flow(None, pf.flow("glow", shape, width=arguments.width, **options))
    return Model(list(flow.parameters()), lambda n: flow.sample(torch.Size([n])), flow.log_prob)


def build_normflows(shape: tuple[int, int, int], arguments: argparse.Namespace) -> Model:
    """Build Glow as normflows' documentation does, with bases that have no parameters."""
    import normflows as nf

    channels, height, width = shape
    bases, flows, merges = [], [], []
    for scale in range(arguments.scales):  # from coarse to fine
        depth = arguments.scales - scale
        inner = channels * 2 ** (depth + 1)
        steps = [
            nf.flows.GlowBlock(inner, arguments.width, split_mode="channel", scale=True)
            for _ in range(arguments.layers)
        ]
        flows.append([*steps, nf.flows.Squeeze()])
        latent = (inner // 2 if scale else inner, height // 2**depth, width // 2**depth)
        bases.append(nf.distributions.DiagGaussian(latent, trainable=False))
        if scale:
            merges.append(nf.flows.Merge())
    flow = nf.MultiscaleFlow(bases, flows, merges, class_cond=False)
    with torch.no_grad():
        flow.log_prob(torch.randn(16, *shape), None)  # initialises its actnorms
    return Model(list(flow.parameters()), flow.sample, lambda x: flow.log_prob(x, None))


BUILD: dict[str, Callable[..., Model]] = {
    "pyroflows": build_pyroflows,
    "normflows": build_normflows,
}


def prepare(operation: str, model: Model, data: Tensor) -> Callable[[], object]:
    """Return the call to be timed."""
    if operation == "sample":
        return torch.no_grad()(lambda: model.sample(len(data)))

    def step() -> None:
        for parameter in model.parameters:
            parameter.grad = None
        assert model.log_prob is not None
        (-model.log_prob(data.clone()).mean()).backward()

    return step


def measure(arguments: argparse.Namespace) -> pd.DataFrame:
    """Return the medians, a row for each operation and a column for each library."""
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    data = torch.randn(arguments.batch, *arguments.shape)
    models = {name: BUILD[name](tuple(arguments.shape), arguments) for name in LIBRARIES}
    for name, model in models.items():
        print(f"{name}: {sum(p.numel() for p in model.parameters)} parameters")
    rows = {}
    for operation in OPERATIONS:
        calls = {name: prepare(operation, model, data) for name, model in models.items()}
        times = interleave(calls, arguments.repeats, arguments.budget)
        rows[f"{operation} (ms)"] = {
            name: 1e3 * pd.Series(taken, dtype=float).median() for name, taken in times.items()
        }
    rows["memory of a train step (MB)"] = {
        name: kept_memory(model, data) for name, model in models.items()
    }
    table = pd.DataFrame(rows).T
    return table.assign(ratio=table["pyroflows"] / table["normflows"])


def kept_memory(model: Model, data: Tensor) -> float:
    """Return the megabytes that a training step keeps between its forward and backward pass."""
    sizes = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        assert model.log_prob is not None
        loss = model.log_prob(data).mean()
    assert loss.requires_grad  # what is kept is kept by its graph
    return sum(sizes.values()) / 2**20


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks.images",
        description=__doc__.split("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--shape", type=int, nargs=3, default=[3, 32, 32], help="channels, height and width")
    add("--batch", type=int, default=16, help="images of a step")
    add("--layers", type=int, default=8, help="steps of each scale")
    add("--scales", type=int, default=3, help="scales")
    add("--width", type=int, default=64, help="channels inside the networks")
    add("--threads", type=int, default=1, help="threads of torch")
    add("--repeats", type=int, default=10, help="timed rounds")
    add("--budget", type=float, default=120.0, help="seconds for one operation of one library")
    add("--csv", help="file for the table")
    return parser.parse_args()


def main() -> None:
    """Run the benchmark and print its table."""
    arguments = parse()
    table = measure(arguments)
    print(table.round(2).to_string())
    if arguments.csv:
        table.to_csv(arguments.csv, index_label="operation")


if __name__ == "__main__":
    main()
