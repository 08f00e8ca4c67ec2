"""Named stacks of autoregressive layers: IAF, MAF and autoregressive splines."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from ..transforms import (
    Affine,
    Autoregressive,
    Chain,
    Compose,
    FlowTransform,
    ScalarBijection,
    Spline,
)
from .registry import FlowSpec, register_flow
from .stacks import check_num_layers, elementwise_stack


def iaf(
    input_dim: int,
    context_dim: int = 0,
    num_layers: int = 4,
    hidden_dims: Sequence[int] = (64, 64),
    activation: type[nn.Module] = nn.Tanh,
) -> Compose:
    """Stack affine autoregressive layers whose forward map, sampling, takes one pass each.

    References
    ----------
    [1] D. P. Kingma, T. Salimans, R. Jozefowicz, X. Chen, I. Sutskever, M. Welling. Improving
        variational inference with inverse autoregressive flow.
        `arXiv:1606.04934 <https://arxiv.org/abs/1606.04934>`_, 2016.

    Examples
    --------
    >>> import torch
    >>> iaf(4, num_layers=2)(torch.zeros(4)).shape
    torch.Size([4])
    """
    return Compose(
        autoregressive_stack(Affine(), input_dim, context_dim, num_layers, hidden_dims, activation)
    )


def maf(
    input_dim: int,
    context_dim: int = 0,
    num_layers: int = 5,
    hidden_dims: Sequence[int] = (64, 64),
    activation: type[nn.Module] = nn.Tanh,
) -> Compose:
    """Stack affine autoregressive layers whose inverse map, log-density, takes one pass each.

    References
    ----------
    [1] G. Papamakarios, T. Pavlakou, I. Murray. Masked autoregressive flow for density estimation.
        `arXiv:1705.07057 <https://arxiv.org/abs/1705.07057>`_, 2017.

    Examples
    --------
    >>> import torch
    >>> maf(4, num_layers=2)(torch.zeros(4)).shape
    torch.Size([4])
    """
    layers = autoregressive_stack(
        Affine(), input_dim, context_dim, num_layers, hidden_dims, activation
    )
    return Compose([layer.inv for layer in layers])


def spline_autoregressive(
    input_dim: int,
    context_dim: int = 0,
    num_layers: int = 4,
    hidden_dims: Sequence[int] = (64, 64),
    bins: int = 8,
    bound: float = 5.0,
    activation: type[nn.Module] = nn.Tanh,
) -> Compose:
    """Stack autoregressive splines whose inverse map, log-density, takes one pass each.

    Seen from the base distribution, each spline is followed by an affine map, as in
    :func:`spline_coupling`.

    References
    ----------
    [1] C. Durkan, A. Bekasov, I. Murray, G. Papamakarios. Neural spline flows.
        `arXiv:1906.04032 <https://arxiv.org/abs/1906.04032>`_, 2019.

    Examples
    --------
    >>> import torch
    >>> spline_autoregressive(4, num_layers=2)(torch.zeros(4)).shape
    torch.Size([4])
    """
    bijection = Chain(Affine(), Spline(bins, bound))
    layers = autoregressive_stack(
        bijection, input_dim, context_dim, num_layers, hidden_dims, activation
    )
    return Compose([layer.inv for layer in layers])


def autoregressive_stack(
    bijection: ScalarBijection,
    input_dim: int,
    context_dim: int,
    num_layers: int,
    hidden_dims: Sequence[int],
    activation: type[nn.Module],
) -> list[FlowTransform]:
    """Build autoregressive layers that run through the entries back and forth in turn."""
    check_num_layers(num_layers)
    if input_dim == 1:
        return elementwise_stack(bijection, context_dim, num_layers, hidden_dims, activation)
    order = range(input_dim)
    return [
        Autoregressive(
            bijection, input_dim, context_dim, hidden_dims, order[:: (-1) ** i], activation
        )
        for i in range(num_layers)
    ]


register_flow(FlowSpec("iaf", iaf, fast_forward=True, fast_inverse=False, paper="arXiv:1606.04934"))
register_flow(FlowSpec("maf", maf, fast_forward=False, fast_inverse=True, paper="arXiv:1705.07057"))
register_flow(
    FlowSpec(
        "spline_autoregressive",
        spline_autoregressive,
        fast_forward=False,
        fast_inverse=True,
        paper="arXiv:1906.04032",
    )
)
