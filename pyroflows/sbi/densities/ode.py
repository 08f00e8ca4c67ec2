"""Flows of velocity fields from one time to another, and integrals along them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

from ...transforms.continuous.solver import Solver

# Of the exponents 1 (even steps) to 2, those about 1.5 had the least error for their steps in draws
# of published tasks; densities gain nothing, so that their nodes stay where quadrature has them.
SLOWING = 1.5

# (time, points (*batch, D)) -> their velocities, or numbers for each, (*batch, K).
Field: TypeAlias = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Solve:
    r"""Carry points along a velocity field :math:`dw/dt = v(t, w)`.

    By default in a fixed number of steps, with the fourth-order method of Runge and Kutta: ``4
    num_steps`` evaluations. The steps get shorter towards time 1, where noise has nearly become
    data and the field turns fastest. With a tolerance, in the steps that the fifth-order method of
    Dormand and Prince [1] needs to keep the local error of the worst point below it.

    Parameters
    ----------
    num_steps
        Number of steps, without a tolerance.
    tolerance
        Relative and absolute tolerance, for the root mean square over the entries of a point.

    Raises
    ------
    ValueError
        If ``num_steps`` is below 1 or ``tolerance`` is not positive.

    References
    ----------
    [1] J. R. Dormand, P. J. Prince. A family of embedded Runge-Kutta formulae. Journal of
        Computational and Applied Mathematics 6(1), 1980.

    Examples
    --------
    >>> Solve(num_steps=5)(lambda time, w: -w, torch.ones(1), 0.0, 1.0)
    tensor([0.3679])
    """

    num_steps: int = 5
    tolerance: float | None = None

    def __post_init__(self) -> None:
        if self.num_steps < 1:
            raise ValueError(f"num_steps must be at least 1, got {self.num_steps}")
        if self.tolerance is not None and not self.tolerance > 0:
            raise ValueError(f"tolerance must be positive, got {self.tolerance}")

    def __call__(self, velocity: Field, w: Tensor, start: float, end: float) -> Tensor:
        """Return where points ``(*batch, D)`` at time ``start`` are at ``end``, both in [0, 1]."""
        if self.tolerance is not None:
            return self._adaptive(velocity, _nothing, w, start, end)[0]
        for time, after in pairwise(_times(self.num_steps, start, end)):
            w = _runge_kutta(velocity, w, time, after)
        return w

    def integrate(
        self, velocity: Field, rate: Field, w: Tensor, start: float, end: float
    ) -> tuple[Tensor, Tensor]:
        r"""Return where points end, and integrals :math:`\int r(t, w_t) dt` along their paths.

        Without a tolerance the integral is a quadrature of Gauss and Legendre with ``3 num_steps``
        nodes, and the steps go from node to node: a rate that is dearer than the velocity is
        evaluated no more often than it must.

        Parameters
        ----------
        velocity
            Maps a time and points ``(*batch, D)`` to their velocities.
        rate
            Maps a time and points to numbers ``(*batch, K)``.
        w
            The points at time ``start``.
        start, end
            When.

        Returns
        -------
        Tensor, Tensor
            The points at time ``end``, and integrals of shape ``(*batch, K)``.
        """
        if self.tolerance is not None:
            return self._adaptive(velocity, rate, w, start, end)
        total, time = w.new_zeros(()), start
        for node, weight in _gauss_legendre(3 * self.num_steps, start, end):
            w = _runge_kutta(velocity, w, time, node)
            total = total + weight * rate(w.new_tensor(node), w)
            time = node
        return _runge_kutta(velocity, w, time, end), total

    def _adaptive(
        self, velocity: Field, rate: Field, w: Tensor, start: float, end: float
    ) -> tuple[Tensor, Tensor]:
        shape = w.shape
        points = w.reshape(shape[:-1].numel(), shape[-1])
        num_rates = rate(w.new_tensor(start), w).shape[-1]

        def slopes(time: Tensor, points: Tensor) -> tuple[Tensor, ...]:
            w = points.reshape(shape)
            rates = rate(time, w).reshape(len(points), num_rates)
            return velocity(time, w).reshape(points.shape), *rates.unbind(-1)

        solver = Solver(rtol=self.tolerance, atol=self.tolerance)
        (points, *totals), _ = solver.solve(slopes, points, num_rates, (start, end), ())
        return points.reshape(shape), torch.stack(totals, -1).reshape(*shape[:-1], num_rates)


def _nothing(time: Tensor, w: Tensor) -> Tensor:
    return torch.zeros_like(w[..., :1])


def _runge_kutta(velocity: Field, w: Tensor, start: float, end: float) -> Tensor:
    step = end - start
    before, middle, after = w.new_tensor([start, start + step / 2, end])
    first = velocity(before, w)
    second = velocity(middle, w + step / 2 * first)
    third = velocity(middle, w + step / 2 * second)
    fourth = velocity(after, w + step * third)
    return w + step / 6 * (first + 2 * second + 2 * third + fourth)


def _times(num_steps: int, start: float, end: float) -> list[float]:
    """Return times from start to end, both between 0 and 1, denser towards 1."""
    first, last = (1 - (1 - time) ** (1 / SLOWING) for time in (start, end))
    times = 1 - (1 - np.linspace(first, last, num_steps + 1)) ** SLOWING
    return [start, *times[1:-1].tolist(), end]


def _gauss_legendre(size: int, start: float, end: float) -> Iterator[tuple[float, float]]:
    """Yield nodes, from ``start`` to ``end``, and their weights."""
    nodes, weights = np.polynomial.legendre.leggauss(size)
    half = (end - start) / 2
    yield from zip((start + half * (1 + nodes)).tolist(), (half * weights).tolist())
