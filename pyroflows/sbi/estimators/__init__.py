"""Estimators: what learns from simulations."""
