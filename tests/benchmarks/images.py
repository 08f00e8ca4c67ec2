"""Times flows of images and measures their memory: Glow and RealNVP, and Glow of normflows.

Glow has the same scales, steps and networks in both libraries: convolutions of 3 x 3, 1 x 1 and
3 x 3 pixels with `width` channels in between, no class labels. They differ where their interfaces
leave no choice: this package's middle convolution is residual and its kernels are normalised.
RealNVP has as many couplings for each mask of a scale as Glow has steps.

What is timed in turn is a step of training and drawing as many images as a step sees. A step picks
images out of an array that `image_levels` has loaded, adds noise, takes logits, goes forward and
backward, and updates the weights by AdamW. Memory is that of a step's forward pass, kept for the
backward one, and by how much a process grows at most while it trains, as Linux counts it: this has
the gradients, the averages of AdamW and what the allocator wastes, but not the array. Run it from
the root of the repository:

    python -m tests.benchmarks.images --csv images.csv

The peer comes with the `bench` extra; `--models glow realnvp_image` does without.
"""

import argparse
import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor

import pyroflows as pf
from pyroflows.distributions import dequantize, image_levels
from pyroflows.transforms import Logit

from .libraries import Model
from .timing import interleave

NUM_IMAGES = 5000
NUM_STEPS = 3  # of a training whose memory is measured; the second has the averages of AdamW
OPERATIONS = ("train step", "sample")


def build_pyroflows(name: str, arguments: argparse.Namespace) -> Model:
    """Build a flow of this package with a standard normal base."""
    options = {"num_scales": arguments.scales, "num_layers": arguments.layers}
    transform = pf.flow(name, arguments.shape, width=arguments.width, **options)
    flow = pf.Flow(None, transform)
    return Model(list(flow.parameters()), lambda n: flow.sample(torch.Size([n])), flow.log_prob)


def build_normflows(arguments: argparse.Namespace) -> Model:
    """Build Glow as normflows' documentation does, with bases that have no parameters."""
    import normflows as nf

    channels, height, width = arguments.shape
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
        flow.log_prob(torch.randn(16, *arguments.shape), None)  # initialises its actnorms
    return Model(list(flow.parameters()), flow.sample, lambda x: flow.log_prob(x, None))


BUILD: dict[str, Callable[[argparse.Namespace], Model]] = {
    "glow": lambda arguments: build_pyroflows("glow", arguments),
    "realnvp_image": lambda arguments: build_pyroflows("realnvp_image", arguments),
    "normflows' Glow": build_normflows,
}


def load(shape: tuple[int, int, int]) -> Tensor:
    """Return the levels of an array of images, here of noise."""
    channels, height, width = shape
    size = (NUM_IMAGES, height, width, channels)
    return image_levels(np.random.default_rng(0).integers(256, size=size, dtype=np.uint8))


def logits(levels: Tensor) -> Tensor:
    """Return what flows learn: logits of levels with noise."""
    y, _ = Logit(levels.shape[1:]).forward_and_log_det(dequantize(levels))
    return y


def loss(model: Model, levels: Tensor, batch: int) -> Tensor:
    """Return the negative log-density of a batch of images."""
    assert model.log_prob is not None
    rows = torch.randint(len(levels), (batch,))
    return -model.log_prob(logits(levels[rows])).mean()


def training(model: Model, levels: Tensor, batch: int) -> Callable[[], None]:
    """Return a step of maximum likelihood."""
    optimizer = torch.optim.AdamW(model.parameters, 1e-4, fused=True)  # as in `Flow.fit`

    def step() -> None:
        optimizer.zero_grad()
        loss(model, levels, batch).backward()
        optimizer.step()

    return step


def prepare(operation: str, model: Model, levels: Tensor, batch: int) -> Callable[[], object]:
    """Return the call to be timed."""
    if operation == "sample":
        return torch.no_grad()(lambda: model.sample(batch))
    return training(model, levels, batch)


def measure(arguments: argparse.Namespace) -> pd.DataFrame:
    """Return medians of times, and memory: a row for each, a column for each model."""
    start(arguments)
    levels, batch = load(arguments.shape), arguments.batch
    models = {name: BUILD[name](arguments) for name in arguments.models}
    rows = {"parameters": {n: sum(p.numel() for p in m.parameters) for n, m in models.items()}}
    rows["kept for the backward pass (MiB)"] = {
        name: kept_memory(model, levels, batch) for name, model in models.items()
    }
    for operation in OPERATIONS:
        calls = {n: prepare(operation, model, levels, batch) for n, model in models.items()}
        times = interleave(calls, arguments.repeats, arguments.budget)
        rows[f"{operation} (ms)"] = {
            name: 1e3 * pd.Series(taken, dtype=float).median() for name, taken in times.items()
        }
    rows["peak memory of training (MiB)"] = {
        name: in_fresh_process(grown_memory, name, arguments) for name in models
    }
    return pd.DataFrame(rows).T


def start(arguments: argparse.Namespace) -> None:
    """Set threads and seed."""
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)


def kept_memory(model: Model, levels: Tensor, batch: int) -> float:
    """Return the mebibytes that a step of training keeps for its backward pass."""
    sizes = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        kept = loss(model, levels, batch)
    assert kept.requires_grad  # what is kept is kept by its graph
    return sum(sizes.values()) / 2**20


def in_fresh_process(function: Callable[..., float], *arguments: object) -> float:
    """Call a function where nothing has been allocated before."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def grown_memory(name: str, arguments: argparse.Namespace) -> float:
    """Return the mebibytes by which this process grows at most in a few steps of training."""
    start(arguments)
    step = training(BUILD[name](arguments), load(arguments.shape), arguments.batch)
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peaks so far
    before = peak_memory()
    for _ in range(NUM_STEPS):
        step()
    return peak_memory() - before


def peak_memory() -> float:
    """Return the most mebibytes that this process has had in memory.

    The figure of `getrusage` would not do: it begins with that of the process that started this.
    """
    lines = Path("/proc/self/status").read_text().splitlines()
    (kibibytes,) = (line.split()[1] for line in lines if line.startswith("VmHWM:"))
    return int(kibibytes) / 2**10


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks.images",
        description=__doc__.split("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--models", nargs="+", choices=BUILD, default=list(BUILD), help="what to measure")
    add("--shape", type=int, nargs=3, default=[3, 32, 32], help="channels, height and width")
    add("--batch", type=int, default=16, help="images of a step")
    add("--layers", type=int, default=8, help="steps of each scale")
    add("--scales", type=int, default=3, help="scales")
    add("--width", type=int, default=64, help="channels inside the networks")
    add("--threads", type=int, default=1, help="threads of torch")
    add("--repeats", type=int, default=10, help="timed rounds")
    add("--budget", type=float, default=120.0, help="seconds for one operation of one model")
    add("--csv", help="file for the table")
    return parser.parse_args()


def main() -> None:
    """Run the benchmark and print its table."""
    arguments = parse()
    table = measure(arguments)
    print(table.map("{:.4g}".format).to_string())
    if arguments.csv:
        table.to_csv(arguments.csv, index_label="quantity")


if __name__ == "__main__":
    main()
