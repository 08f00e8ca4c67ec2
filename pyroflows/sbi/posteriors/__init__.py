"""Posteriors: what estimators return, and how to sample it."""
