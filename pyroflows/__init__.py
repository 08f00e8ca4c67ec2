"""Normalizing flows for Bayesian inference in Pyro."""

from . import diagnostics, distributions, flows, sbi, transforms
from .distributions import Flow, FlowMixture
from .flows import flow, register_flow
from .guides import (
    AutoBlockAutoregressive,
    AutoCNF,
    AutoFlow,
    AutoIAF,
    AutoMAF,
    AutoNeuralAutoregressive,
    AutoNICE,
    AutoPlanar,
    AutoRadial,
    AutoRealNVP,
    AutoResidual,
    AutoSpline,
    AutoSylvester,
)
from .svi import (
    NeuTraPosterior,
    PathwiseELBO,
    VariationalPosterior,
    fit,
    load,
    neutra,
    to_arviz,
)

__all__ = [
    "AutoBlockAutoregressive",
    "AutoCNF",
    "AutoFlow",
    "AutoIAF",
    "AutoMAF",
    "AutoNICE",
    "AutoNeuralAutoregressive",
    "AutoPlanar",
    "AutoRadial",
    "AutoRealNVP",
    "AutoResidual",
    "AutoSpline",
    "AutoSylvester",
    "Flow",
    "FlowMixture",
    "NeuTraPosterior",
    "PathwiseELBO",
    "VariationalPosterior",
    "diagnostics",
    "distributions",
    "fit",
    "flow",
    "flows",
    "load",
    "neutra",
    "register_flow",
    "sbi",
    "to_arviz",
    "transforms",
]
