"""The residual block: the identity plus a contraction."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...nn.lipschitz import LipschitzMLP
from ..base import FlowTransform
from .inverse import invert, with_gradient
from .log_det import LogDet, choose_log_det


class Residual(FlowTransform):
    r"""Add a contraction to the identity, as i-ResNets [1] and residual flows [2] do.

    .. math:: y = x + g(x, c), \qquad \operatorname{Lip}_x(g) \le L < 1, \qquad
        \log|\det J| = \log\det(I + J_g)

    The function :math:`g` is a :class:`~pyroflows.nn.LipschitzMLP`. The forward map takes one pass;
    the inverse is the fixed point of :math:`x = y - g(x, c)`, found to a few units in the last
    place. Gradients of the inverse are those of the implicit function. A pass costs ``O(H^2)`` per
    input, with ``H`` the size of the hidden layers, and the exact log-determinant
    ``O(H^2 D + D^3)``.

    Parameters
    ----------
    input_dim
        Number of entries ``D``.
    context_dim
        Size of the context :math:`c`, 0 for none.
    hidden_dims
        Sizes of the hidden layers of :math:`g`.
    coefficient
        The Lipschitz constant ``L``, in (0, 1). Slopes of the flow are between ``1 - L`` and
        ``1 + L``.
    log_det
        ``"exact"``; ``"power_series"``: truncated, deterministic but biased;
        ``"russian_roulette"``: random but unbiased, and much cheaper for many entries and large
        batches; or ``"auto"``: Russian roulette while parameters are trained (in training mode,
        with gradients) if ``D`` is above 16, exact otherwise. Or one of :class:`ExactLogDet`,
        :class:`PowerSeriesLogDet` and :class:`RussianRouletteLogDet`, with options of its own.
    max_iterations
        When the inverse gives up.

    Raises
    ------
    ValueError
        If ``coefficient`` is not between 0 and 1 or ``log_det`` is not known.
    ConvergenceError
        By the inverse, if it has not converged in ``max_iterations``.

    References
    ----------
    [1] J. Behrmann, W. Grathwohl, R. T. Q. Chen, D. Duvenaud, J.-H. Jacobsen. Invertible residual
        networks. `arXiv:1811.00995 <https://arxiv.org/abs/1811.00995>`_, 2018.
    [2] R. T. Q. Chen, J. Behrmann, D. Duvenaud, J.-H. Jacobsen. Residual flows for invertible
        generative modeling. `arXiv:1906.02735 <https://arxiv.org/abs/1906.02735>`_, 2019.

    Examples
    --------
    >>> flow = Residual(10)
    >>> x = torch.randn(100, 10)
    >>> bool(torch.allclose(flow.inv(flow(x)), x, atol=1e-5))
    True
    """

    def __init__(
        self,
        input_dim: int,
        context_dim: int = 0,
        hidden_dims: Sequence[int] = (64, 64),
        coefficient: float = 0.9,
        log_det: str | LogDet = "auto",
        max_iterations: int = 1000,
    ) -> None:
        super().__init__(input_dim, context_dim)
        if not 0 < coefficient < 1:
            raise ValueError(
                f"coefficient must be between 0 and 1 for the flow to invert, got {coefficient}"
            )
        if max_iterations < 1:
            raise ValueError(f"max_iterations must be at least 1, got {max_iterations}")
        self.coefficient = coefficient
        self.log_det = choose_log_det(log_det, coefficient)
        self.max_iterations = max_iterations
        self.network = LipschitzMLP(input_dim, input_dim, hidden_dims, context_dim, coefficient)

    def forward_and_log_det(
        self, x: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        value, derivative = self.network.bind(context).linearize(x)
        return x + value, self.log_det(derivative, self.training)

    def inverse_and_log_det(
        self, y: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        network = self.network.bind(context)
        x = invert(network, y, self.coefficient, self.max_iterations)
        if torch.is_grad_enabled():
            x = with_gradient(x, network, y, self.coefficient, self.max_iterations)
        _, derivative = network.linearize(x)
        return x, -self.log_det(derivative, self.training)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, log_det={self.log_det}"


def residual(input_dim: int, hidden_dims: Sequence[int] | None = None, **options: Any) -> Residual:
    """Build a residual block.

    Examples
    --------
    >>> residual(10)(torch.zeros(10)).shape
    torch.Size([10])
    """
    return conditional_residual(input_dim, 0, hidden_dims, **options)


def conditional_residual(
    input_dim: int, context_dim: int, hidden_dims: Sequence[int] | None = None, **options: Any
) -> Residual:
    """Build a residual block with a context.

    Examples
    --------
    >>> conditional_residual(10, 3).condition(torch.ones(3))(torch.zeros(10)).shape
    torch.Size([10])
    """
    hidden_dims = (input_dim * 10, input_dim * 10) if hidden_dims is None else hidden_dims
    return Residual(input_dim, context_dim, hidden_dims, **options)
