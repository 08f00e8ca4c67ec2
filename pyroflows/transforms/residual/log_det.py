r"""Log-determinants of residual maps, :math:`\log\det(I + J)` with :math:`\|J\| < 1`."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from ...nn.lipschitz import Linearization

_EXACT_TRAINING_DIM = 16  # above, estimates take a fraction of the time for batches of hundreds


class LogDet(Protocol):
    r"""Compute or estimate :math:`\log\det(I + J)` of a batch, shape ``(*batch,)``."""

    def __call__(self, derivative: Linearization, training: bool) -> Tensor: ...


@dataclass(frozen=True)
class ExactLogDet:
    """Compute the determinant itself.

    Costs ``O(H^2 D + D^3)`` per input, with ``H`` the size of the hidden layers.

    Examples
    --------
    >>> from pyroflows.transforms import Residual
    >>> flow = Residual(3, log_det=ExactLogDet())
    >>> flow.forward_and_log_det(torch.randn(5, 3))[1].shape
    torch.Size([5])
    """

    def __call__(self, derivative: Linearization, training: bool) -> Tensor:
        jacobian = derivative.jacobian()
        return torch.linalg.slogdet(jacobian + _identity(jacobian)).logabsdet


@dataclass(frozen=True)
class PowerSeriesLogDet:
    r"""Truncate the series of the logarithm, as i-ResNets do [1].

    .. math:: \log\det(I + J) \approx
        \textstyle\sum_{k=1}^n \frac{(-1)^{k+1}}{k} \operatorname{tr} J^k

    With the exact trace the error is at most :math:`D c^{n+1} / ((n + 1)(1 - c))` for
    :math:`\|J\| \le c`, and costs ``O(n H^2 D)``. Hutchinson's estimate of the trace,
    :math:`v^\top J^k v` for random signs :math:`v`, costs ``O(n H^2)`` per probe; the probes are
    the same for all inputs and all calls, so that the answer remains a smooth function of both
    inputs and parameters.

    Parameters
    ----------
    num_terms
        Number of terms ``n``.
    num_probes
        Number of probes of Hutchinson's estimate. Default: the exact trace.

    References
    ----------
    [1] J. Behrmann, W. Grathwohl, R. T. Q. Chen, D. Duvenaud, J.-H. Jacobsen. Invertible residual
        networks. `arXiv:1811.00995 <https://arxiv.org/abs/1811.00995>`_, 2018.

    Examples
    --------
    >>> from pyroflows.transforms import Residual
    >>> flow = Residual(3, log_det=PowerSeriesLogDet(num_terms=50))
    >>> flow.forward_and_log_det(torch.randn(5, 3))[1].shape
    torch.Size([5])
    """

    num_terms: int = 20
    num_probes: int | None = None

    def __post_init__(self) -> None:
        for name in ("num_terms", "num_probes"):
            _check_count(name, getattr(self, name))

    def __call__(self, derivative: Linearization, training: bool) -> Tensor:
        probes = _identity(derivative.weights[-1])
        if self.num_probes is not None:
            probes = _frozen_signs(self.num_probes, probes) / self.num_probes**0.5
        rows, traces = probes, []
        for k in range(1, self.num_terms + 1):
            rows = derivative.vjp(rows)
            traces.append((-1) ** (k + 1) / k * (rows * probes).sum((-2, -1)))
        return torch.stack(traces).sum(0)


@dataclass(frozen=True)
class RussianRouletteLogDet:
    r"""Estimate without bias, by a series cut at a random length [1].

    .. math:: \log\det(I + J) = \mathbb{E}_{n, v}
        \textstyle\sum_{k=1}^n \frac{(-1)^{k+1}}{k} \frac{v^\top J^k v}{P(N \ge k)}

    with one random length ``n`` for the batch, and one random ``v`` for each input. After
    :math:`n_0` terms that always count, the series goes on with probability :math:`1 - p` each
    time. The variance is finite if :math:`1 - p > c^2` for :math:`\|J\| \le c`: halting with
    :math:`p = 1/2`, as is usual, demands :math:`c < 0.7`.

    The gradient is estimated, again without bias, by a Neumann series of the same length:
    :math:`\sum_{k<n} (-1)^k v^\top J^k\, \partial J\, v / P(N > k)`. Only the last factor is
    recorded, so that memory does not grow with ``n``. Costs ``O(n H^2)`` per input.

    Parameters
    ----------
    stop_probability
        The probability ``p``, in (0, 1).
    num_exact_terms
        The number :math:`n_0`.
    probes
        The distribution of ``v``: ``"rademacher"`` (signs, of least variance) or ``"gaussian"``.

    References
    ----------
    [1] R. T. Q. Chen, J. Behrmann, D. Duvenaud, J.-H. Jacobsen. Residual flows for invertible
        generative modeling. `arXiv:1906.02735 <https://arxiv.org/abs/1906.02735>`_, 2019.

    Examples
    --------
    >>> from pyroflows.transforms import Residual
    >>> flow = Residual(3, log_det=RussianRouletteLogDet(stop_probability=0.2))
    >>> flow.forward_and_log_det(torch.randn(5, 3))[1].shape
    torch.Size([5])
    """

    stop_probability: float
    num_exact_terms: int = 2
    probes: Literal["rademacher", "gaussian"] = "rademacher"

    def __post_init__(self) -> None:
        if not 0 < self.stop_probability < 1:
            raise ValueError(
                f"stop_probability must be between 0 and 1, got {self.stop_probability}"
            )
        _check_count("num_exact_terms", self.num_exact_terms)
        if self.probes not in ("rademacher", "gaussian"):
            raise ValueError(f"probes must be 'rademacher' or 'gaussian', got {self.probes!r}")

    def __call__(self, derivative: Linearization, training: bool) -> Tensor:
        if torch.jit.is_tracing():
            raise RuntimeError(
                "a traced program would repeat one random length of the series forever: "
                "trace with log_det='exact' or 'auto'"
            )
        probes = self._draw_probes(derivative)
        with torch.no_grad():
            value, neumann = self._series(derivative, probes)
        # The second summand has the estimated gradient; the first sets the value right.
        surrogate = (neumann * derivative.jvp(probes)).sum((-2, -1))
        return (value - surrogate).detach() + surrogate

    def _series(self, derivative: Linearization, probes: Tensor) -> tuple[Tensor, Tensor]:
        rows, value, neumann = probes, probes.new_zeros(()), torch.zeros_like(probes)
        for k in range(1, self.num_exact_terms + self._draw_extra_terms() + 1):
            survival = (1 - self.stop_probability) ** max(k - self.num_exact_terms, 0)
            weight = (-1) ** (k + 1) / survival
            neumann = neumann + weight * rows
            rows = derivative.vjp(rows)
            value = value + weight / k * (rows * probes).sum((-2, -1))
        return value, neumann

    def _draw_extra_terms(self) -> int:
        uniform = float(torch.rand((), dtype=torch.float64, device="cpu"))
        return int(math.log1p(-uniform) / math.log1p(-self.stop_probability))

    def _draw_probes(self, derivative: Linearization) -> Tensor:
        *batch_shape, _, _ = derivative.slopes[0].shape
        empty = derivative.weights[-1].new_empty(*batch_shape, 1, _size(derivative))
        return empty.normal_() if self.probes == "gaussian" else empty.bernoulli_().mul_(2).sub_(1)


@dataclass(frozen=True)
class AutoLogDet:
    """Be exact, but estimate while parameters are trained and ``D`` is above 16.

    What is not differentiated with respect to the parameters is exact and deterministic whatever
    ``D`` is, with or without evaluation mode: the importance weights of draws, the density that
    Hamiltonian Monte Carlo sees through a frozen flow, held-out likelihoods.

    Parameters
    ----------
    estimator
        What to use where exactness costs too much.
    """

    estimator: LogDet

    def __call__(self, derivative: Linearization, training: bool) -> Tensor:
        trained = training and derivative.weights[-1].requires_grad
        # A traced program would repeat one random length; its sizes are not numbers either.
        if trained and not torch.jit.is_tracing() and _size(derivative) > _EXACT_TRAINING_DIM:
            return self.estimator(derivative, training)
        return ExactLogDet()(derivative, training)


def choose_log_det(log_det: str | LogDet, coefficient: float) -> LogDet:
    """Return the strategy of a name, suited to maps of a Lipschitz constant."""
    if not isinstance(log_det, str):
        return log_det
    # Going on with probability c > c^2 makes the variance finite.
    roulette = RussianRouletteLogDet(stop_probability=1 - coefficient)
    strategies: dict[str, LogDet] = {
        "auto": AutoLogDet(roulette),
        "exact": ExactLogDet(),
        "power_series": PowerSeriesLogDet(),
        "russian_roulette": roulette,
    }
    if log_det not in strategies:
        raise ValueError(f"log_det must be one of {', '.join(strategies)}, got {log_det!r}")
    return strategies[log_det]


def _size(derivative: Linearization) -> int:
    return derivative.weights[-1].shape[0]


def _identity(matrix: Tensor) -> Tensor:
    return torch.eye(matrix.shape[-2], dtype=matrix.dtype, device=matrix.device)


def _frozen_signs(count: int, like: Tensor) -> Tensor:
    generator = torch.Generator("cpu").manual_seed(0)
    bits = torch.randint(2, (count, like.shape[-1]), generator=generator, device="cpu")
    return (2 * bits - 1).to(like)


def _check_count(name: str, count: int | None) -> None:
    if count is not None and count < 1:
        raise ValueError(f"{name} must be at least 1, got {count}")
