"""Variational inference: the fit, and what it returns."""

from .calibration import VariationalCalibration, calibration
from .fit import fit
from .forward_kl import cover_mass
from .neutra import neutra
from .neutra_posterior import NeuTraPosterior
from .pathwise_elbo import PathwiseELBO
from .posterior import VariationalPosterior, load
from .restarts import Restarts, fit_restarts

__all__ = [
    "NeuTraPosterior",
    "PathwiseELBO",
    "Restarts",
    "VariationalCalibration",
    "VariationalPosterior",
    "calibration",
    "cover_mass",
    "fit",
    "fit_restarts",
    "load",
    "neutra",
]
