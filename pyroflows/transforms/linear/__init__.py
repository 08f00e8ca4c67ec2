"""Linear flows: permutations and affine maps of the whole vector."""

from .actnorm import ActNorm, initialize_from_data
from .affine import DiagonalAffine, TriangularAffine
from .orthogonal import Orthogonal
from .permutation import Permutation, permute
from .plu import PLU, conditional_plu, plu
from .qr import QR, conditional_qr, qr

__all__ = [
    "PLU",
    "QR",
    "ActNorm",
    "DiagonalAffine",
    "Orthogonal",
    "Permutation",
    "TriangularAffine",
    "conditional_plu",
    "conditional_qr",
    "initialize_from_data",
    "permute",
    "plu",
    "qr",
]
