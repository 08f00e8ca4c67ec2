"""The radial flow: push away from a centre, or pull towards it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..nn import Hypernetwork
from .base import FlowTransform

_LIMIT = 0.99  # less than 1: an inverse loses two digits at most


class Radial(FlowTransform):
    r"""Push the vector away from a centre, or pull it closer, most of all near the centre.

    With the distance :math:`r = |x - x_0|` and :math:`h = 1 / (\alpha + r)`,

    .. math:: y = x + \beta h\, (x - x_0), \qquad
        \log|\det J| = (D - 1) \log(1 + \beta h) + \log(1 + \alpha \beta h^2) .

    The map is invertible because :math:`\alpha > 0` and :math:`\beta > -0.99\, \alpha`. The inverse
    solves a quadratic equation for :math:`r`. Costs ``O(D)`` in both directions.

    Parameters
    ----------
    input_dim
        Number of entries ``D``.
    context_dim
        Size of the context that :math:`x_0`, :math:`\alpha` and :math:`\beta` depend on, 0 for
        none.
    hidden_dims
        Sizes of the hidden layers of the network of the context.
    activation
        A class of activation modules for the network of the context.

    References
    ----------
    [1] D. J. Rezende, S. Mohamed. Variational inference with normalizing flows.
        `arXiv:1505.05770 <https://arxiv.org/abs/1505.05770>`_, 2015.

    Examples
    --------
    >>> flow = Radial(10)
    >>> x = torch.randn(100, 10)
    >>> bool(torch.allclose(flow.inv(flow(x)), x, atol=1e-5))
    True
    """

    def __init__(
        self,
        input_dim: int,
        context_dim: int = 0,
        hidden_dims: Sequence[int] = (64, 64),
        activation: type[nn.Module] = nn.Tanh,
    ) -> None:
        super().__init__(input_dim, context_dim)
        # Alpha of the order of the length of a standard normal vector. Beta near zero, but not
        # zero: the centre and alpha receive gradients through it.
        log_alpha = torch.full((1,), math.log(input_dim) / 2)
        raw_beta = math.log(math.expm1(_LIMIT)) + 1e-2 / input_dim * torch.randn(1)
        initial = torch.cat([torch.randn(input_dim), log_alpha, raw_beta])
        self.parts = Hypernetwork(initial, context_dim, hidden_dims, activation)

    def forward_and_log_det(
        self, x: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        centre, alpha, beta = self._sphere(context)
        offset = x - centre
        reach = alpha + torch.linalg.vector_norm(offset, dim=-1, keepdim=True)
        stretch = beta / reach
        return torch.addcmul(x, stretch, offset), self._log_det(stretch, alpha / reach)

    def inverse_and_log_det(
        self, y: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        centre, alpha, beta = self._sphere(context)
        offset = y - centre
        length = torch.linalg.vector_norm(offset, dim=-1, keepdim=True)
        reach = alpha + _solve_radius(length, alpha, beta)
        stretch = beta / reach
        return centre + offset / (1 + stretch), -self._log_det(stretch, alpha / reach)

    def _sphere(self, context: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        r"""Return :math:`x_0`, :math:`\alpha` and :math:`\beta`."""
        D = self.event_shape[0]
        centre, log_alpha, raw_beta = self.parts(context).split([D, 1, 1], -1)
        alpha = log_alpha.exp()
        return centre, alpha, alpha * (F.softplus(raw_beta) - _LIMIT)

    def _log_det(self, across: Tensor, share: Tensor) -> Tensor:
        along = (across * share).log1p()
        return torch.add(along, across.log1p(), alpha=self.event_shape[0] - 1).squeeze(-1)


def _solve_radius(R: Tensor, alpha: Tensor, beta: Tensor) -> Tensor:
    r"""Return the ``r`` with :math:`r (1 + \beta / (\alpha + r)) = R`."""
    p = R - alpha - beta
    larger = (p.abs() + (p.square() + 4 * alpha * R).sqrt()) / 2
    # The roots of r^2 - p r - alpha R have the product -alpha R: no cancellation either way.
    return torch.where(p > 0, larger, alpha * R / larger)


def radial(input_dim: int, **options: Any) -> Radial:
    """Build a radial flow, with Pyro's signature.

    Examples
    --------
    >>> radial(10)(torch.zeros(10)).shape
    torch.Size([10])
    """
    return Radial(input_dim, **options)


def conditional_radial(
    input_dim: int, context_dim: int, hidden_dims: Sequence[int] | None = None, **options: Any
) -> Radial:
    """Build a radial flow with a context, with Pyro's signature.

    Examples
    --------
    >>> conditional_radial(10, 3).condition(torch.ones(3))(torch.zeros(10)).shape
    torch.Size([10])
    """
    hidden_dims = (input_dim * 10, input_dim * 10) if hidden_dims is None else hidden_dims
    return Radial(input_dim, context_dim, hidden_dims, **options)
