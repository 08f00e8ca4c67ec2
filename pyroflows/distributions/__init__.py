"""Distributions made of flows, what they start from, and their fit to data."""

from .bases import GaussianMixture, StudentT, UniformBox, standard_normal
from .dequantization import dequantize
from .flow import Flow
from .learned import LearnedDensity
from .maximum_likelihood import DensityFit
from .mixture import FlowMixture

__all__ = [
    "DensityFit",
    "Flow",
    "FlowMixture",
    "GaussianMixture",
    "LearnedDensity",
    "StudentT",
    "UniformBox",
    "dequantize",
    "standard_normal",
]
