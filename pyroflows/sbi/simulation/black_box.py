"""Simulators outside of Pyro as Pyro models."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions.torch_distribution import TorchDistributionMixin
from torch import Tensor


class BlackBox:
    """Make a Pyro model of a prior and a function.

    The parameters are drawn from the prior; what the function makes of them is the observation, a
    deterministic site. The model works in plates, and in other processes if the function pickles.

    Parameters
    ----------
    prior
        A distribution of Pyro or torch, or several by name; all their dimensions belong to one
        draw.
    function
        From parameters, one array, or a dict of them if ``prior`` is one, to an observation, or
        several by name. Its random numbers come from ``random``, ``numpy.random`` or ``torch``,
        which :func:`simulate` seeds.
    name
        Name of the parameter site, unless ``prior`` is a dict.
    observed
        Name of the observed site, unless the function returns a dict.
    vectorized
        Whether the function takes and returns many draws, ``(N, *shape)``, rather than one.
    tensors
        Whether the function takes tensors rather than NumPy arrays.

    Raises
    ------
    TypeError
        If the prior is no distribution, or the function none.

    Examples
    --------
    >>> import numpy as np
    >>> def function(theta):
    ...     return np.random.normal(theta.sum(), 0.1, size=3)
    >>> simulator = BlackBox(dist.Normal(torch.zeros(2), 1.0), function)
    >>> simulator().shape
    torch.Size([3])
    """

    def __init__(
        self,
        prior: Any,
        function: Callable,
        *,
        name: str = "theta",
        observed: str = "x",
        vectorized: bool = False,
        tensors: bool = False,
    ) -> None:
        priors = prior if isinstance(prior, Mapping) else {name: prior}
        self.priors = {site: _whole(site, value) for site, value in priors.items()}
        if not callable(function):
            raise TypeError(f"function must be callable, got {type(function).__name__}")
        self.function = function
        self.observed = observed
        self.takes_dict = isinstance(prior, Mapping)
        self.tensors = tensors
        # A loop here would hide from the caller which draw the function raised at.
        self.works_in_plate = self.vectorized = vectorized

    def __call__(self) -> Any:
        """Sample the parameters and the observation; return the latter."""
        values = {site: pyro.sample(site, prior) for site, prior in self.priors.items()}
        rows, batch_shape = self._rows(values)
        return self._observe(self._apply(rows), batch_shape)

    def _rows(self, values: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], torch.Size]:
        """Return draws ``(N, *shape)`` by site, and how the plates around the model order them."""
        shapes = {
            site: value.shape[: value.dim() - self.priors[site].event_dim]
            for site, value in values.items()
        }
        batch_shape = torch.broadcast_shapes(*shapes.values())
        rows = {}
        for site, value in values.items():
            shape = self.priors[site].event_shape
            rows[site] = value.expand(batch_shape + shape).reshape(-1, *shape)
        return rows, batch_shape

    def _apply(self, rows: Mapping[str, Tensor]) -> Any:
        if self.vectorized:
            return _tensors(self.function(self._argument(rows)))
        one_by_one = [
            _tensors(self.function(self._argument(dict(zip(rows, row)))))
            for row in zip(*rows.values())
        ]
        if isinstance(one_by_one[0], dict):
            return {site: torch.stack([x[site] for x in one_by_one]) for site in one_by_one[0]}
        return torch.stack(one_by_one)

    def _argument(self, values: Mapping[str, Tensor]) -> Any:
        # Copies, as the function may write into them.
        copies = {name: value.clone() for name, value in values.items()}
        arrays = {n: v if self.tensors else v.numpy(force=True) for n, v in copies.items()}
        return arrays if self.takes_dict else next(iter(arrays.values()))

    def _observe(self, x: Any, batch_shape: torch.Size) -> Any:
        if isinstance(x, dict):
            return {site: self._site(site, value, batch_shape) for site, value in x.items()}
        return self._site(self.observed, x, batch_shape)

    def _site(self, site: str, x: Tensor, batch_shape: torch.Size) -> Tensor:
        if x.shape[:1] != (batch_shape.numel(),):
            raise ValueError(
                f"function must return {batch_shape.numel()} rows for as many draws, got shape "
                f"{tuple(x.shape)}"
            )
        return pyro.deterministic(site, x.reshape(batch_shape + x.shape[1:]), event_dim=x.dim() - 1)


def _whole(site: str, prior: Any) -> Any:
    """Return a prior as a distribution of Pyro without batch dimensions."""
    if not isinstance(prior, torch.distributions.Distribution):
        raise TypeError(
            f"prior of {site!r} must be a distribution of Pyro or torch, got {type(prior).__name__}"
        )
    if isinstance(prior, TorchDistributionMixin):
        return prior.to_event()
    return dist.Independent(prior, len(prior.batch_shape))


def _tensors(x: Any) -> Any:
    """Return what a function returned as tensors of the default precision."""
    if isinstance(x, Mapping):
        return {site: _tensors(value) for site, value in x.items()}
    value = torch.as_tensor(x)
    return value.to(torch.get_default_dtype()) if value.dtype == torch.float64 else value
