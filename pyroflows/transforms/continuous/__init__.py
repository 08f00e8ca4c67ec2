"""Continuous normalizing flows: vectors carried along a learned velocity field."""

from .flow import ContinuousFlow, Regularization, cnf, conditional_cnf

__all__ = ["ContinuousFlow", "Regularization", "cnf", "conditional_cnf"]
