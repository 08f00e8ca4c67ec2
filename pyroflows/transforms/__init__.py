"""Bijections: the flows themselves and the scalar bijections they are made of."""

from .autoregressive import (
    Autoregressive,
    affine_autoregressive,
    conditional_affine_autoregressive,
    conditional_spline_autoregressive,
    spline_autoregressive,
)
from .base import Conditioned, FlowTransform, Inverse
from .block_autoregressive import (
    BlockAutoregressive,
    block_autoregressive,
    conditional_block_autoregressive,
)
from .chain import Chain
from .circular import CircularSpline
from .compose import Compose
from .continuous import ContinuousFlow, Regularization, cnf, conditional_cnf
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
from .image import (
    FactorOut,
    Flattened,
    ImageCoupling,
    InvertibleConvolution,
    Logit,
    Squeezed,
)
from .linear import (
    PLU,
    QR,
    ActNorm,
    DiagonalAffine,
    Orthogonal,
    Permutation,
    TriangularAffine,
    conditional_plu,
    conditional_qr,
    initialize_from_data,
    permute,
    plu,
    qr,
)
from .planar import Planar, conditional_planar, planar
from .polynomial import SumOfSquares, conditional_polynomial, polynomial
from .radial import Radial, conditional_radial, radial
from .residual import (
    ExactLogDet,
    PowerSeriesLogDet,
    Residual,
    RussianRouletteLogDet,
    conditional_residual,
    residual,
)
from .scalar import Affine, ScalarBijection, Scale, Shift
from .sigmoidal import (
    DeepSigmoidal,
    conditional_neural_autoregressive,
    neural_autoregressive,
)
from .solve import ConvergenceError
from .spline import Spline
from .sylvester import Sylvester, conditional_sylvester, sylvester

__all__ = [
    "PLU",
    "QR",
    "ActNorm",
    "Affine",
    "Autoregressive",
    "BlockAutoregressive",
    "Chain",
    "CircularSpline",
    "Compose",
    "Conditioned",
    "ContinuousFlow",
    "ConvergenceError",
    "Coupling",
    "DeepSigmoidal",
    "DiagonalAffine",
    "Elementwise",
    "ExactLogDet",
    "FactorOut",
    "Flattened",
    "FlowTransform",
    "ImageCoupling",
    "Inverse",
    "InvertibleConvolution",
    "Logit",
    "Orthogonal",
    "Permutation",
    "Planar",
    "PowerSeriesLogDet",
    "Radial",
    "Regularization",
    "Residual",
    "RussianRouletteLogDet",
    "ScalarBijection",
    "Scale",
    "Shift",
    "Spline",
    "Squeezed",
    "SumOfSquares",
    "Sylvester",
    "TriangularAffine",
    "additive_coupling",
    "affine_autoregressive",
    "affine_coupling",
    "block_autoregressive",
    "cnf",
    "conditional_additive_coupling",
    "conditional_affine_autoregressive",
    "conditional_affine_coupling",
    "conditional_block_autoregressive",
    "conditional_cnf",
    "conditional_neural_autoregressive",
    "conditional_planar",
    "conditional_plu",
    "conditional_polynomial",
    "conditional_qr",
    "conditional_radial",
    "conditional_residual",
    "conditional_spline",
    "conditional_spline_autoregressive",
    "conditional_spline_coupling",
    "conditional_sylvester",
    "initialize_from_data",
    "neural_autoregressive",
    "permute",
    "planar",
    "plu",
    "polynomial",
    "qr",
    "radial",
    "residual",
    "spline",
    "spline_autoregressive",
    "spline_coupling",
    "sylvester",
]
