"""The logit of numbers between 0 and 1, such as the brightness of pixels."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch.nn.functional as F
from torch import Tensor
from torch.distributions import constraints

from ..base import FlowTransform


class Logit(FlowTransform):
    r"""Map the unit interval onto the real line: :math:`y = \mathrm{logit}(a + (1 - 2 a) x)`.

    .. math:: \log|\det J| = \textstyle\sum_d \log \frac{1 - 2 a}{p_d (1 - p_d)} ,
        \qquad p = a + (1 - 2 a) x .

    Densities of images are learned on the side of the logits, where nothing has an edge [1]. With
    :math:`a > 0` the ends 0 and 1 have finite logits, and the inverse gives numbers slightly
    beyond them: from :math:`-a / (1 - 2 a)` to :math:`1 + a / (1 - 2 a)`.

    Parameters
    ----------
    event_shape
        Shape of one event; an integer ``D`` stands for ``(D,)``.
    margin
        The number :math:`a`, in [0, 0.5).

    Raises
    ------
    ValueError
        If ``margin`` is out of range.

    References
    ----------
    [1] L. Dinh, J. Sohl-Dickstein, S. Bengio. Density estimation using Real NVP.
        `arXiv:1605.08803 <https://arxiv.org/abs/1605.08803>`_, 2016.

    Examples
    --------
    >>> import torch
    >>> flow = Logit(3, margin=0.05)
    >>> flow(torch.tensor([0.0, 0.5, 1.0]))
    tensor([-2.9444,  0.0000,  2.9444])
    """

    def __init__(self, event_shape: int | Iterable[int], margin: float = 0.05) -> None:
        super().__init__(event_shape)
        if not 0 <= margin < 0.5:
            raise ValueError(f"margin must lie in [0, 0.5), got {margin}")
        self.margin = margin
        excess = margin / (1 - 2 * margin)
        self.bounds = (-excess, 1 + excess)

    @property
    def domain(self) -> constraints.Constraint:
        return constraints.independent(constraints.interval(*self.bounds), len(self.event_shape))

    @property
    def codomain(self) -> constraints.Constraint:
        return constraints.independent(constraints.real, len(self.event_shape))

    def forward_and_log_det(self, x: Tensor) -> tuple[Tensor, Tensor]:
        p = self.margin + (1 - 2 * self.margin) * x
        log_p, log_q = p.log(), (-p).log1p()
        return log_p - log_q, self._sum(-log_p - log_q, 1)

    def inverse_and_log_det(self, y: Tensor) -> tuple[Tensor, Tensor]:
        x = (y.sigmoid() - self.margin) / (1 - 2 * self.margin)
        x = x.clamp(*self.bounds)  # which rounding may overstep
        return x, self._sum(F.logsigmoid(y) + F.logsigmoid(-y), -1)

    def _sum(self, log_slope: Tensor, sign: int) -> Tensor:
        log_slope = log_slope + sign * math.log(1 - 2 * self.margin)
        return log_slope.flatten(-len(self.event_shape)).sum(-1)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, margin={self.margin}"
