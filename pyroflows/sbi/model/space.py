"""The parameters of a simulator as vectors of unconstrained numbers."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributions import biject_to, constraints
from torch.distributions.transforms import (
    AffineTransform,
    ComposeTransform,
    IndependentTransform,
    Transform,
)

from .simulator_runs import Job, run, sample_sites, seeded


class ParameterSpace:
    r"""Map the latent sites of a model to vectors of unconstrained numbers, and back.

    Each site moves through a bijection onto its support, so that no vector lies outside the prior.
    Intervals use :math:`\theta = l + (h - l) \Phi(z)`, which makes a uniform prior a standard
    normal; other supports use Pyro's ``biject_to``. The arithmetic is in double precision: the
    result never leaves the open support, nor is a draw from the prior ever infinite.

    Parameters
    ----------
    sites
        From names to the distribution and the shape of each site, in the order of the model.

    Raises
    ------
    ValueError
        If there are no sites, or one is discrete.

    Examples
    --------
    >>> import pyro.distributions as dist
    >>> space = ParameterSpace({"theta": (dist.Uniform(-1.0, 1.0), torch.Size([2]))})
    >>> space.constrain(torch.zeros(3, 2))["theta"].shape
    torch.Size([3, 2])
    """

    def __init__(self, sites: Mapping[str, tuple[Any, torch.Size]]) -> None:
        if not sites:
            raise ValueError("the simulator has no latent sites: there is nothing to infer")
        self.shapes = {name: shape for name, (_, shape) in sites.items()}
        self.transforms = {
            name: _bijection(name, distribution) for name, (distribution, _) in sites.items()
        }
        self.supports = {name: distribution.support for name, (distribution, _) in sites.items()}
        self.unconstrained_shapes = {
            name: transform.inverse_shape(self.shapes[name])
            for name, transform in self.transforms.items()
        }
        self.sizes = [shape.numel() for shape in self.unconstrained_shapes.values()]

    @classmethod
    def of_model(
        cls,
        model: Callable,
        observed: Collection[str],
        parameters: Collection[str] | None = None,
        args: tuple = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> ParameterSpace:
        """Read the latent sites of a model, all but the observed ones, from two of its traces.

        With ``parameters``, only these: the other sites are noise of the simulator.

        Raises
        ------
        ValueError
            If an observed name or a parameter is no site, or the support of a parameter is random.
        """
        first, second = (
            latent_sites(model, observed, parameters, args, kwargs or {}, seed) for seed in range(2)
        )
        space = cls(first)
        if space != cls(second):
            raise ValueError(
                "the latent sites or their supports change from draw to draw: a bound that depends "
                "on other latent variables is not supported; rescale the variable instead"
            )
        return space

    @property
    def names(self) -> tuple[str, ...]:
        """Return the names of the sites."""
        return tuple(self.shapes)

    @property
    def dim(self) -> int:
        """Return the number of unconstrained numbers."""
        return sum(self.sizes)

    def describe(self) -> dict[str, list]:
        """Return the shape of each site, and where one vector goes: supports tell apart by it."""
        values = self.constrain(torch.full((self.dim,), 0.5, dtype=torch.float64))
        return {
            name: [[*self.shapes[name]], [f"{number:.5g}" for number in value.flatten().tolist()]]
            for name, value in values.items()
        }

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, ParameterSpace):
            return NotImplemented
        return self.shapes == other.shapes and all(
            _same(transform, other.transforms[name]) for name, transform in self.transforms.items()
        )

    __hash__ = None  # type: ignore[assignment]

    def unconstrain(self, values: Mapping[str, Tensor]) -> Tensor:
        """Turn the values of all sites, ``(*batch, *shape)`` each, into vectors ``(*batch, D)``.

        Raises
        ------
        ValueError
            If a site is missing, has the wrong shape, or lies outside its support.
        """
        parts = []
        for (name, transform), size in zip(self.transforms.items(), self.sizes):
            value = self._checked(name, values)
            transform = _on(value.device, transform)
            batch_shape = value.shape[: value.dim() - len(self.shapes[name])]
            unconstrained = transform.inv(value.double())
            parts.append(unconstrained.reshape((*batch_shape, size)).to(value.dtype))
        return torch.cat(parts, -1)

    def constrain(self, vectors: Tensor) -> dict[str, Tensor]:
        """Turn vectors ``(*batch, D)`` into the values of all sites, ``(*batch, *shape)`` each."""
        return {
            name: transform(part).to(vectors.dtype)
            for name, transform, part in self._parts(vectors)
        }

    def log_abs_det_jacobian(self, vectors: Tensor, names: Collection[str] | None = None) -> Tensor:
        """Return ``log|det|`` of the map from vectors ``(*batch, D)`` to values, ``(*batch,)``.

        With ``names``, of the map to these sites alone.
        """
        total = vectors.new_zeros(vectors.shape[:-1], dtype=torch.float64)
        for name, transform, part in self._parts(vectors):
            if names is not None and name not in names:
                continue
            log_det = transform.log_abs_det_jacobian(part, transform(part))
            for _ in range(log_det.dim() - total.dim()):
                log_det = log_det.sum(-1)
            total = total + log_det
        return total.to(vectors.dtype)

    def _parts(self, vectors: Tensor) -> list[tuple[str, Transform, Tensor]]:
        if vectors.shape[-1:] != (self.dim,):
            raise ValueError(
                f"vectors must have {self.dim} entries, got shape {tuple(vectors.shape)}"
            )
        batch_shape, parts = vectors.shape[:-1], vectors.double().split(self.sizes, -1)
        return [
            (name, _on(vectors.device, self.transforms[name]), part.reshape((*batch_shape, *shape)))
            for (name, shape), part in zip(self.unconstrained_shapes.items(), parts)
        ]

    def _checked(self, name: str, values: Mapping[str, Tensor]) -> Tensor:
        if name not in values:
            raise ValueError(f"values must hold site {name!r}, got {sorted(values)}")
        value, shape = torch.as_tensor(values[name]), self.shapes[name]
        if not value.is_floating_point():  # their vectors are no integers
            value = value.to(torch.get_default_dtype())
        if value.shape[value.dim() - len(shape) :] != shape:
            raise ValueError(
                f"site {name!r} has shape {tuple(shape)}, got values of shape {tuple(value.shape)}"
            )
        if not bool(self.supports[name].check(value.cpu()).all()):
            raise ValueError(f"values of site {name!r} lie outside the support of its prior")
        return value


class NormalCDF(Transform):
    r"""Map the line to the unit interval by the normal distribution function :math:`\Phi`."""

    domain = constraints.real
    codomain = constraints.interval(0.0, 1.0)
    bijective = True
    sign = +1

    def __eq__(self, other: object) -> bool:
        return isinstance(other, NormalCDF)

    __hash__ = None  # type: ignore[assignment]

    def _call(self, x: Tensor) -> Tensor:
        eps = _SMALLEST_PROBABILITY
        return torch.special.ndtr(x).clamp(eps, 1 - eps)

    def _inverse(self, y: Tensor) -> Tensor:
        eps = _SMALLEST_PROBABILITY
        return torch.special.ndtri(y.clamp(eps, 1 - eps))

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        return -0.5 * x.square() - _HALF_LOG_TWO_PI


# Values are kept in single precision too, where numbers closer to 1 than this are 1.
_SMALLEST_PROBABILITY = 2.0**-23
_HALF_LOG_TWO_PI = 0.9189385332046727


def _bijection(name: str, distribution: Any) -> Transform:
    support = distribution.support
    if support.is_discrete:
        raise ValueError(
            f"site {name!r} is discrete ({type(distribution).__name__}): posteriors of discrete "
            "parameters are not supported; sum the site out or let it be part of the noise"
        )
    innermost = support
    while isinstance(innermost, constraints.independent):
        innermost = innermost.base_constraint
    if isinstance(innermost, (constraints.interval, constraints.half_open_interval)):
        low, high = (
            torch.as_tensor(bound, dtype=torch.float64)
            for bound in (innermost.lower_bound, innermost.upper_bound)
        )
        return ComposeTransform([NormalCDF(), AffineTransform(low, high - low)])
    return biject_to(support)


def _on(device: torch.device, transform: Transform) -> Transform:
    """Return a transform whose constants are on a device."""
    if isinstance(transform, ComposeTransform):
        return ComposeTransform([_on(device, part) for part in transform.parts])
    if isinstance(transform, IndependentTransform):
        base = _on(device, transform.base_transform)
        return IndependentTransform(base, transform.reinterpreted_batch_ndims)
    if isinstance(transform, AffineTransform):
        loc, scale = (
            constant.to(device) if isinstance(constant, Tensor) else constant
            for constant in (transform.loc, transform.scale)
        )
        return AffineTransform(loc, scale, transform.event_dim)
    return transform


def _same(one: Transform, other: Transform) -> bool:
    if isinstance(one, ComposeTransform) and isinstance(other, ComposeTransform):
        return len(one.parts) == len(other.parts) and all(map(_same, one.parts, other.parts))
    if isinstance(one, IndependentTransform) and isinstance(other, IndependentTransform):
        return _same(one.base_transform, other.base_transform)
    if isinstance(one, AffineTransform) and isinstance(other, AffineTransform):
        return torch.equal(torch.as_tensor(one.loc), torch.as_tensor(other.loc)) and torch.equal(
            torch.as_tensor(one.scale), torch.as_tensor(other.scale)
        )
    return type(one) is type(other)


def latent_sites(
    model: Callable,
    observed: Collection[str],
    parameters: Collection[str] | None,
    args: tuple,
    kwargs: Mapping[str, Any],
    seed: int = 0,
) -> dict[str, tuple[Any, torch.Size]]:
    """Return the distribution and the shape of each parameter in a trace of a model.

    Raises
    ------
    ValueError
        If a name is no site, a parameter is observed, or there are no parameters.
    SimulationError
        If the model raises.
    """
    with seeded(seed), torch.no_grad():
        trace = run(Job(model, args, kwargs, tuple(parameters or ()), tuple(observed)), model)
    sampled = sample_sites(trace)
    _check_names("observed", observed, sampled)
    _check_names("parameters", parameters or (), sampled)
    if both := sorted({*observed} & {*(parameters or ())}):
        raise ValueError(f"parameters must not be observed, got {both} as both")
    found = {
        name: (site["fn"], torch.as_tensor(site["value"]).shape)
        for name, site in sampled.items()
        if name not in observed
        and (not site["is_observed"] if parameters is None else name in parameters)
    }
    if not found:
        raise ValueError("the simulator has no latent sites: there is nothing to infer")
    return found


def site_names(argument: str, names: str | Collection[str]) -> tuple[str, ...]:
    """Return one name or several as a tuple, one at least."""
    result = (names,) if isinstance(names, str) else tuple(names)
    if not result:
        raise ValueError(f"{argument} must name at least one site, got none")
    return result


def _check_names(argument: str, names: Collection[str], sites: Collection[str]) -> None:
    if missing := sorted(set(names) - set(sites)):
        raise ValueError(
            f"{argument} {missing} are not sites of the simulator; its sites: {sorted(sites)}"
        )
