"""Checks of a fit: how far its draws, weights and densities can be trusted."""

from pyroflows.diagnostics.c2st import c2st
from pyroflows.diagnostics.coverage import Coverage, coverage
from pyroflows.diagnostics.ecdf import RankECDF, rank_ecdf, uniformity_p_values
from pyroflows.diagnostics.importance import effective_sample_size, log_evidence
from pyroflows.diagnostics.local_c2st import LocalC2ST, local_c2st
from pyroflows.diagnostics.loo import LOO, loo
from pyroflows.diagnostics.psis import psis
from pyroflows.diagnostics.sbc import SBC, ranks, sbc
from pyroflows.diagnostics.symmetry import symmetry_p_values
from pyroflows.diagnostics.tarp import tarp

__all__ = [
    "LOO",
    "SBC",
    "Coverage",
    "LocalC2ST",
    "RankECDF",
    "c2st",
    "coverage",
    "effective_sample_size",
    "local_c2st",
    "log_evidence",
    "loo",
    "psis",
    "rank_ecdf",
    "ranks",
    "sbc",
    "symmetry_p_values",
    "tarp",
    "uniformity_p_values",
]
