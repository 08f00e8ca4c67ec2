"""What a fit says of itself."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pandas as pd
from torch import Tensor


@dataclass(frozen=True, repr=False)
class DensityFit:
    """Tell how a fit went.

    Attributes
    ----------
    losses
        Mean negative log-likelihood of each minibatch in nats, with the penalty if there is one;
        one a step.
    validation_losses, validation_steps
        Mean negative log-likelihood of the rows held out, and the steps it was computed after.
    best_step
        The step after which the weights that are kept were found.
    seconds
        Time the steps have taken.
    interrupted
        Whether the fit was interrupted.

    Examples
    --------
    >>> import torch, pyroflows as pf
    >>> flow = pf.Flow(None, pf.flow("realnvp", 2, num_layers=2))
    >>> fit = flow.fit(torch.randn(500, 2), num_steps=20, progress=False)
    >>> fit.num_steps, fit.history().columns.to_list()
    (20, ['loss', 'validation_loss'])
    """

    losses: Tensor
    validation_losses: Tensor
    validation_steps: Tensor
    best_step: int
    seconds: float
    interrupted: bool

    @property
    def num_steps(self) -> int:
        """Return the number of steps made."""
        return len(self.losses)

    @property
    def best_validation_loss(self) -> float:
        """Return the loss of the weights that are kept; NaN without validation."""
        return self.validation_losses.min().item() if len(self.validation_losses) else math.nan

    def history(self) -> pd.DataFrame:
        """Return all losses, one row a step; validation losses are NaN in between."""
        frame = pd.DataFrame({"loss": self.losses.numpy()}, index=range(1, self.num_steps + 1))
        frame.index.name = "step"
        validation = pd.Series(self.validation_losses.numpy(), self.validation_steps.numpy())
        frame["validation_loss"] = validation.reindex(frame.index)
        return frame

    def __repr__(self) -> str:
        return (
            f"DensityFit(num_steps={self.num_steps}, best_step={self.best_step}, "
            f"best_validation_loss={self.best_validation_loss:.4f}, seconds={self.seconds:.1f})"
        )
