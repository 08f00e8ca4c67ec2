"""A stack of autoregressive sum-of-squares polynomials."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from ..transforms import Affine, Chain, Compose, SumOfSquares
from .autoregressive import autoregressive_stack
from .registry import FlowSpec, register_flow


def sum_of_squares(
    input_dim: int,
    context_dim: int = 0,
    num_layers: int = 4,
    hidden_dims: Sequence[int] = (64, 64),
    degree: int = 4,
    num_squares: int = 3,
    bound: float = 5.0,
    activation: type[nn.Module] = nn.Tanh,
) -> Compose:
    """Stack autoregressive sum-of-squares polynomials, each followed by an affine map.

    The forward map, sampling, takes one pass each. Seen from the base distribution, the affine map
    comes last, as in :func:`spline_coupling`.

    References
    ----------
    [1] P. Jaini, K. A. Selby, Y. Yu. Sum-of-squares polynomial flow.
        `arXiv:1905.02325 <https://arxiv.org/abs/1905.02325>`_, 2019.

    Examples
    --------
    >>> import torch
    >>> sum_of_squares(4, num_layers=2)(torch.zeros(4)).shape
    torch.Size([4])
    """
    bijection = Chain(SumOfSquares(degree, num_squares, bound), Affine())
    return Compose(
        autoregressive_stack(bijection, input_dim, context_dim, num_layers, hidden_dims, activation)
    )


register_flow(
    FlowSpec(
        "sum_of_squares",
        sum_of_squares,
        fast_forward=True,
        fast_inverse=False,
        closed_form_inverse=False,
        paper="arXiv:1905.02325",
    )
)
