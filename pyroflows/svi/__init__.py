"""Variational inference: the fit, and what it returns."""

from .fit import fit
from .neutra import neutra
from .neutra_posterior import NeuTraPosterior
from .pathwise_elbo import PathwiseELBO
from .posterior import VariationalPosterior, load, to_arviz

__all__ = [
    "NeuTraPosterior",
    "PathwiseELBO",
    "VariationalPosterior",
    "fit",
    "load",
    "neutra",
    "to_arviz",
]
