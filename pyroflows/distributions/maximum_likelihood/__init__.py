"""Maximum likelihood: the fit of densities to data."""

from .data import Rows, as_rows, check_rows, concatenate, split, with_context
from .density_fit import DensityFit
from .settings import Settings
from .training import Penalty, maximize_likelihood

__all__ = [
    "DensityFit",
    "Penalty",
    "Rows",
    "Settings",
    "as_rows",
    "check_rows",
    "concatenate",
    "maximize_likelihood",
    "split",
    "with_context",
]
