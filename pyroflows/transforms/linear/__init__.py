"""Linear flows: permutations and affine maps of the whole vector."""

from .affine import DiagonalAffine, TriangularAffine
from .permutation import Permutation, permute

__all__ = ["DiagonalAffine", "Permutation", "TriangularAffine", "permute"]
