"""Maximum likelihood: the fit of densities to data."""

from .data import Rows, check_rows, concatenate, split
from .density_fit import DensityFit
from .settings import Settings
from .training import Penalty, maximize_likelihood

__all__ = [
    "DensityFit",
    "Penalty",
    "Rows",
    "Settings",
    "check_rows",
    "concatenate",
    "maximize_likelihood",
    "split",
]
