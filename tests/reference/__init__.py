"""Reference models with known answers, for the tests and benchmarks."""

import os
from pathlib import Path

import pyro.distributions as dist
import pytest
import torch
from torch.distributions import biject_to

needs_reference = pytest.mark.skipif(
    "PYROFLOWS_REFERENCE_DIR" not in os.environ,
    reason="PYROFLOWS_REFERENCE_DIR, the folder of reference posteriors, is not set",
)


def reference_folder() -> Path:
    """Return the folder of reference posteriors, as the environment names it."""
    return Path(os.environ["PYROFLOWS_REFERENCE_DIR"])


class Flat(dist.ImproperUniform):
    """Give density one to every point of a support.

    Pyro's improper distribution refuses to sample, which its guides need to find their initial
    values. Samples here are standard normal draws mapped to the support: starting points only.
    """

    def sample(self, sample_shape: tuple[int, ...] = ()) -> torch.Tensor:
        """Map standard normal noise to the support."""
        noise = torch.randn(self.shape(sample_shape))
        return biject_to(self.support)(noise)

    def log_prob(self, value: torch.Tensor) -> torch.Tensor:
        """Return zeros."""
        # Pyro's zeros ignore the value's device and precision.
        return super().log_prob(value).to(value)
