"""The posterior an estimator has learned, for any observation."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import tensor_file
from ..arviz import build
from ..distributions.maximum_likelihood import DensityFit
from .conditional import ConditionalDensity
from .observations import ObservationSpace
from .space import ParameterSpace

FORMAT = "pyroflows.Posterior/1"
CHUNK = 1024  # draws at a time: what fits in the caches is several times faster


class Posterior:
    """Sample and evaluate the posterior of a simulator's parameters for any observation.

    What estimators return; :meth:`Estimator.load` reads one from a file.

    Attributes
    ----------
    space
        The parameters.
    observations
        The observations.
    density
        What was trained: a density of unconstrained parameters given an observation.
    fit
        How the training went; ``None`` for a posterior from a file.
    """

    def __init__(
        self,
        space: ParameterSpace,
        observations: ObservationSpace,
        density: ConditionalDensity,
        about: Mapping[str, Any],
        fit: DensityFit | None = None,
    ) -> None:
        self.space = space
        self.observations = observations
        self.density = density.eval().requires_grad_(False)
        self.about = dict(about)
        self.fit = fit

    def sample(
        self, num_samples: int, *, x: Tensor | Mapping[str, Tensor], seed: int | None = None
    ) -> dict[str, Tensor]:
        """Draw parameters given one observation, or each of a batch.

        Parameters
        ----------
        num_samples
            Number of draws ``S``.
        x
            The observation: a tensor for one observed site, else a dict of tensors, each of shape
            ``(*batch, *shape)``.
        seed
            Makes the draws reproducible; the global random state is left alone then.

        Returns
        -------
        dict
            From sites to draws ``(S, *batch, *shape)``.

        Raises
        ------
        ValueError
            If ``num_samples`` is below 1, or ``x`` has the wrong shape or numbers that are not
            finite.
        """
        if num_samples < 1:
            raise ValueError(f"num_samples must be at least 1, got {num_samples}")
        observed = self._tensor(x)
        batch_size = observed.shape[: observed.dim() - self.observations.event_dim].numel()
        size = max(1, CHUNK // max(1, batch_size))
        with torch.random.fork_rng(devices=[], enabled=seed is not None):
            if seed is not None:
                torch.manual_seed(seed)
            draws = [
                self.density.sample(min(size, num_samples - start), observed)
                for start in range(0, num_samples, size)
            ]
        return self.space.constrain(torch.cat(draws))

    def log_prob(self, values: Mapping[str, Tensor], *, x: Tensor | Mapping[str, Tensor]) -> Tensor:
        """Return the log-density of parameters given an observation.

        Parameters
        ----------
        values
            From sites to values of shape ``(*batch, *shape)``.
        x
            The observation, as for :meth:`sample`; its batch broadcasts against that of the values.

        Returns
        -------
        Tensor
            Shape ``(*batch,)``.
        """
        z = self.space.unconstrain(values).to(self.density.linear.loc)
        return self.density.log_prob(z, self._tensor(x)) - self.space.log_abs_det_jacobian(z)

    def to_arviz(
        self, *, x: Tensor | Mapping[str, Tensor], num_samples: int = 1000, seed: int | None = None
    ) -> Any:
        """Return draws given one observation as ArviZ data, with the observation itself."""
        draws = self.sample(num_samples, x=x, seed=seed)
        observed = x if isinstance(x, Mapping) else {self.observations.names[0]: x}
        groups = {
            "posterior": {name: value.cpu().numpy()[None] for name, value in draws.items()},
            "observed_data": {
                name: torch.as_tensor(value).cpu().numpy() for name, value in observed.items()
            },
        }
        return build(groups, attrs={"inference_library": "pyroflows", **self.about})

    def save(self, path: str | Path) -> None:
        """Write the posterior to a file of tensors and JSON; see :meth:`Estimator.load`."""
        tensor_file.write(path, FORMAT, self.density.state_dict(), self.about)

    def to(self, device: torch.device | str) -> Posterior:
        """Move to a device, in place."""
        self.density.to(device)
        return self

    def _tensor(self, x: Tensor | Mapping[str, Tensor]) -> Tensor:
        return self.observations.tensor(x).to(self.density.linear.loc)
