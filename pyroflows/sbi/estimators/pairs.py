"""Pairs of parameters and observations to learn from."""

from __future__ import annotations

import warnings
from collections.abc import Mapping

import torch
from torch import Tensor

from ..model.observations import ObservationSpace
from ..model.simulations import Simulations
from ..model.space import ParameterSpace

FEW_SIMULATIONS = 100


def pairs(
    simulations: Simulations, space: ParameterSpace, observations: ObservationSpace
) -> tuple[Tensor, Tensor]:
    """Return simulations as tensors to learn from: unconstrained parameters, observations.

    Both have the default dtype, that of the networks, whatever the simulator computes in.

    Raises
    ------
    TypeError
        If they are no simulations.
    ValueError
        If they do not fit the spaces, or a parameter does not vary.
    """
    if not isinstance(simulations, Simulations):
        raise TypeError(f"simulations must be Simulations, got {type(simulations).__name__}")
    _check_dims(simulations.parameters, space.shapes)
    _check_dims(simulations.observations, observations.shapes)
    x = observations.tensor(simulations.observations)
    z = space.unconstrain(simulations.parameters).to(x.dtype)
    if len(simulations) > 1:
        _check_varying(z, space)
    if 1 < len(simulations) < FEW_SIMULATIONS:
        warnings.warn(
            f"{len(simulations)} simulations are too few to validate on a part of them: the "
            "posterior may be far off; simulate more",
            stacklevel=3,
        )
    return z, x


def _check_dims(values: Mapping[str, Tensor], shapes: Mapping[str, torch.Size]) -> None:
    for name, shape in shapes.items():
        if name in values and values[name].dim() != 1 + len(shape):
            expected = ", ".join(["N", *map(str, shape)])
            raise ValueError(
                f"simulations of site {name!r} must have shape ({expected}), got "
                f"{tuple(values[name].shape)}"
            )


def _check_varying(z: Tensor, space: ParameterSpace) -> None:
    for name, part in zip(space.names, z.split(space.sizes, -1)):
        constant = (part.amin(0) == part.amax(0)).nonzero().flatten().tolist()
        if constant:
            where = f" in entries {constant}" if part.shape[1] > 1 else ""
            raise ValueError(
                f"parameter {name!r} is the same in all simulations{where}: there is nothing to "
                "learn about it"
            )
