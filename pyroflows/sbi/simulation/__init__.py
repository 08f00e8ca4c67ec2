"""Draws of parameters and observations from simulators."""
