"""Checks of a fit: how far its draws, weights and densities can be trusted."""

from pyroflows.diagnostics.importance import effective_sample_size, log_evidence
from pyroflows.diagnostics.psis import psis

__all__ = ["effective_sample_size", "log_evidence", "psis"]
