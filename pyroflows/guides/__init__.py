"""Autoguides built from flows: drop-in replacements for Pyro's own."""

from .amortized import AmortizedFlow
from .auto_flow import AutoFlow
from .named import (
    AutoBlockAutoregressive,
    AutoCNF,
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

__all__ = [
    "AmortizedFlow",
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
]
