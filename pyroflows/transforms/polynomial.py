"""The sum-of-squares polynomial, a scalar bijection."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .autoregressive import Autoregressive
from .scalar import ScalarBijection
from .solve import solve_increasing, with_implicit_gradient

MAX_DEGREE = 10


@dataclass(frozen=True)
class SumOfSquares(ScalarBijection):
    r"""Map each number by the integral of a sum of squared polynomials.

    .. math:: y = s + \lambda x + (1 - \lambda) \int_0^x \textstyle\sum_{k=1}^K p_k(u / B)^2 \, du ,
        \qquad p_k(t) = c_k + \textstyle\sum_{l=0}^R a_{kl} t^l ,

    on :math:`[-B, B]`; outside, the map goes on straight. Constants :math:`c_k` whose squares add
    up to 1 make zero parameters the identity. With :math:`p(t) = \sum_l z_l / t_0^l\, t^l`, the
    mean of a square from 0 to :math:`t_0` is a quadratic form of :math:`z` whose matrix is
    Hilbert's, :math:`1 / (l + m + 1)`: with its triangular factor it is a sum of squares again. The
    inverse solves an increasing equation. Costs ``O(K R^2)`` in the forward direction, times the
    number of iterations, some ten, in the inverse one.

    Parameters
    ----------
    degree
        Degree :math:`R` of the polynomials, at most 10: beyond, Hilbert's matrix is singular to
        working precision.
    num_squares
        Number of squares :math:`K`. There are ``K (R + 1) + 1`` raw parameters per number.
    bound
        Half-width :math:`B` of the interval.
    min_slope
        The smallest slope :math:`\lambda` of the map: it bounds the slope of the inverse.

    Raises
    ------
    ValueError
        If ``degree`` does not lie in 1 .. 10, ``num_squares`` is less than 1, ``bound`` is not
        positive, or ``min_slope`` is not between 0 and 1.
    ConvergenceError
        From the inverse, if inputs or parameters are not finite.

    References
    ----------
    [1] P. Jaini, K. A. Selby, Y. Yu. Sum-of-squares polynomial flow.
        `arXiv:1905.02325 <https://arxiv.org/abs/1905.02325>`_, 2019.

    Examples
    --------
    >>> bijection = SumOfSquares(degree=2, num_squares=2)
    >>> y, log_derivative = bijection.forward(torch.tensor([0.5]), torch.zeros(7, 1))
    >>> y
    tensor([0.5000])
    """

    degree: int = 4
    num_squares: int = 3
    bound: float = 5.0
    min_slope: float = 1e-2

    def __post_init__(self) -> None:
        if not 1 <= self.degree <= MAX_DEGREE:
            raise ValueError(f"degree must lie in 1 .. {MAX_DEGREE}, got {self.degree}")
        if self.num_squares < 1:
            raise ValueError(f"num_squares must be at least 1, got {self.num_squares}")
        if not self.bound > 0:
            raise ValueError(f"bound must be positive, got {self.bound}")
        if not 0 < self.min_slope < 1:
            raise ValueError(f"min_slope must lie in (0, 1), got {self.min_slope}")

    @property
    def num_parameters(self) -> int:
        return self.num_squares * (self.degree + 1) + 1

    def forward(self, x: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor]:
        y, slope = self._evaluate(x, *self._polynomials(parameters))
        return y, slope.log()

    def inverse(self, y: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor]:
        shift, *polynomials = self._polynomials(parameters)
        reach = (y - shift).abs() / self.min_slope
        x = solve_increasing(lambda x: self._evaluate(x, shift, *polynomials), y, -reach, reach)
        x = with_implicit_gradient(x, *self._evaluate(x, shift, *polynomials), y)
        return x, -self._evaluate(x, shift, *polynomials)[1].log()

    def _polynomials(self, parameters: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the shift, coefficients of shape ``(R + 1, K, *S)``, and Hilbert's factor."""
        shift, raw = parameters.split([1, self.num_parameters - 1])
        constant, *others = raw.unflatten(0, (self.degree + 1, self.num_squares)).unbind(0)
        # Unequal, or all polynomials would receive the same gradients and remain equal for ever.
        squares = torch.arange(1, self.num_squares + 1).to(raw) / math.comb(self.num_squares + 1, 2)
        squares = squares.reshape(-1, *(1 for _ in constant.shape[1:]))
        a = torch.stack([constant + squares.sqrt(), *others])
        return shift.squeeze(0), a, _hilbert_factor(self.degree + 1).to(a)

    def _evaluate(
        self, x: Tensor, shift: Tensor, a: Tensor, factor: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return the value and the slope of the map."""
        inside = x.clamp(-self.bound, self.bound)
        t = inside / self.bound
        powers = [torch.ones_like(t)]
        for _ in range(self.degree):
            powers.append(powers[-1] * t)
        z = a * torch.stack(powers).unsqueeze(1)
        mean = torch.tensordot(factor, z, dims=1).square().sum((0, 1))
        slope = z.sum(0).square().sum(0)
        mean, slope = (torch.lerp(s, torch.ones_like(s), self.min_slope) for s in (mean, slope))
        return shift + inside * mean + (x - inside) * slope, slope


def _hilbert_factor(size: int) -> Tensor:
    r"""Return the upper triangular :math:`U` of :math:`U^\top U = (1 / (l + m + 1))_{lm}`."""
    index = torch.arange(size, dtype=torch.float64, device="cpu")
    return torch.linalg.cholesky(1 / (index.unsqueeze(-1) + index + 1)).T


def polynomial(
    input_dim: int, hidden_dims: Sequence[int] | None = None, **options: Any
) -> Autoregressive:
    """Build a sum-of-squares polynomial autoregressive flow, with Pyro's signature.

    Examples
    --------
    >>> polynomial(10)(torch.zeros(10)).shape
    torch.Size([10])
    """
    return conditional_polynomial(input_dim, 0, hidden_dims, **options)


def conditional_polynomial(
    input_dim: int, context_dim: int, hidden_dims: Sequence[int] | None = None, **options: Any
) -> Autoregressive:
    """Build a sum-of-squares polynomial autoregressive flow with a context.

    Examples
    --------
    >>> conditional_polynomial(10, 3).condition(torch.ones(3))(torch.zeros(10)).shape
    torch.Size([10])
    """
    hidden_dims = (input_dim * 10,) if hidden_dims is None else hidden_dims
    return Autoregressive(SumOfSquares(), input_dim, context_dim, hidden_dims, **options)
