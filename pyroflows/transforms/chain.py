"""Several scalar bijections in a row."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
from torch import Tensor

from .scalar import ScalarBijection


class Chain(ScalarBijection):
    r"""Apply several scalar bijections in a row: :math:`y = g_L(\dots g_1(x))`.

    ``Chain(Spline(), Affine())`` bends and then moves: the spline shapes the middle, the affine map
    carries the whole line, tails included, where a spline alone cannot reach.

    Parameters
    ----------
    *bijections
        The bijections, the one that comes first in front.

    Raises
    ------
    ValueError
        If there are none, or some act on angles and others on ordinary numbers.

    Examples
    --------
    >>> from pyroflows.transforms import Affine, Shift
    >>> import torch
    >>> chain = Chain(Affine(), Shift())
    >>> chain.num_parameters, chain.forward(torch.zeros(1), torch.ones(3, 1))[0]
    (3, tensor([2.]))
    """

    def __init__(self, *bijections: ScalarBijection) -> None:
        if not bijections:
            raise ValueError("bijections must hold at least one scalar bijection, got none")
        if len({bijection.num_features for bijection in bijections}) > 1:
            raise ValueError(
                "bijections must all act on angles or all on ordinary numbers, got "
                f"{', '.join(map(repr, bijections))}"
            )
        self.bijections = bijections
        self.num_features = bijections[0].num_features
        self.domain = bijections[0].domain
        self.num_parameters = sum(bijection.num_parameters for bijection in bijections)

    def features(self, x: Tensor) -> Tensor:
        return self.bijections[0].features(x)

    def forward(self, x: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor]:
        log_derivatives = []
        for bijection, own in self._with_parameters(parameters):
            x, log_derivative = bijection.forward(x, own)
            log_derivatives.append(log_derivative)
        return x, functools.reduce(torch.add, log_derivatives)

    def inverse(self, y: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor]:
        log_derivatives = []
        for bijection, own in reversed(list(self._with_parameters(parameters))):
            y, log_derivative = bijection.inverse(y, own)
            log_derivatives.append(log_derivative)
        return y, functools.reduce(torch.add, log_derivatives)

    def _with_parameters(self, parameters: Tensor) -> Iterator[tuple[ScalarBijection, Tensor]]:
        sizes = [bijection.num_parameters for bijection in self.bijections]
        return zip(self.bijections, parameters.split(sizes), strict=True)

    def __repr__(self) -> str:
        return f"Chain({', '.join(map(repr, self.bijections))})"
