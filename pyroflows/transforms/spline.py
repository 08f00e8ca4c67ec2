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
    def num_parameters(self) -> int:
        return 3 * self.bins - 1

    def forward(self, x: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor]:
        inside, x_inside = self._split(x)
        y, log_slope = self.forward_inside(x_inside, *self._knots(parameters))
        return torch.where(inside, y, x), torch.where(inside, log_slope, 0.0)

    def inverse(self, y: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor]:
        inside, y_inside = self._split(y)
        x, log_slope = self.inverse_inside(y_inside, *self._knots(parameters))
        return torch.where(inside, x, y), torch.where(inside, log_slope, 0.0)

    def forward_inside(
        self, x: Tensor, raw_sizes: Tensor, raw_slopes: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Map numbers of the box, given ``2 K`` raw sizes of bins and ``K + 1`` raw slopes."""
        bin = self._find_bin(x, raw_sizes, raw_slopes, search=0)
        return bin.evaluate((x - bin.x) / bin.width)

    def inverse_inside(
        self, y: Tensor, raw_sizes: Tensor, raw_slopes: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Undo :meth:`forward_inside`."""
        bin = self._find_bin(y, raw_sizes, raw_slopes, search=1)
        xi = bin.solve(y)
        _, log_slope = bin.evaluate(xi)
        return torch.addcmul(bin.x, xi, bin.width), -log_slope

    def _knots(self, parameters: Tensor) -> tuple[Tensor, Tensor]:
        """Return the raw sizes of the bins and the raw slopes at all knots, 0 at the outer ones."""
        raw_sizes, raw_slopes = parameters.split([2 * self.bins, self.bins - 1])
        end = torch.zeros_like(raw_slopes[:1])
        return raw_sizes, torch.cat([end, raw_slopes, end])

    def _split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        # Numbers outside the box are moved into it before the spline's arithmetic: their branch
        # is discarded by `where`, but would still send NaN gradients back through it.
        return x.abs() < self.bound, x.clamp(-self.bound, self.bound)

    def _find_bin(self, value: Tensor, raw_sizes: Tensor, raw_slopes: Tensor, search: int) -> _Bin:
        """Select the bin in which each value lies, along x (``search=0``) or y (``search=1``)."""
        # Only the search needs all knots, and no gradients. The bin's own are computed from what
        # lies before it; `split` and `unbind` because gradients of indices fill whole tensors.
        K = self.bins
        sizes = self._sizes(raw_sizes.unflatten(0, (2, K)))
        passed = value >= sizes.detach()[search, :-1].cumsum(0) - self.bound
        index = passed.sum(0, keepdim=True)
        before, _ = sizes.split([K - 1, 1], dim=1)
        x, y = (torch.where(passed, before, 0.0).sum(1) - self.bound).unbind(0)
        width, height = sizes.gather(1, index.expand(2, *index.shape)).squeeze(1).unbind(0)
        slopes = raw_slopes.gather(0, torch.cat([index, index + 1]))
        return _Bin(x, width, y, height, *self._slopes(slopes).unbind(0))

    def _sizes(self, raw: Tensor) -> Tensor:
        """Return the widths and the heights of all bins."""
        smallest = 2 * self.bound * self.min_bin_size
        scale = 2 * self.bound - smallest * self.bins
        return raw.softmax(1) * scale + smallest

    def _slopes(self, raw: Tensor) -> Tensor:
        # The offset makes a raw value of zero a slope of one.
        offset = math.log(math.expm1(1 - self.min_slope))
        return F.softplus(raw + offset) + self.min_slope


class _Bin:
    """One piece of a rational-quadratic spline per number."""

    def __init__(
        self,
        x: Tensor,
        width: Tensor,
        y: Tensor,
        height: Tensor,
        left_slope: Tensor,
        right_slope: Tensor,
    ) -> None:
        self.x, self.width, self.y, self.height = x, width, y, height
        self.left_slope, self.right_slope = left_slope, right_slope
        self.slope = height / width
        self.excess = torch.sub(left_slope + right_slope, self.slope, alpha=2)

    def evaluate(self, xi: Tensor) -> tuple[Tensor, Tensor]:
        """Return the spline's value and log-slope at relative position ``xi`` in [0, 1]."""
        one_minus_xi = 1 - xi
        bend = self.excess * (xi * one_minus_xi)
        denominator = self.slope + bend
        rise = xi * torch.addcmul(self.slope * xi, self.left_slope, one_minus_xi)
        y = torch.addcdiv(self.y, self.height * rise, denominator)
        numerator = torch.lerp(self.left_slope, self.right_slope, xi) - bend
        return y, (numerator * (self.slope / denominator).square()).log()

    def solve(self, y: Tensor) -> Tensor:
        """Return the relative position at which the spline takes the value ``y``."""
        rise = y - self.y
        lift = rise * self.excess
        a = torch.addcmul(lift, self.height, self.slope - self.left_slope)
        b = torch.addcmul(lift, self.height, self.left_slope, value=-1)  # with the sign turned
        c = self.slope * rise
        # This form of the root has no cancellation; the discriminant is >= 0 but for rounding.
        discriminant = torch.addcmul(b.square(), a, c, value=4).clamp(min=0)
        return 2 * c / (discriminant.sqrt() - b)
