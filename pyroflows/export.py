"""Any result as an ArviZ object."""

from __future__ import annotations

from typing import Any


def to_arviz(result: Any, **options: Any) -> Any:
    """Convert a result to ArviZ, as its own method ``to_arviz`` does, with the same options.

    Examples
    --------
    >>> import torch, pyroflows as pf
    >>> simulations = pf.sbi.Simulations({"theta": torch.zeros(5)}, {"x": torch.zeros(5, 3)})
    >>> pf.to_arviz(simulations)["prior_predictive"]["x"].shape
    (1, 5, 3)
    """
    if not hasattr(result, "to_arviz"):
        raise TypeError(f"result must be what pyroflows returns, got {type(result).__name__}")
    return result.to_arviz(**options)
