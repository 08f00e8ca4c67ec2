"""Any sites of a simulator given any others."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ...random_state import seeded
from ..model.observations import ObservationSpace
from .posterior import Posterior
from .velocity_posterior import VelocityPosterior

if TYPE_CHECKING:
    from ..densities.joint_flow_density import JointFlowDensity


class JointPosterior(VelocityPosterior):
    """Sample and evaluate any sites of a simulator given any others.

    What :meth:`JointFlowMatching.fit` returns. With ``x`` it is a :class:`VelocityPosterior`, for
    observations of which some entries may be missing, NaN. With ``given`` the condition is any
    choice of sites, parameters and observed ones.

    Examples
    --------
    >>> import pyro, pyro.distributions as dist, pyroflows as pf
    >>> def simulator():
    ...     theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
    ...     pyro.sample("x", dist.Normal(theta, 1.0))
    >>> estimator = pf.sbi.JointFlowMatching(simulator)
    >>> posterior = estimator.fit(num_simulations=500, num_steps=50, progress=False)
    >>> sorted(posterior.sample(100, given={}))
    ['theta', 'x']
    """

    density: JointFlowDensity

    @classmethod
    def of(cls, posterior: Posterior) -> JointPosterior:
        """Return the joint view of a posterior of a :class:`JointFlowDensity`."""
        observations = ObservationSpace(posterior.observations.shapes, missing="random")
        return cls(
            posterior.space,
            observations,
            posterior.density,
            posterior.about,
            posterior.fit,
            posterior.joint,
        )

    def sample(
        self,
        num_samples: int,
        *,
        x: Any = None,
        given: Mapping[str, Tensor] | None = None,
        seed: int | None = None,
    ) -> dict[str, Tensor]:
        """Draw parameters given observations, or all sites given some.

        Parameters
        ----------
        num_samples
            Number of draws ``S``.
        x
            One observation, or a batch: see :meth:`Posterior.sample`. Entries may be NaN.
        given
            Instead of ``x``: from any sites to their values, ``(*batch, *shape)`` each, whose
            batches broadcast. Entries of observed sites may be NaN. Empty: draws of everything.
        seed
            Makes the draws reproducible; the global random state is left alone then.

        Returns
        -------
        dict
            From sites to draws ``(S, *batch, *shape)``: the parameters with ``x``, else all sites
            that are not given or have missing entries.

        Raises
        ------
        ValueError
            If both or neither of ``x`` and ``given`` are there, or ``given`` holds all sites,
            unknown ones, or values of a wrong shape or outside the prior; see also
            :meth:`Posterior.sample`.
        """
        _check_one_condition(x, given)
        if given is None:
            return super().sample(num_samples, x=x, seed=seed)
        if num_samples < 1:
            raise ValueError(f"num_samples must be at least 1, got {num_samples}")
        condition = self._condition(given)
        free = [name for name, part in self._parts(condition).items() if bool(part.isnan().any())]
        if not free:
            raise ValueError("given must leave a site, or an entry, to sample; all are given")
        with seeded(seed):
            vectors = self.density.complete(num_samples, condition)
        values = self._values(vectors)
        return {name: values[name] for name in free}

    def log_prob(
        self,
        values: Mapping[str, Tensor],
        *,
        x: Any = None,
        given: Mapping[str, Tensor] | None = None,
    ) -> Tensor:
        """Return the log-density of parameters given observations, or of sites given all others.

        Parameters
        ----------
        values
            From sites to values of shape ``(*batch, *shape)``.
        x
            The observation, as for :meth:`sample`, without missing entries; ``values`` are those
            of the parameters then.
        given
            Instead of ``x``: from all other sites to their values, whose batches broadcast.

        Returns
        -------
        Tensor
            Shape ``(*batch,)``.

        Raises
        ------
        ValueError
            If a site is in neither or both of ``values`` and ``given``, or an entry is missing.
        """
        _check_one_condition(x, given)
        if given is None:
            return super().log_prob(values, x=x)
        if both := sorted(values.keys() & given.keys()):
            raise ValueError(f"sites must be in values or in given, got {both} in both")
        vectors = self._condition({**values, **given})
        if bool(vectors.isnan().any()):
            raise ValueError(
                f"values and given must hold all sites together, {self.names}, without NaN: got "
                f"values of {sorted(values)} and given {sorted(given)}"
            )
        condition = vectors.clone()
        for name, part in self._parts(condition).items():
            if name in values:
                part.fill_(torch.nan)
        z = vectors[..., : self.space.dim]
        volume = self.space.log_abs_det_jacobian(z, names=values)
        return self.density.log_prob_of_free(vectors, condition) - volume

    @property
    def names(self) -> tuple[str, ...]:
        """Return the names of all sites."""
        return self.space.names + self.observations.names

    def _condition(self, given: Mapping[str, Any]) -> Tensor:
        """Return the vectors, ``(*batch, D + V)``, of some sites, NaN for the others."""
        if unknown := sorted(given.keys() - {*self.names}):
            raise ValueError(f"sites of the simulator are {self.names}, got {unknown}")
        like = self.density.linear.loc
        shapes = {**self.space.shapes, **self.observations.shapes}
        values, batch = _broadcast(given, shapes, like)
        # Sites that are not given need values too, to be replaced by NaN after all checks.
        anywhere = self.space.constrain(like.new_zeros((*batch, self.space.dim)))
        unseen = {
            name: like.new_zeros((*batch, *shape))
            for name, shape in self.observations.shapes.items()
        }
        vectors = torch.cat(
            [
                self.space.unconstrain({**anywhere, **values}),
                self.observations.tensor({**unseen, **values}).to(like),
            ],
            -1,
        )
        for name, part in self._parts(vectors).items():
            if name not in values:
                part.fill_(torch.nan)
        return vectors

    def _values(self, vectors: Tensor) -> dict[str, Tensor]:
        """Return the values of all sites in vectors."""
        parts = self._parts(vectors)
        return {
            **self.space.constrain(vectors[..., : self.space.dim]),
            **{
                name: parts[name].reshape(*vectors.shape[:-1], *shape)
                for name, shape in self.observations.shapes.items()
            },
        }

    def _parts(self, vectors: Tensor) -> dict[str, Tensor]:
        """Return views of the entries of each site."""
        sizes = [*self.space.sizes, *(s.numel() for s in self.observations.shapes.values())]
        return dict(zip(self.names, vectors.split(sizes, -1), strict=True))


def _broadcast(
    given: Mapping[str, Any], shapes: Mapping[str, torch.Size], like: Tensor
) -> tuple[dict[str, Tensor], torch.Size]:
    """Return values of one batch shape, and that shape."""
    values = {name: torch.as_tensor(value).to(like) for name, value in given.items()}
    batches = {}
    for name, value in values.items():
        start = value.dim() - len(shapes[name])
        if start < 0 or value.shape[start:] != shapes[name]:
            raise ValueError(
                f"site {name!r} has shape {tuple(shapes[name])}, got values of shape "
                f"{tuple(value.shape)}"
            )
        batches[name] = value.shape[:start]
    try:
        batch = torch.Size(np.broadcast_shapes(*batches.values()))
    except ValueError as error:
        shown = {name: tuple(shape) for name, shape in batches.items()}
        raise ValueError(f"batches of given must broadcast, got {shown}") from error
    return {name: value.expand(batch + shapes[name]) for name, value in values.items()}, batch


def _check_one_condition(x: Any, given: Any) -> None:
    if (x is None) == (given is None):
        raise ValueError(f"either x or given is needed, got {'neither' if x is None else 'both'}")
