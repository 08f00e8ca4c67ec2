"""The circular rational-quadratic spline, a scalar bijection of angles."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.distributions import constraints

from .scalar import ScalarBijection
from .spline import Spline


@dataclass(frozen=True)
class CircularSpline(ScalarBijection):
    r"""Map each angle by a rational-quadratic spline of the circle and a rotation.

    .. math:: y = g(x) + \varphi \pmod{2 \pi} ,

    where :math:`g` is a :class:`Spline` on :math:`[-\pi, \pi)` that ends with the slope with which
    it begins, so that it is smooth on the circle, and :math:`\varphi` moves the cut along: in a
    stack, and with the parameters of a network, no place is special. Inputs are wrapped into
    :math:`[-\pi, \pi)`, where all outputs lie. Networks read an angle as its cosine and sine, which
    makes the whole flow periodic.

    Use it in ``Coupling`` and ``Elementwise``, with a base distribution on
    :math:`[-\pi, \pi)^D`, for instance the uniform one.

    Parameters
    ----------
    bins
        Number of bins :math:`K`, at least 2. There are ``3 K + 1`` raw parameters per angle: the
        rotation, widths, heights and slopes.
    min_bin_size
        Smallest width and height of a bin, as a fraction of the circle.
    min_slope
        Smallest slope at a knot.

    Raises
    ------
    ValueError
        If ``bins`` is less than 2 or the bins do not fit in the circle.

    References
    ----------
    [1] D. J. Rezende, G. Papamakarios, S. Racanière, M. S. Albergo, G. Kanwar, P. E. Shanahan,
        K. Cranmer. Normalizing flows on tori and spheres.
        `arXiv:2002.02428 <https://arxiv.org/abs/2002.02428>`_, 2020.

    Examples
    --------
    >>> spline = CircularSpline(bins=4)
    >>> rotation = torch.zeros(13, 1)
    >>> rotation[0] = 1.0
    >>> spline.forward(torch.tensor([3.0]), rotation)[0]
    tensor([-2.2832])
    """

    bins: int = 8
    min_bin_size: float = 1e-2
    min_slope: float = 1e-2
    num_features = 2
    domain = constraints.interval(-math.pi, math.pi)
    _spline: Spline = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        spline = Spline(self.bins, math.pi, self.min_bin_size, self.min_slope)
        object.__setattr__(self, "_spline", spline)

    @property
    def num_parameters(self) -> int:
        return 3 * self.bins + 1

    def features(self, x: Tensor) -> Tensor:
        return torch.cat([x.cos(), x.sin()])

    def forward(self, x: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor]:
        rotation, *knots = self._split(parameters)
        y, log_slope = self._spline.forward_inside(wrap(x), *knots)
        return wrap(y + rotation), log_slope

    def inverse(self, y: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor]:
        rotation, *knots = self._split(parameters)
        x, log_slope = self._spline.inverse_inside(wrap(y - rotation), *knots)
        return wrap(x), log_slope

    def _split(self, parameters: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the rotation and the raw sizes of bins and slopes at knots, the first twice."""
        rotation, sizes, slopes = parameters.split([1, 2 * self.bins, self.bins])
        return rotation.squeeze(0), sizes, torch.cat([slopes, slopes[:1]])


def wrap(angle: Tensor) -> Tensor:
    r"""Return the equal angle in :math:`[-\pi, \pi)`; those that lie there stay exactly the same.

    Examples
    --------
    >>> wrap(torch.tensor([-3.0, 0.0, 4.0]))
    tensor([-3.0000,  0.0000, -2.2832])
    """
    turns = torch.floor((angle + math.pi) / (2 * math.pi))
    wrapped = torch.sub(angle, turns, alpha=2 * math.pi)
    # Rounding may leave it a hair outside.
    wrapped = torch.where(wrapped < math.pi, wrapped, wrapped - 2 * math.pi)
    return torch.where(wrapped < -math.pi, wrapped + 2 * math.pi, wrapped)
