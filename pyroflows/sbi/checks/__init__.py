"""Checks of posteriors against simulations."""
