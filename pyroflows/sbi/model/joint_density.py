"""The prior and the joint density of a simulator, where its model has them."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Collection, Mapping
from functools import cached_property
from typing import Any

import pyro
import torch
from pyro import poutine
from torch import Tensor

from .observations import ObservationSpace
from .simulator_runs import AllReached, Until, close, is_deterministic, sample_sites, seeded
from .space import ParameterSpace

CHUNK = 4096  # vectors evaluated at once where the model allows
_PLATE = "_pyroflows_vectors"


class JointDensity:
    r"""Evaluate the density of a simulator's parameters, without and with an observation.

    .. math:: \log p(\theta(z)) + \log |\det \partial \theta / \partial z|
        \quad \text{and} \quad
        \log p(x, \theta(z)) + \log |\det \partial \theta / \partial z|

    with respect to the unconstrained parameters ``z``, differentiable. The model runs once for many
    vectors, inside a plate, where that gives what single runs give, and once for each where not.

    Parameters
    ----------
    simulator
        The Pyro model.
    space
        Its parameters.
    observations
        Its observed sites.
    args, kwargs
        Arguments of the model.

    Examples
    --------
    >>> import pyro.distributions as dist
    >>> def simulator():
    ...     theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
    ...     pyro.sample("x", dist.Normal(theta, 1.0))
    >>> where = (simulator, ("x",))
    >>> joint = JointDensity(
    ...     simulator, ParameterSpace.of_model(*where), ObservationSpace.of_model(*where)
    ... )
    >>> joint.log_joint(torch.zeros(5, 1), torch.tensor(0.0)).exp()
    tensor([0.1592, 0.1592, 0.1592, 0.1592, 0.1592])
    """

    def __init__(
        self,
        simulator: Callable,
        space: ParameterSpace,
        observations: ObservationSpace,
        args: tuple = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        self.simulator = simulator
        self.space = space
        self.observations = observations
        self.args = tuple(args)
        self.kwargs = dict(kwargs or {})

    def log_prior(self, z: Tensor) -> Tensor:
        """Return the log-density of unconstrained parameters before any observation.

        The model stops at its last parameter: what it does with them costs nothing.

        Parameters
        ----------
        z
            Vectors of shape ``(*batch, D)``.

        Returns
        -------
        Tensor
            Shape ``(*batch,)``; minus infinity is a density of zero.

        Raises
        ------
        ValueError
            If a density is NaN, or the prior depends on latent sites that are no parameters.
        """
        if not self._prior_is_fixed:
            raise ValueError(
                "the prior has no density: it depends on latent sites that are no parameters"
            )
        return self._log_density(z, {}, self._vectorizes_prior)

    def log_joint(self, z: Tensor, x: Tensor | Mapping[str, Tensor]) -> Tensor:
        """Return the log-density of unconstrained parameters and an observation.

        Parameters
        ----------
        z
            Vectors of shape ``(*batch, D)``.
        x
            The observation: a tensor for one observed site, else a dict of tensors, each of shape
            ``(*batch, *shape)``; its batch broadcasts against that of ``z``.

        Returns
        -------
        Tensor
            Shape ``(*batch,)``; minus infinity is a density of zero.

        Raises
        ------
        ValueError
            If the model has no density of its observed sites given the parameters, ``x`` has the
            wrong shape, or a density is NaN.
        """
        self.check_tractable()
        return self._log_density(z, self._observed(x), self._vectorizes_joint)

    def check_tractable(self) -> None:
        """Raise ``ValueError`` where the model has no density of the data given the parameters."""
        for name in self.observations.names:
            if is_deterministic(self._sites[name]):
                raise ValueError(
                    f"the likelihood is not tractable: observed site {name!r} is "
                    "pyro.deterministic, which has no density; make it a pyro.sample"
                )
        known = {*self.space.names, *self.observations.names}
        noise = sorted(
            name
            for name, site in self._sites.items()
            if name not in known and not site["is_observed"]
        )
        if noise:
            raise ValueError(
                f"the likelihood is not tractable: latent sites {noise} are no parameters, and "
                "would have to be integrated out"
            )

    @cached_property
    def _sites(self) -> dict[str, dict]:
        """Return the sites of one run of the model."""
        with torch.no_grad(), seeded(0):
            return sample_sites(self._trace(self.simulator, {}))

    @cached_property
    def _device(self) -> torch.device:
        """Return where the model computes."""
        return self._sites[self.space.names[0]]["value"].device

    @cached_property
    def _nesting(self) -> int:
        """Return how deep the plates of the model nest."""
        frames = [frame for site in self._sites.values() for frame in site["cond_indep_stack"]]
        return max((-frame.dim for frame in frames if frame.dim is not None), default=0)

    def _observed(self, x: Tensor | Mapping[str, Tensor]) -> dict[str, Tensor]:
        names = self.observations.names
        if not isinstance(x, Mapping):
            if len(names) > 1:
                kind = type(x).__name__
                raise ValueError(f"x must be a dict with the sites {names}, got a {kind}")
            x = {names[0]: x}
        if missing := sorted(set(names) - set(x)):
            raise ValueError(f"x must hold the observed sites {missing}, got {sorted(x)}")
        observed = {name: torch.as_tensor(x[name]) for name in names}
        for name, value in observed.items():
            shape = self._sites[name]["value"].shape
            if value.shape[max(0, value.dim() - len(shape)) :] != shape:
                raise ValueError(
                    f"observed site {name!r} of the model has shape {tuple(shape)}, got x of shape "
                    f"{tuple(value.shape)}"
                )
        return observed

    def _log_density(self, z: Tensor, observed: Mapping[str, Tensor], vectorizes: bool) -> Tensor:
        shapes = {name: self._sites[name]["value"].shape for name in observed}
        batches = [v.shape[: v.dim() - len(shapes[name])] for name, v in observed.items()]
        batch_shape = torch.broadcast_shapes(z.shape[:-1], *batches)
        rows = z.to(self._device).expand(*batch_shape, z.shape[-1]).reshape(-1, z.shape[-1])
        data = {
            name: value.to(self._device)
            .expand(*batch_shape, *shapes[name])
            .reshape(-1, *shapes[name])
            for name, value in observed.items()
        }
        size = CHUNK if vectorizes else 1
        parts = [
            self._rows(
                rows[start : start + size],
                {name: value[start : start + size] for name, value in data.items()},
                vectorizes,
            )
            for start in range(0, len(rows), size)
        ]
        total = torch.cat(parts) if parts else rows.new_zeros(0)
        if bool(total.isnan().any()):
            raise ValueError(
                f"the model's log-density is NaN at {int(total.isnan().sum())} of {len(total)} "
                "vectors: look for numbers that are not finite, in x or in the model"
            )
        return total.reshape(batch_shape).to(z.device)

    def _rows(self, z: Tensor, observed: Mapping[str, Tensor], vectorized: bool) -> Tensor:
        """Return the log-densities of vectors ``(S, D)``; ``S`` must be 1 if not vectorised."""
        values = {**self.space.constrain(z), **observed}
        if vectorized:
            values = {name: self._placed(name, value) for name, value in values.items()}
            program = pyro.plate(_PLATE, len(z), dim=-1 - self._nesting)(self.simulator)
        else:
            values = {name: value[0] for name, value in values.items()}
            program = self.simulator
        sites = self._trace(program, values).nodes
        if missing := sorted(values.keys() - sites.keys()):
            raise ValueError(f"the model did not reach its sites {missing}")
        terms = [sites[name]["fn"].log_prob(value) for name, value in values.items()]
        total = sum(term.reshape(len(z), -1).sum(-1) for term in terms)
        return total + self.space.log_abs_det_jacobian(z)

    def _placed(self, name: str, value: Tensor) -> Tensor:
        """Leave room for the model's plates between the vectors and the value of a site."""
        site = self._sites[name]
        batch_dim = site["value"].dim() - site["fn"].event_dim
        room = (1,) * (self._nesting - batch_dim)
        return value.reshape(len(value), *room, *site["value"].shape)

    def _trace(self, program: Callable, values: Mapping[str, Tensor]) -> poutine.Trace:
        """Run a program with some of its sites given, up to the last of them."""
        tracer = poutine.trace()
        # Far from the posterior a density may be NaN, which is checked for all of them at once.
        with poutine.block(), pyro.validation_enabled(False), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Encountered ", UserWarning)
            condition = poutine.condition(data=dict(values))
            with contextlib.suppress(AllReached), tracer, Until(values), condition:
                program(*self.args, **self.kwargs)
        return tracer.trace

    @cached_property
    def _prior_is_fixed(self) -> bool:
        """Tell whether the prior of the parameters depends on nothing else."""
        z, _ = self._example(())
        densities = []
        for seed in range(2):
            with seeded(seed), torch.no_grad():
                densities.append(self._rows(z[:1], {}, vectorized=False))
        return close(*densities)

    @cached_property
    def _vectorizes_prior(self) -> bool:
        return self._vectorizes(*self._example(()))

    @cached_property
    def _vectorizes_joint(self) -> bool:
        return self._vectorizes(*self._example(self.observations.names))

    @torch.no_grad()
    def _vectorizes(self, z: Tensor, observed: Mapping[str, Tensor]) -> bool:
        """Tell whether vectors in a plate have the densities that they have one by one."""

        def part(rows: slice, vectorized: bool) -> Tensor:
            data = {name: value[rows] for name, value in observed.items()}
            return self._rows(z[rows], data, vectorized)

        alone = torch.cat([part(slice(i, i + 1), False) for i in range(len(z))])
        try:
            return all(
                close(part(slice(size), True), alone[:size]) for size in range(2, len(z) + 1)
            )
        except Exception:  # whatever it is, the model does not work on many vectors
            return False

    @torch.no_grad()
    def _example(self, observed: Collection[str]) -> tuple[Tensor, dict[str, Tensor]]:
        """Return a few parameters and observations as the model draws them."""
        with seeded(1):
            draws = [self._trace(self.simulator, {}).nodes for _ in range(5)]

        def stacked(names: Collection[str]) -> dict[str, Tensor]:
            return {name: torch.stack([draw[name]["value"] for draw in draws]) for name in names}

        return self.space.unconstrain(stacked(self.space.names)), stacked(observed)
