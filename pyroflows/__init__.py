"""Normalizing flows for Bayesian inference in Pyro."""

from . import diagnostics, flows, transforms
from .distributions import Flow
from .flows import flow, register_flow
from .guides import AutoFlow, AutoIAF, AutoMAF, AutoNICE, AutoRealNVP, AutoSpline
from .svi import VariationalPosterior, fit, load, to_arviz

__all__ = [
    "AutoFlow",
    "AutoIAF",
    "AutoMAF",
    "AutoNICE",
    "AutoRealNVP",
    "AutoSpline",
    "Flow",
    "VariationalPosterior",
    "diagnostics",
    "fit",
    "flow",
    "flows",
    "load",
    "register_flow",
    "to_arviz",
    "transforms",
]
