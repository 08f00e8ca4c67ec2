"""The same architectures, built by every library that has them.

A kind is the name of a registered flow, or that name and `INVERTED` for the flow turned around:
some libraries compute the fast direction of one where others invert. The libraries differ where
their interfaces leave no choice:

- Pyro's splines are linear rational, since its quadratic ones cannot be built by its helpers.
- Splines of this package carry an affine map each, which the others' do not.
- normflows' spline networks are one residual block, which is one hidden layer more.
- Residual flows estimate the log-determinant as normflows does where they are compared, and
  compute it exactly elsewhere, as is their default for 16 entries.
- zuko's neural autoregressive flow is a monotone network of two layers of 64 units with a signal
  of 16 features; this package's and Pyro's a sum of sigmoids.
"""

import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor, nn

import pyroflows as pf

INVERTED = " inverted"
LAYERS, HIDDEN, BINS, BOUND = 5, (64, 64), 8, 5.0
RELU = {"activation": nn.ReLU}
# Networks of the peers are of rectifiers; the default of this package is the hyperbolic tangent.
RECTIFIED = {
    "iaf",
    "maf",
    "nice",
    "realnvp",
    "spline_autoregressive",
    "spline_coupling",
    "neural_autoregressive",
    "circular_spline",
}


@dataclass(frozen=True)
class Model:
    """Presents a flow of any library through one interface; what it cannot do is missing."""

    parameters: list[nn.Parameter]
    sample: Callable[[int], object]
    log_prob: Callable[[Tensor], Tensor] | None = None
    sample_and_log_prob: Callable[[int], tuple[Tensor, Tensor]] | None = None


def separate(layers: Iterable, separator: Callable[[], object]) -> list:
    """Put a new separator between each two layers."""
    return [part for layer in layers for part in (layer, separator())][:-1]


# This package


def build_pyroflows(kind: str, dim: int) -> Model:
    name = kind.removesuffix(INVERTED)
    options = {"num_layers": LAYERS, "hidden_dims": HIDDEN, "bins": BINS, "bound": BOUND}
    options |= RELU if name in RECTIFIED else {}
    if name == "cnf":
        options["num_layers"] = 1
    if kind == f"residual{INVERTED}":
        options["log_det"] = "russian_roulette"
    known = inspect.signature(pf.flows.spec(name).factory).parameters
    transform = pf.flow(name, dim, **{key: options[key] for key in options if key in known})
    if kind.endswith(INVERTED):
        transform = transform.inv
    base = None
    if pf.flows.spec(name).support == "circle":
        base = dist.Uniform(-torch.pi, torch.pi).expand([dim]).to_event(1)
    flow = pf.Flow(base, transform)
    return Model(
        list(transform.parameters()),
        lambda draws: flow.sample(torch.Size([draws])),
        flow.log_prob,
        lambda draws: flow.rsample_and_log_prob((draws,)),
    )


# Pyro


def pyro_model(layers: list, dim: int, mixing: bool = False) -> Model:
    from pyro.distributions import transforms as T

    parts = separate(layers, lambda: T.Permute(torch.arange(dim).flip(0))) if mixing else layers
    base = dist.Normal(torch.zeros(dim), torch.ones(dim)).to_event(1)
    flow = dist.TransformedDistribution(base, parts)

    def sample_and_log_prob(draws: int) -> tuple[Tensor, Tensor]:
        x = flow.rsample(torch.Size([draws]))
        return x, flow.log_prob(x)

    invertible = type(layers[0]).__name__ in {"AffineCoupling", "SplineCoupling"}
    return Model(
        list(nn.ModuleList(layers).parameters()),
        lambda draws: flow.sample(torch.Size([draws])),
        flow.log_prob if invertible else None,
        sample_and_log_prob,
    )


def build_pyro_stack(factory: str, mixing: bool, options: dict[str, Any], dim: int) -> Model:
    from pyro.distributions import transforms as T

    return pyro_model([getattr(T, factory)(dim, **options) for _ in range(LAYERS)], dim, mixing)


_NETWORK = {"hidden_dims": list(HIDDEN)}
PYRO = {
    "planar": partial(build_pyro_stack, "planar", False, {}),
    "radial": partial(build_pyro_stack, "radial", False, {}),
    "sylvester": partial(build_pyro_stack, "sylvester", False, {}),
    "realnvp": partial(build_pyro_stack, "affine_coupling", True, _NETWORK),
    "iaf": partial(build_pyro_stack, "affine_autoregressive", True, _NETWORK),
    "spline_coupling": partial(
        build_pyro_stack, "spline_coupling", True, {**_NETWORK, "count_bins": BINS, "bound": BOUND}
    ),
    f"spline_autoregressive{INVERTED}": partial(
        build_pyro_stack,
        "spline_autoregressive",
        True,
        {**_NETWORK, "count_bins": BINS, "bound": BOUND},
    ),
    "neural_autoregressive": partial(build_pyro_stack, "neural_autoregressive", True, _NETWORK),
    "block_autoregressive": partial(
        build_pyro_stack, "block_autoregressive", True, {"residual": "gated"}
    ),
}


# zuko


def build_zuko(flow_class: str, options: dict[str, Any], dim: int) -> Model:
    from zuko import flows

    flow = getattr(flows, flow_class)(dim, **options)
    return Model(
        list(flow.parameters()),
        lambda draws: flow().sample(torch.Size([draws])),
        lambda x: flow().log_prob(x),
        lambda draws: flow().rsample_and_log_prob(torch.Size([draws])),
    )


def build_zuko_spline_coupling(dim: int) -> Model:
    from zuko.transforms import MonotonicRQSTransform

    # NSF(passes=2) couples too, but takes twice as long: it transforms masked variables as well.
    spline = {"univariate": MonotonicRQSTransform, "shapes": [(BINS,), (BINS,), (BINS - 1,)]}
    return build_zuko("RealNVP", {**_STACK, **spline}, dim)


_STACK = {"transforms": LAYERS, "hidden_features": HIDDEN}
ZUKO = {
    "nice": partial(build_zuko, "NICE", _STACK),
    "realnvp": partial(build_zuko, "RealNVP", _STACK),
    "maf": partial(build_zuko, "MAF", _STACK),
    "spline_coupling": build_zuko_spline_coupling,
    "spline_autoregressive": partial(build_zuko, "NSF", {**_STACK, "bins": BINS}),
    f"neural_autoregressive{INVERTED}": partial(
        build_zuko, "NAF", {**_STACK, "network": {"hidden_features": HIDDEN}}
    ),
    f"sum_of_squares{INVERTED}": partial(build_zuko, "SOSPF", _STACK),
    "cnf": partial(build_zuko, "CNF", {"hidden_features": HIDDEN, "exact": True}),
}


# nflows


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


def nflows_model(layers: list, dim: int) -> Model:
    from nflows.distributions import StandardNormal
    from nflows.flows import Flow
    from nflows.transforms import CompositeTransform

    flow = Flow(CompositeTransform(layers), StandardNormal([dim]))
    return Model(list(flow.parameters()), flow.sample, flow.log_prob, flow.sample_and_log_prob)


def build_nflows_coupling(layer: str, options: dict[str, Any], dim: int) -> Model:
    from nflows import transforms as T

    masks = [(torch.arange(dim) + index) % 2 for index in range(LAYERS)]
    return nflows_model(
        [getattr(T, layer)(mask, CouplingNetwork, **options) for mask in masks], dim
    )


def build_nflows_autoregressive(layer: str, options: dict[str, Any], dim: int) -> Model:
    from nflows import transforms as T

    # One block without residuals is the second of the two hidden layers.
    network = {"hidden_features": HIDDEN[0], "num_blocks": 1, "use_residual_blocks": False}
    layers = [getattr(T, layer)(dim, **network, **options) for _ in range(LAYERS)]
    return nflows_model(separate(layers, lambda: T.ReversePermutation(dim)), dim)


def build_nflows_linear(layer: str, options: dict[str, Any], dim: int) -> Model:
    from nflows import transforms as T

    return nflows_model([getattr(T, layer)(dim, **options)], dim)


_SPLINE = {"num_bins": BINS, "tails": "linear", "tail_bound": BOUND}
NFLOWS = {
    "nice": partial(build_nflows_coupling, "AdditiveCouplingTransform", {}),
    "realnvp": partial(build_nflows_coupling, "AffineCouplingTransform", {}),
    "spline_coupling": partial(
        build_nflows_coupling, "PiecewiseRationalQuadraticCouplingTransform", _SPLINE
    ),
    "maf": partial(build_nflows_autoregressive, "MaskedAffineAutoregressiveTransform", {}),
    "spline_autoregressive": partial(
        build_nflows_autoregressive,
        "MaskedPiecewiseRationalQuadraticAutoregressiveTransform",
        _SPLINE,
    ),
    "plu": partial(build_nflows_linear, "LULinear", {}),
}


# normflows


def normflows_model(layers: list, dim: int, invertible: bool = True) -> Model:
    import normflows as nf

    flow = nf.NormalizingFlow(nf.distributions.DiagGaussian(dim, trainable=False), layers)
    return Model(
        list(flow.parameters()), flow.sample, flow.log_prob if invertible else None, flow.sample
    )


def build_normflows_coupling(dim: int) -> Model:
    import normflows as nf

    kept, moved = dim - dim // 2, dim // 2
    layers = [
        nf.flows.AffineCouplingBlock(nf.nets.MLP([kept, *HIDDEN, 2 * moved])) for _ in range(LAYERS)
    ]
    return normflows_model(separate(layers, lambda: nf.flows.Permute(dim, mode="swap")), dim)


def build_normflows_stack(layer: str, options: dict[str, Any], dim: int) -> Model:
    import normflows as nf

    layers = [getattr(nf.flows, layer)(dim, **options) for _ in range(LAYERS)]
    return normflows_model(separate(layers, lambda: nf.flows.LULinearPermute(dim)), dim)


def build_normflows_vector(layer: str, dim: int) -> Model:
    import normflows as nf

    return normflows_model([getattr(nf.flows, layer)((dim,)) for _ in range(LAYERS)], dim, False)


def build_normflows_residual(dim: int) -> Model:
    import normflows as nf

    def block() -> nn.Module:
        network = nf.nets.LipschitzMLP([dim, *HIDDEN, dim], lipschitz_const=0.9)
        return nf.flows.Residual(network, reduce_memory=True)

    return normflows_model([block() for _ in range(LAYERS)], dim)


_BLOCK = {"num_blocks": 1, "num_hidden_channels": HIDDEN[0], "num_bins": BINS, "tail_bound": BOUND}
_MASKED = {"hidden_features": HIDDEN[0], "num_blocks": 1, "use_residual_blocks": False}
NORMFLOWS = {
    "planar": partial(build_normflows_vector, "Planar"),
    "radial": partial(build_normflows_vector, "Radial"),
    "realnvp": build_normflows_coupling,
    "spline_coupling": partial(build_normflows_stack, "CoupledRationalQuadraticSpline", _BLOCK),
    "spline_autoregressive": partial(
        build_normflows_stack, "AutoregressiveRationalQuadraticSpline", _BLOCK
    ),
    "iaf": partial(build_normflows_stack, "MaskedAffineAutoregressive", _MASKED),
    f"residual{INVERTED}": build_normflows_residual,
}

PEERS = {"Pyro": PYRO, "zuko": ZUKO, "nflows": NFLOWS, "normflows": NORMFLOWS}
LIBRARIES = ("pyroflows", *PEERS)


def kinds() -> list[str]:
    """Return every registered flow, and the inverted ones that some library has."""
    built = {kind for peer in PEERS.values() for kind in peer}
    return [
        kind
        for name in pf.flows.names()
        for kind in (name, name + INVERTED)
        if kind == name or kind in built
    ]


def build(library: str, kind: str, dim: int, perturb: float) -> Model | None:
    """Build a flow of one library and move its weights away from their initial values."""
    torch.manual_seed(0)
    if library == "pyroflows":
        model = build_pyroflows(kind, dim)
    elif kind in PEERS[library]:
        try:
            model = PEERS[library][kind](dim)
        except ModuleNotFoundError as error:
            message = (
                f"{error.name} is missing: install the peers with `pip install pyroflows[bench]`"
            )
            raise SystemExit(message) from error
    else:
        return None
    with torch.no_grad():
        for parameter in model.parameters:
            parameter.add_(torch.randn_like(parameter), alpha=perturb)
    return model
