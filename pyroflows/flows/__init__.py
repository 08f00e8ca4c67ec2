"""Named architectures, built from transforms, and the registry that lists them."""

from .autoregressive import iaf, maf, spline_autoregressive
from .couplings import nice, realnvp, spline_coupling
from .registry import FlowSpec, flow, names, register_flow, spec

__all__ = [
    "FlowSpec",
    "flow",
    "iaf",
    "maf",
    "names",
    "nice",
    "realnvp",
    "register_flow",
    "spec",
    "spline_autoregressive",
    "spline_coupling",
]
