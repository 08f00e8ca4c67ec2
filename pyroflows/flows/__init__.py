"""Named architectures, built from transforms, and the registry that lists them."""

from .autoregressive import iaf, maf, spline_autoregressive
from .block_autoregressive import block_autoregressive
from .circular import circular_spline
from .cnf import cnf
from .couplings import nice, realnvp, spline_coupling
from .images import glow, realnvp_image
from .linear import plu
from .neural import neural_autoregressive
from .planar import planar
from .polynomial import sum_of_squares
from .radial import radial
from .registry import FlowSpec, flow, names, register_flow, spec
from .residual import residual
from .sylvester import sylvester
from .table import table

__all__ = [
    "FlowSpec",
    "block_autoregressive",
    "circular_spline",
    "cnf",
    "flow",
    "glow",
    "iaf",
    "maf",
    "names",
    "neural_autoregressive",
    "nice",
    "planar",
    "plu",
    "radial",
    "realnvp",
    "realnvp_image",
    "register_flow",
    "residual",
    "spec",
    "spline_autoregressive",
    "spline_coupling",
    "sum_of_squares",
    "sylvester",
    "table",
]
