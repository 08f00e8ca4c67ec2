"""Distributions made of flows, what they start from, and their fit to data."""

from .bases import GaussianMixture, StudentT, UniformBox, standard_normal
from .dequantization import Dequantized, dequantize
from .flow import Flow
from .images import image_levels
from .learned import LearnedDensity
from .maximum_likelihood import DensityFit
from .mixture import FlowMixture

__all__ = [
    "DensityFit",
    "Dequantized",
    "Flow",
    "FlowMixture",
    "GaussianMixture",
    "LearnedDensity",
    "StudentT",
    "UniformBox",
    "dequantize",
    "image_levels",
    "standard_normal",
]
