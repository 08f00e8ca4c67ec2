"""Densities of parameters given observations, and of observations given parameters."""
