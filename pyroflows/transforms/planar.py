"""The planar flow: move along one direction, by how far the vector lies along another."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from ..nn import Hypernetwork
from .base import FlowTransform
from .solve import solve_increasing, with_implicit_gradient

_LIMIT = 0.99  # less than 1: an inverse loses two digits at most


class Planar(FlowTransform):
    r"""Move the vector along one direction, as a function of its projection on another.

    .. math:: y = x + \hat u\, h(t), \quad t = w \cdot x + b, \qquad
        \log|\det J| = \log(1 + h'(t)\, w \cdot \hat u) .

    The map is invertible because :math:`w \cdot \hat u > -1`: with :math:`s = w \cdot u` and
    :math:`m = 0.99`,

    .. math:: \hat u = \frac{2 m}{2 m - 1 + \sqrt{1 + s^2} - s}\, u , \qquad w \cdot \hat u > -m .

    This reaches the same :math:`\hat u` as the projection of [1], without its division by
    :math:`|w|^2`. The inverse solves one increasing scalar equation per vector,
    :math:`t + (w \cdot \hat u)\, h(t) = w \cdot y + b`, in closed form for the leaky ReLU. Costs
    ``O(D)`` in both directions.

    Parameters
    ----------
    input_dim
        Number of entries ``D``.
    context_dim
        Size of the context that :math:`u`, :math:`w` and :math:`b` depend on, 0 for none.
    hidden_dims
        Sizes of the hidden layers of the network of the context.
    activation
        A class of activation modules for the network of the context.
    nonlinearity
        The function :math:`h`: ``"tanh"``, or ``"leaky_relu"`` with slope 0.01 below zero.

    Raises
    ------
    ValueError
        If ``nonlinearity`` is none of these.
    ConvergenceError
        From the inverse with ``"tanh"``, if inputs or parameters are not finite.

    References
    ----------
    [1] D. J. Rezende, S. Mohamed. Variational inference with normalizing flows.
        `arXiv:1505.05770 <https://arxiv.org/abs/1505.05770>`_, 2015.

    Examples
    --------
    >>> flow = Planar(10)
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
        nonlinearity: Literal["tanh", "leaky_relu"] = "tanh",
    ) -> None:
        super().__init__(input_dim, context_dim)
        if nonlinearity not in _NONLINEARITIES:
            raise ValueError(
                f"nonlinearity must be one of {', '.join(map(repr, _NONLINEARITIES))}, "
                f"got {nonlinearity!r}"
            )
        self.nonlinearity = nonlinearity
        # Small u, but not zero: w and b receive gradients through it.
        u, w = (bound * (2 * torch.rand(input_dim) - 1) for bound in (1e-2, input_dim**-0.5))
        initial = torch.cat([u, w, torch.zeros(1)])
        self.parts = Hypernetwork(initial, context_dim, hidden_dims, activation)

    def forward_and_log_det(
        self, x: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        u, w, b, gain = self._plane(context)
        value, slope = self._h.value_and_slope(_dot(w, x) + b)
        return torch.addcmul(x, u, value), torch.log1p(gain * slope).squeeze(-1)

    def inverse_and_log_det(
        self, y: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        u, w, b, gain = self._plane(context)
        value, slope = self._h.solve(_dot(w, y) + b, gain)
        return torch.addcmul(y, u, value, value=-1), -torch.log1p(gain * slope).squeeze(-1)

    @property
    def _h(self) -> _Nonlinearity:
        return _NONLINEARITIES[self.nonlinearity]

    def _plane(self, context: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        r"""Return :math:`\hat u, w, b` and the gain :math:`w \cdot \hat u`."""
        D = self.event_shape[0]
        u, w, b = self.parts(context).split([D, D, 1], -1)
        s = _dot(w, u)
        factor = 2 * _LIMIT / (2 * _LIMIT - 1 + (1 + s.square()).sqrt() - s)
        return factor * u, w, b, factor * s

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, nonlinearity={self.nonlinearity!r}"


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum(-1, keepdim=True)


class _Nonlinearity(Protocol):
    def value_and_slope(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return :math:`h(t)` and :math:`h'(t)`."""

    def solve(self, target: Tensor, gain: Tensor) -> tuple[Tensor, Tensor]:
        """Return them where :math:`t + g h(t)` is the target, for a gain ``g > -1``."""


class _Tanh:
    def value_and_slope(self, t: Tensor) -> tuple[Tensor, Tensor]:
        value = t.tanh()
        return value, 1 - value.square()

    def solve(self, target: Tensor, gain: Tensor) -> tuple[Tensor, Tensor]:
        def equation(t: Tensor) -> tuple[Tensor, Tensor]:
            value, slope = self.value_and_slope(t)
            return t + gain * value, 1 + gain * slope

        reach = gain.abs()
        t = solve_increasing(equation, target, target - reach, target + reach)
        return self.value_and_slope(with_implicit_gradient(t, *equation(t), target))


class _LeakyReLU:
    def value_and_slope(self, t: Tensor) -> tuple[Tensor, Tensor]:
        slope = torch.where(t < 0, 0.01, torch.ones_like(t))
        return slope * t, slope

    def solve(self, target: Tensor, gain: Tensor) -> tuple[Tensor, Tensor]:
        value, slope = self.value_and_slope(target)  # t and the target have the same sign
        return value / (1 + gain * slope), slope


_NONLINEARITIES: dict[str, _Nonlinearity] = {"tanh": _Tanh(), "leaky_relu": _LeakyReLU()}


def planar(input_dim: int, **options: Any) -> Planar:
    """Build a planar flow, with Pyro's signature.

    Examples
    --------
    >>> planar(10)(torch.zeros(10)).shape
    torch.Size([10])
    """
    return Planar(input_dim, **options)


def conditional_planar(
    input_dim: int, context_dim: int, hidden_dims: Sequence[int] | None = None, **options: Any
) -> Planar:
    """Build a planar flow with a context, with Pyro's signature.

    Examples
    --------
    >>> conditional_planar(10, 3).condition(torch.ones(3))(torch.zeros(10)).shape
    torch.Size([10])
    """
    hidden_dims = (input_dim * 10, input_dim * 10) if hidden_dims is None else hidden_dims
    return Planar(input_dim, context_dim, hidden_dims, **options)
