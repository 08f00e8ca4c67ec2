"""Targets whose evidence and moments are known exactly, as Pyro models."""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from torch import Tensor

from tests.reference import Flat, reference_folder


@dataclass(frozen=True)
class Moment:
    """Hold the exact mean and standard deviation of a statistic of the draws.

    Both broadcast against the statistic, of shape ``(draws, *shape)``.
    """

    statistic: Callable[[Mapping[str, Tensor]], Tensor]
    mean: Tensor | float
    standard_deviation: Tensor | float


@dataclass(frozen=True)
class ExactTarget:
    """Hold a model whose evidence is known exactly.

    Attributes:
        name: Name of the target.
        model: Pyro model, called with ``args``.
        args: Data, in the default precision.
        log_evidence: Logarithm of the evidence.
        moments: Known moments of the target, by name.
    """

    name: str
    model: Callable[..., None]
    args: tuple[Any, ...]
    log_evidence: float
    moments: Mapping[str, Moment] = field(default_factory=dict)


def funnel(dimension: int = 10) -> ExactTarget:
    """Build Neal's funnel: one variable sets the scale of all others."""
    moments = {"v": Moment(lambda draws: draws["v"], 0.0, 3.0)}
    return ExactTarget("funnel", _funnel, (dimension - 1,), 0.0, moments)


def _funnel(width: int) -> None:
    v = pyro.sample("v", dist.Normal(0.0, 3.0))
    scale = (v / 2).exp().unsqueeze(-1).expand(*v.shape, width)
    pyro.sample("x", dist.Normal(0.0, scale).to_event(1))


def banana() -> ExactTarget:
    """Build a Gaussian in two dimensions bent along a parabola."""
    moments = {
        "x1": Moment(lambda draws: draws["x1"], 0.0, 10.0),
        "x2": Moment(lambda draws: draws["x2"], 0.0, math.sqrt(19.0)),
    }
    return ExactTarget("banana", _banana, (), 0.0, moments)


def _banana() -> None:
    x1 = pyro.sample("x1", dist.Normal(0.0, 10.0))
    pyro.sample("x2", dist.Normal(0.03 * (x1.square() - 100), 1.0))


def ill_conditioned_gaussian(dimension: int = 20) -> ExactTarget:
    """Build a randomly rotated Gaussian, without its normaliser, of condition number 1e6."""
    scales = np.sqrt(np.logspace(-3, 3, dimension))
    noise = np.random.default_rng(0).standard_normal((dimension, dimension))
    rotation, _ = np.linalg.qr(noise)
    dtype = torch.get_default_dtype()
    args = torch.tensor(rotation, dtype=dtype), torch.tensor(scales, dtype=dtype)
    log_evidence = dimension / 2 * math.log(2 * math.pi) + float(np.log(scales).sum())
    deviations = torch.tensor(np.linalg.norm(rotation * scales, axis=-1))
    moments = {"z": Moment(lambda draws: draws["z"], 0.0, deviations)}
    return ExactTarget("ill_conditioned_gaussian", _gaussian, args, log_evidence, moments)


def _gaussian(rotation: Tensor, scales: Tensor) -> None:
    z = pyro.sample("z", Flat(constraints.real_vector, (), scales.shape))
    pyro.factor("energy", -0.5 * (z @ rotation / scales).square().sum(-1))


def many_well(wells: int = 16) -> ExactTarget:
    """Build a product of double wells, each with a Gaussian beside it: 2 ** wells modes."""
    right = 0.84431
    moments = {
        "right": Moment(
            lambda draws: (draws["x"] > 0).to(draws["x"]), right, math.sqrt(right * (1 - right))
        )
    }
    return ExactTarget("many_well", _many_well, (wells,), 164.69568 / 16 * wells, moments)


def _many_well(wells: int) -> None:
    x = pyro.sample("x", Flat(constraints.real_vector, (), (wells,)))
    y = pyro.sample("y", Flat(constraints.real_vector, (), (wells,)))
    energy = x**4 - 6 * x.square() - 0.5 * x + 0.5 * y.square()
    pyro.factor("energy", -energy.sum(-1))


def brownian_motion() -> ExactTarget:
    """Build a Brownian motion observed with noise, its middle third missing."""
    text = (reference_folder() / "brownian.json").read_text()
    locations = json.loads(text)["observed_locations"]
    observed = torch.tensor([location is not None for location in locations])
    y = torch.tensor([location or 0.0 for location in locations])
    moments = {
        "log_innovation": Moment(lambda draws: draws["innovation"].log(), -2.2152, 0.3360),
        "log_observation": Moment(lambda draws: draws["observation"].log(), -2.2625, 0.4675),
    }
    return ExactTarget("brownian_motion", _brownian_motion, (y, observed), 1.18775, moments)


def _brownian_motion(y: Tensor, observed: Tensor) -> None:
    innovation = pyro.sample("innovation", dist.LogNormal(0.0, 2.0))
    observation = pyro.sample("observation", dist.LogNormal(0.0, 2.0))
    steps = torch.ones(len(y), len(y)).tril()
    factor = innovation[..., None, None] * steps
    x = pyro.sample("x", dist.MultivariateNormal(torch.zeros(len(y)), scale_tril=factor))
    noisy = dist.Normal(x, observation.unsqueeze(-1)).mask(observed).to_event(1)
    pyro.sample("y", noisy, obs=y)
