"""Normalizing flows for Bayesian inference in Pyro."""

from . import diagnostics, flows, transforms
from .distributions import Flow
from .flows import flow, register_flow

__all__ = ["Flow", "diagnostics", "flow", "flows", "register_flow", "transforms"]
