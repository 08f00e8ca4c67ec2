"""The monotone rational-quadratic spline, a scalar bijection."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .scalar import ScalarBijection


@dataclass(frozen=True)
class Spline(ScalarBijection):
    r"""Map each number by a monotone rational-quadratic spline with identity tails.

    On the box :math:`[-B, B]` the map runs through ``bins + 1`` knots :math:`(x_k, y_k)` with
    slopes :math:`\delta_k`, the outer knots pinned to the corners of the box with slope 1; outside
    it is the identity. With :math:`\xi = (x - x_k)/(x_{k+1} - x_k)` and
    :math:`s = (y_{k+1} - y_k)/(x_{k+1} - x_k)`,

    .. math:: y = y_k + (y_{k+1} - y_k)
        \frac{s \xi^2 + \delta_k \xi (1 - \xi)}
             {s + (\delta_{k+1} + \delta_k - 2 s)\, \xi (1 - \xi)} .

    Parameters
    ----------
    bins
        Number of bins :math:`K`, at least 2. There are ``3 K - 1`` raw parameters per number.
    bound
        Half-width :math:`B` of the box.
    min_bin_size
        Smallest width and height of a bin, as a fraction of the box.
    min_slope
        Smallest slope at a knot.

    Raises
    ------
    ValueError
        If ``bins`` is less than 2, ``bound`` is not positive, or the bins do not fit in the box.

    References
    ----------
    [1] C. Durkan, A. Bekasov, I. Murray, G. Papamakarios. Neural spline flows.
        `arXiv:1906.04032 <https://arxiv.org/abs/1906.04032>`_, 2019.

    Examples
    --------
    >>> spline = Spline(bins=4)
    >>> y, log_derivative = spline.forward(torch.tensor([0.5]), torch.zeros(11, 1))
    >>> y
    tensor([0.5000])
    """

    bins: int = 8
    bound: float = 5.0
    min_bin_size: float = 1e-2
    min_slope: float = 1e-2

    def __post_init__(self) -> None:
        if self.bins < 2:
            raise ValueError(f"bins must be at least 2, got {self.bins}")
        if not self.bound > 0:
            raise ValueError(f"bound must be positive, got {self.bound}")
        if not 0 < self.min_bin_size * self.bins < 1:
            raise ValueError(
                f"min_bin_size must lie in (0, 1 / bins), got {self.min_bin_size} "
                f"with {self.bins} bins"
            )
        if not 0 < self.min_slope < 1:
            raise ValueError(f"min_slope must lie in (0, 1), got {self.min_slope}")

    @property
    def num_parameters(self) -> int:  # type: ignore[override]
        return 3 * self.bins - 1

    def forward(self, x: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor]:
        inside, x_inside = self._split(x)
        bin = self._find_bin(x_inside, parameters, search=0)
        xi = (x_inside - bin.x) / bin.width
        y, log_slope = bin.evaluate(xi)
        return torch.where(inside, y, x), torch.where(inside, log_slope, 0.0)

    def inverse(self, y: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor]:
        inside, y_inside = self._split(y)
        bin = self._find_bin(y_inside, parameters, search=1)
        xi = bin.solve(y_inside)
        x = torch.addcmul(bin.x, xi, bin.width)
        _, log_slope = bin.evaluate(xi)
        return torch.where(inside, x, y), torch.where(inside, -log_slope, 0.0)

    def _split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        # Numbers outside the box are moved into it before the spline's arithmetic: their branch
        # is discarded by `where`, but would still send NaN gradients back through it.
        return x.abs() < self.bound, x.clamp(-self.bound, self.bound)

    def _find_bin(self, value: Tensor, parameters: Tensor, search: int) -> _Bin:
        """Select the bin in which each value lies, along x (``search=0``) or y (``search=1``)."""
        K = self.bins
        corners = torch.stack([self._knots(parameters[:K]), self._knots(parameters[K : 2 * K])])
        index = (value >= corners[search, 1:-1]).sum(0)
        index = torch.stack([index, index + 1])
        corners = corners.gather(1, index.expand(2, *index.shape))
        raw_slopes = F.pad(parameters[2 * K :], (0, 0) * value.dim() + (1, 1))
        slopes = self._slopes(raw_slopes.gather(0, index))
        (x_left, x_right), (y_left, y_right) = corners.unbind(0)
        return _Bin(x_left, x_right - x_left, y_left, y_right - y_left, slopes[0], slopes[1])

    def _knots(self, raw: Tensor) -> Tensor:
        size = torch.softmax(raw, 0)
        size = 2 * self.bound * (self.min_bin_size + (1 - self.min_bin_size * self.bins) * size)
        inner = size[:-1].cumsum(0) - self.bound
        end = torch.full_like(inner[:1], self.bound)
        return torch.cat([-end, inner, end])

    def _slopes(self, raw: Tensor) -> Tensor:
        # The offset makes a raw value of zero a slope of one.
        offset = math.log(math.expm1(1 - self.min_slope))
        return F.softplus(raw + offset) + self.min_slope


@dataclass(frozen=True)
class _Bin:
    """One piece of a rational-quadratic spline per number."""

    x: Tensor
    width: Tensor
    y: Tensor
    height: Tensor
    left_slope: Tensor
    right_slope: Tensor

    def evaluate(self, xi: Tensor) -> tuple[Tensor, Tensor]:
        """Return the spline's value and log-slope at relative position ``xi`` in [0, 1]."""
        slope = self.height / self.width
        excess = self.left_slope + self.right_slope - 2 * slope
        one_minus_xi = 1 - xi
        mixed = xi * one_minus_xi
        denominator = slope + excess * mixed
        rise = xi * (slope * xi + self.left_slope * one_minus_xi)
        y = self.y + self.height * rise / denominator
        numerator = (
            self.right_slope * xi.square()
            + 2 * slope * mixed
            + self.left_slope * one_minus_xi.square()
        )
        return y, (numerator * (slope / denominator).square()).log()

    def solve(self, y: Tensor) -> Tensor:
        """Return the relative position at which the spline takes the value ``y``."""
        slope = self.height / self.width
        rise = y - self.y
        excess = rise * (self.left_slope + self.right_slope - 2 * slope)
        a = self.height * (slope - self.left_slope) + excess
        b = self.height * self.left_slope - excess
        c = -slope * rise
        # This form of the root has no cancellation; the discriminant is >= 0 but for rounding.
        discriminant = (b.square() - 4 * a * c).clamp(min=0)
        return 2 * c / (-b - discriminant.sqrt())
