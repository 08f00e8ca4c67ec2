"""Residual flows: blocks, their inverses, and the ways to their log-determinants."""

from .block import Residual, conditional_residual, residual
from .log_det import AutoLogDet, ExactLogDet, LogDet, PowerSeriesLogDet, RussianRouletteLogDet

__all__ = [
    "AutoLogDet",
    "ExactLogDet",
    "LogDet",
    "PowerSeriesLogDet",
    "Residual",
    "RussianRouletteLogDet",
    "conditional_residual",
    "residual",
]
