"""Variational inference: the fit, and what it returns."""

from .fit import fit
from .posterior import VariationalPosterior
from .storage import load

__all__ = ["VariationalPosterior", "fit", "load"]
