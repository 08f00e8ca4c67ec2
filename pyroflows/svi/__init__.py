"""Variational inference: the fit, and what it returns."""

from .fit import fit
from .posterior import VariationalPosterior, load, to_arviz

__all__ = ["VariationalPosterior", "fit", "load", "to_arviz"]
