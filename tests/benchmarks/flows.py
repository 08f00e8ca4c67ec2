"""Times pyroflows against other normalizing flow libraries.

Every library builds the same architecture for each kind of flow, and its training step, its
log-density and its sampling are timed in turn. Run it from the root of the repository:

    python -m tests.benchmarks.flows --dims 16 64 --csv flows.csv

The peers come with the `bench` extra. They differ where their interfaces leave no choice:

- Pyro's autoregressive flows and normflows' affine one sample in one pass and invert for the
  log-density; all the others do the opposite. A second ratio leaves these reversed flows out.
- Pyro's splines are linear rational, since its quadratic ones cannot be built by its helpers.
- Splines of this package carry an affine map each, which the others' do not.
- normflows' spline networks are one residual block, which is one hidden layer more.
"""

import argparse
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import pandas as pd
import pyro.distributions as dist
import torch
from torch import Tensor, nn

KINDS = ("spline_coupling", "spline_autoregressive", "affine_coupling", "affine_autoregressive")
OPERATIONS = ("train step", "log_prob", "sample")
LAYERS, HIDDEN, BINS, BOUND = 5, (64, 64), 8, 5.0
DRAWS = 512
SLOW_SECONDS, SLOW_ROUNDS = 1.0, 2
REVERSED = {
    ("spline_autoregressive", "Pyro"),
    ("affine_autoregressive", "Pyro"),
    ("affine_autoregressive", "normflows"),
}
OVER_BUDGET = "> budget"


@dataclass(frozen=True)
class Model:
    """Presents a flow of any library through one interface."""

    parameters: list[nn.Parameter]
    log_prob: Callable[[Tensor], Tensor]
    sample: Callable[[int], object]


def standard_normal(dim: int) -> dist.Distribution:
    """Return the base distribution that every flow shares."""
    return dist.Normal(torch.zeros(dim), torch.ones(dim)).to_event(1)


def separate(layers: Iterable, separator: Callable[[], object]) -> list:
    """Put a new separator between each two layers."""
    return [part for layer in layers for part in (layer, separator())][:-1]


def build_pyroflows(kind: str, dim: int) -> Model:
    """Build a flow of this package."""
    import pyroflows as pf

    name = {"affine_coupling": "realnvp", "affine_autoregressive": "maf"}.get(kind, kind)
    options = {"bins": BINS, "bound": BOUND} if kind.startswith("spline") else {}
    options |= {"num_layers": LAYERS, "hidden_dims": HIDDEN, "activation": nn.ReLU}
    transform = pf.flow(name, dim, **options)
    flow = pf.Flow(standard_normal(dim), transform)
    return Model(
        list(transform.parameters()), flow.log_prob, lambda draws: flow.sample(torch.Size([draws]))
    )


def build_pyro(kind: str, dim: int) -> Model:
    """Build a flow of Pyro, reversing the variables between layers."""
    from pyro.distributions import transforms as T

    options = {"count_bins": BINS, "bound": BOUND} if kind.startswith("spline") else {}
    layers = [getattr(T, kind)(dim, hidden_dims=list(HIDDEN), **options) for _ in range(LAYERS)]
    transforms = separate(layers, lambda: T.Permute(torch.arange(dim).flip(0)))
    flow = dist.TransformedDistribution(standard_normal(dim), transforms)
    parameters = list(nn.ModuleList(layers).parameters())
    return Model(parameters, flow.log_prob, lambda draws: flow.sample(torch.Size([draws])))


def build_zuko(kind: str, dim: int) -> Model:
    """Build a flow of zuko, which alternates masks and orders by itself."""
    from zuko import flows
    from zuko.transforms import MonotonicRQSTransform

    # NSF(passes=2) couples too, but takes twice as long: it transforms masked variables as well.
    spline = {"univariate": MonotonicRQSTransform, "shapes": [(BINS,), (BINS,), (BINS - 1,)]}
    flow_class, options = {
        "spline_coupling": (flows.RealNVP, spline),
        "spline_autoregressive": (flows.NSF, {"bins": BINS}),
        "affine_coupling": (flows.RealNVP, {}),
        "affine_autoregressive": (flows.MAF, {}),
    }[kind]
    flow = flow_class(dim, transforms=LAYERS, hidden_features=HIDDEN, **options)
    return Model(
        list(flow.parameters()),
        lambda x: flow().log_prob(x),
        lambda draws: flow().sample(torch.Size([draws])),
    )


class CouplingNetwork(nn.Sequential):
    """Maps the untouched variables of an nflows coupling to the parameters of the others."""

    def __init__(self, inputs: int, outputs: int):
        first, second = HIDDEN
        super().__init__(
            nn.Linear(inputs, first),
            nn.ReLU(),
            nn.Linear(first, second),
            nn.ReLU(),
            nn.Linear(second, outputs),
        )
        # The splines of nflows scale their bins by the width that their network declares.
        self.hidden_features = second

    def forward(self, inputs: Tensor, context: Tensor | None = None) -> Tensor:
        """Ignore the context, which nflows always passes."""
        return super().forward(inputs)


def build_nflows(kind: str, dim: int) -> Model:
    """Build a flow of nflows, alternating masks or reversing the variables."""
    from nflows import transforms as T
    from nflows.distributions import StandardNormal
    from nflows.flows import Flow

    spline = {"num_bins": BINS, "tails": "linear", "tail_bound": BOUND}
    options = spline if kind.startswith("spline") else {}
    if kind.endswith("coupling"):
        layer = {
            "spline_coupling": T.PiecewiseRationalQuadraticCouplingTransform,
            "affine_coupling": T.AffineCouplingTransform,
        }[kind]
        masks = [(torch.arange(dim) + index) % 2 for index in range(LAYERS)]
        layers = [layer(mask, CouplingNetwork, **options) for mask in masks]
    else:
        layer = {
            "spline_autoregressive": T.MaskedPiecewiseRationalQuadraticAutoregressiveTransform,
            "affine_autoregressive": T.MaskedAffineAutoregressiveTransform,
        }[kind]
        # One block without residuals is the second of the two hidden layers.
        network = {"hidden_features": HIDDEN[0], "num_blocks": 1, "use_residual_blocks": False}
        layers = separate(
            [layer(dim, **network, **options) for _ in range(LAYERS)],
            lambda: T.ReversePermutation(dim),
        )
    flow = Flow(T.CompositeTransform(layers), StandardNormal([dim]))
    return Model(list(flow.parameters()), flow.log_prob, flow.sample)


def build_normflows(kind: str, dim: int) -> Model:
    """Build a flow of normflows, with the mixing layers of its examples."""
    import normflows as nf

    spline = {"num_blocks": 1, "num_hidden_channels": HIDDEN[0], "num_bins": BINS}
    kept, moved = dim - dim // 2, dim // 2
    layer, separator = {
        "spline_coupling": (
            lambda: nf.flows.CoupledRationalQuadraticSpline(dim, tail_bound=BOUND, **spline),
            lambda: nf.flows.LULinearPermute(dim),
        ),
        "spline_autoregressive": (
            lambda: nf.flows.AutoregressiveRationalQuadraticSpline(dim, tail_bound=BOUND, **spline),
            lambda: nf.flows.LULinearPermute(dim),
        ),
        "affine_coupling": (
            lambda: nf.flows.AffineCouplingBlock(nf.nets.MLP([kept, *HIDDEN, 2 * moved])),
            lambda: nf.flows.Permute(dim, mode="swap"),
        ),
        "affine_autoregressive": (
            lambda: nf.flows.MaskedAffineAutoregressive(
                dim, HIDDEN[0], num_blocks=1, use_residual_blocks=False
            ),
            lambda: nf.flows.LULinearPermute(dim),
        ),
    }[kind]
    layers = separate([layer() for _ in range(LAYERS)], separator)
    flow = nf.NormalizingFlow(nf.distributions.DiagGaussian(dim, trainable=False), layers)
    return Model(list(flow.parameters()), flow.log_prob, flow.sample)


LIBRARIES = {
    "pyroflows": build_pyroflows,
    "Pyro": build_pyro,
    "zuko": build_zuko,
    "nflows": build_nflows,
    "normflows": build_normflows,
}


def build(library: str, kind: str, dim: int, perturb: float) -> Model:
    """Build a flow of one library and move its weights away from their initial values."""
    torch.manual_seed(0)
    try:
        model = LIBRARIES[library](kind, dim)
    except ModuleNotFoundError as error:
        message = f"{error.name} is missing: install the peers with `pip install pyroflows[bench]`"
        raise SystemExit(message) from error
    with torch.no_grad():
        for parameter in model.parameters:
            parameter.add_(torch.randn_like(parameter), alpha=perturb)
    return model


def train_step(model: Model, data: Tensor) -> Callable[[], None]:
    """Return one step of maximum likelihood."""
    optimizer = torch.optim.Adam(model.parameters, lr=1e-3)

    def step() -> None:
        optimizer.zero_grad()
        # Some libraries answer a tensor they have seen from a cache; a clone is new to them.
        (-model.log_prob(data.clone()).mean()).backward()
        optimizer.step()

    return step


def prepare(operation: str, model: Model, data: Tensor) -> Callable[[], object]:
    """Return the call to be timed."""
    return {
        "train step": train_step(model, data),
        "log_prob": torch.no_grad()(lambda: model.log_prob(data.clone())),
        "sample": torch.no_grad()(lambda: model.sample(DRAWS)),
    }[operation]


def synchronise() -> None:
    """Wait for the device to finish."""
    if torch.get_default_device().type == "cuda":
        torch.cuda.synchronize()


def seconds(call: Callable[[], object]) -> float:
    """Time one call."""
    synchronise()
    start = time.perf_counter()
    call()
    synchronise()
    return time.perf_counter() - start


def affordable(times: list[float], budget: float) -> bool:
    """Decide whether a call that took these times may run once more."""
    if not times:
        return True
    slow = max(times) > SLOW_SECONDS and len(times) > SLOW_ROUNDS
    return not slow and sum(times) + times[-1] <= budget


def interleave(
    calls: dict[str, Callable[[], object]], repeats: int, budget: float
) -> dict[str, list[float]]:
    """Time the calls in turn, so that a drift of the machine meets all of them alike."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(1 + repeats):
        for name, call in calls.items():
            if affordable(times[name], budget):
                times[name].append(seconds(call))
    # The first round warms up.
    return {name: taken[1:] for name, taken in times.items()}


def measure(kind: str, dim: int, arguments: argparse.Namespace) -> list[dict]:
    """Time every operation of every library on one kind of flow in one dimension."""
    rows = []
    data = torch.randn(arguments.batch, dim)
    for operation in OPERATIONS:
        # Training moves the weights, so every operation starts from models of its own.
        calls = {
            library: prepare(operation, build(library, kind, dim, arguments.perturb), data)
            for library in arguments.libraries
        }
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
    """Divide times by those of the fastest peer."""
    best = peers.dropna(how="all").idxmin(axis=1).reindex(peers.index)
    return pd.DataFrame({"ratio": times / peers.min(axis=1), "best peer": best})


def drop_reversed(peers: pd.DataFrame) -> pd.DataFrame:
    """Blank the flows whose fast direction is the slow one of the others."""
    kinds = peers.index.get_level_values("kind")
    reversed_flows = [[(kind, library) in REVERSED for library in peers] for kind in kinds]
    return peers.mask(pd.DataFrame(reversed_flows, peers.index, peers.columns))


def show(title: str, table: pd.DataFrame) -> None:
    """Print a table, saying where the budget left no time."""
    print(f"\n{title}\n{table.round(2).astype(object).fillna(OVER_BUDGET).to_string()}")


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks.flows",
        description=__doc__.split("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--dims", type=int, nargs="+", default=[16, 64], help="dimensions of the flows")
    add("--kinds", nargs="+", choices=KINDS, default=KINDS, help="kinds of flows")
    add("--libraries", nargs="+", choices=LIBRARIES, default=list(LIBRARIES), help="libraries")
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
    rows = pd.DataFrame(
        [
            row
            for kind in arguments.kinds
            for dim in arguments.dims
            for row in measure(kind, dim, arguments)
        ]
    )
    if arguments.csv:
        rows.to_csv(arguments.csv, index=False)
    medians = tabulate(rows)
    show("Medians in ms", medians)
    if "pyroflows" in medians and len(medians.columns) > 1:
        peers = medians.drop(columns="pyroflows")
        show("pyroflows / best peer", compare(medians["pyroflows"], peers))
        same_direction = compare(medians["pyroflows"], drop_reversed(peers))
        show("pyroflows / best peer of the same direction", same_direction)


if __name__ == "__main__":
    main()
