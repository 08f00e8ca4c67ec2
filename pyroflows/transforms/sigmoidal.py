"""The deep sigmoidal flow, a scalar bijection that is a small monotone network."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .autoregressive import Autoregressive
from .scalar import ScalarBijection, soft_bound
from .solve import solve_increasing, with_implicit_gradient


@dataclass(frozen=True)
class DeepSigmoidal(ScalarBijection):
    r"""Map each number by a mixture of sigmoids, seen through a logit.

    .. math:: y = \lambda x + (1 - \lambda) \operatorname{logit}
        \Bigl( \textstyle\sum_{j=1}^H w_j\, \sigma(a_j x + b_j) \Bigr) , \qquad
        \lambda \le y' < 2 \max_j a_j ,

    with weights :math:`w_j > 0` of sum 1 and slopes :math:`e^{-c} < a_j < e^c`. Logarithms of
    :math:`\sigma` and of :math:`1 - \sigma` keep it exact far in the tails, where it becomes
    linear. The inverse solves an increasing equation between the zeros of the linear maps
    :math:`\lambda x + (1 - \lambda) (a_j x + b_j) - y`. Costs ``O(H)`` in the forward direction,
    times the number of iterations, some ten, in the inverse one.

    Parameters
    ----------
    hidden_units
        Number of sigmoids :math:`H`. There are ``3 H`` raw parameters per number.
    log_slope_bound
        The bound :math:`c` on the logarithms of the slopes :math:`a_j`.
    min_slope
        The smallest slope :math:`\lambda` of the map: it bounds the slope of the inverse.

    Raises
    ------
    ValueError
        If ``hidden_units`` is less than 1, ``log_slope_bound`` is not positive, or ``min_slope``
        is not between 0 and 1.
    ConvergenceError
        From the inverse, if inputs or parameters are not finite.

    References
    ----------
    [1] C.-W. Huang, D. Krueger, A. Lacoste, A. Courville. Neural autoregressive flows.
        `arXiv:1804.00779 <https://arxiv.org/abs/1804.00779>`_, 2018.

    Examples
    --------
    >>> bijection = DeepSigmoidal(hidden_units=4)
    >>> y, log_derivative = bijection.forward(torch.tensor([0.5]), torch.zeros(12, 1))
    >>> y
    tensor([0.5000])
    """

    hidden_units: int = 8
    log_slope_bound: float = 3.0
    min_slope: float = 1e-2

    def __post_init__(self) -> None:
        if self.hidden_units < 1:
            raise ValueError(f"hidden_units must be at least 1, got {self.hidden_units}")
        if not self.log_slope_bound > 0:
            raise ValueError(f"log_slope_bound must be positive, got {self.log_slope_bound}")
        if not 0 < self.min_slope < 1:
            raise ValueError(f"min_slope must lie in (0, 1), got {self.min_slope}")

    @property
    def num_parameters(self) -> int:
        return 3 * self.hidden_units

    def forward(self, x: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor]:
        y, slope = self._evaluate(x, *self._units(parameters))
        return y, slope.log()

    def inverse(self, y: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor]:
        a, b, log_w = self._units(parameters)
        # The map lies between the least and the greatest of what each unit alone would make.
        lines = (y - (1 - self.min_slope) * b) / (self.min_slope + (1 - self.min_slope) * a)
        x = solve_increasing(
            lambda x: self._evaluate(x, a, b, log_w), y, lines.amin(0), lines.amax(0)
        )
        x = with_implicit_gradient(x, *self._evaluate(x, a, b, log_w), y)
        return x, -self._evaluate(x, a, b, log_w)[1].log()

    def _units(self, parameters: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        r"""Return :math:`a`, :math:`b` and :math:`\log w`, each of shape ``(H, *S)``."""
        raw_slopes, biases, raw_weights = parameters.chunk(3)
        a = soft_bound(raw_slopes, self.log_slope_bound).exp()
        # Each unit turns about a pivot of its own. Were it the same for all, they would receive
        # the same gradients where all parameters are zero, and remain equal for ever.
        pivots = torch.linspace(-3, 3, self.hidden_units, dtype=a.dtype, device=a.device)
        pivots = pivots.reshape(-1, *(1 for _ in a.shape[1:]))
        return a, torch.addcmul(biases, a - 1, pivots), raw_weights.log_softmax(0)

    def _evaluate(self, x: Tensor, a: Tensor, b: Tensor, log_w: Tensor) -> tuple[Tensor, Tensor]:
        """Return the value and the slope of the map."""
        preactivation = torch.addcmul(b, a, x)
        log_on = F.logsigmoid(preactivation)
        log_off = log_on - preactivation
        log_w_on = log_w + log_on
        log_sum_on, log_sum_off = log_w_on.logsumexp(0), (log_w + log_off).logsumexp(0)
        # The derivative of the logit, 1 / (p (1 - p)), is the sum of 1 / p and 1 / (1 - p).
        log_share = log_w_on + log_off - (log_sum_on + log_sum_off)
        slope = (a * log_share.exp()).sum(0)
        y = torch.lerp(log_sum_on - log_sum_off, x, self.min_slope)
        return y, torch.lerp(slope, torch.ones_like(slope), self.min_slope)


def neural_autoregressive(
    input_dim: int,
    hidden_dims: Sequence[int] | None = None,
    activation: str = "sigmoid",
    width: int = 16,
    **options: Any,
) -> Autoregressive:
    """Build a neural autoregressive flow of deep sigmoidal maps, with Pyro's signature.

    Examples
    --------
    >>> neural_autoregressive(10)(torch.zeros(10)).shape
    torch.Size([10])
    """
    return conditional_neural_autoregressive(
        input_dim, 0, hidden_dims, activation, width, **options
    )


def conditional_neural_autoregressive(
    input_dim: int,
    context_dim: int,
    hidden_dims: Sequence[int] | None = None,
    activation: str = "sigmoid",
    width: int = 16,
    **options: Any,
) -> Autoregressive:
    """Build a neural autoregressive flow with a context, with Pyro's signature.

    ``activation`` is that of the monotone networks; only ``"sigmoid"`` gives a map onto all
    numbers.

    Examples
    --------
    >>> conditional_neural_autoregressive(10, 3).condition(torch.ones(3))(torch.zeros(10)).shape
    torch.Size([10])
    """
    if activation != "sigmoid":
        raise ValueError(f"activation must be 'sigmoid', got {activation!r}")
    hidden_dims = (3 * input_dim + 1,) if hidden_dims is None else hidden_dims
    return Autoregressive(DeepSigmoidal(width), input_dim, context_dim, hidden_dims, **options)
