"""Bijections: the flows themselves and the scalar bijections they are made of."""

from .autoregressive import (
    Autoregressive,
    affine_autoregressive,
    conditional_affine_autoregressive,
    conditional_spline_autoregressive,
    spline_autoregressive,
)
from .base import Conditioned, FlowTransform, Inverse
from .chain import Chain
from .compose import Compose
from .coupling import (
    Coupling,
    additive_coupling,
    affine_coupling,
    conditional_additive_coupling,
    conditional_affine_coupling,
    conditional_spline_coupling,
    spline_coupling,
)
from .elementwise import Elementwise, conditional_spline, spline
from .linear import DiagonalAffine, Permutation, TriangularAffine, permute
from .scalar import Affine, ScalarBijection, Scale, Shift
from .spline import Spline

__all__ = [
    "Affine",
    "Autoregressive",
    "Chain",
    "Compose",
    "Conditioned",
    "Coupling",
    "DiagonalAffine",
    "Elementwise",
    "FlowTransform",
    "Inverse",
    "Permutation",
    "ScalarBijection",
    "Scale",
    "Shift",
    "Spline",
    "TriangularAffine",
    "additive_coupling",
    "affine_autoregressive",
    "affine_coupling",
    "conditional_additive_coupling",
    "conditional_affine_autoregressive",
    "conditional_affine_coupling",
    "conditional_spline",
    "conditional_spline_autoregressive",
    "conditional_spline_coupling",
    "permute",
    "spline",
    "spline_autoregressive",
    "spline_coupling",
]
