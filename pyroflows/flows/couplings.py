"""Named stacks of couplings: NICE, RealNVP and spline couplings."""

from __future__ import annotations

import random
from collections.abc import Sequence

from torch import nn

from ..transforms import (
    Affine,
    Chain,
    Compose,
    Coupling,
    Elementwise,
    FlowTransform,
    Permutation,
    ScalarBijection,
    Scale,
    Shift,
    Spline,
)
from .registry import FlowSpec, register_flow
from .stacks import check_num_layers, elementwise_stack


def nice(
    input_dim: int,
    context_dim: int = 0,
    num_layers: int = 6,
    hidden_dims: Sequence[int] = (64, 64),
    activation: type[nn.Module] = nn.Tanh,
) -> Compose:
    """Stack additive couplings and a final rescaling.

    References
    ----------
    [1] L. Dinh, D. Krueger, Y. Bengio. NICE: Non-linear independent components estimation.
        `arXiv:1410.8516 <https://arxiv.org/abs/1410.8516>`_, 2014.

    Examples
    --------
    >>> import torch
    >>> nice(4, num_layers=2)(torch.zeros(4)).shape
    torch.Size([4])
    """
    layers = coupling_stack(Shift(), input_dim, context_dim, num_layers, hidden_dims, activation)
    rescaling = Elementwise(Scale(), input_dim, context_dim, hidden_dims, activation)
    return Compose([*layers, rescaling])


def realnvp(
    input_dim: int,
    context_dim: int = 0,
    num_layers: int = 8,
    hidden_dims: Sequence[int] = (64, 64),
    activation: type[nn.Module] = nn.Tanh,
) -> Compose:
    """Stack affine couplings.

    References
    ----------
    [1] L. Dinh, J. Sohl-Dickstein, S. Bengio. Density estimation using Real NVP.
        `arXiv:1605.08803 <https://arxiv.org/abs/1605.08803>`_, 2016.

    Examples
    --------
    >>> import torch
    >>> realnvp(4, num_layers=2)(torch.zeros(4)).shape
    torch.Size([4])
    """
    return Compose(
        coupling_stack(Affine(), input_dim, context_dim, num_layers, hidden_dims, activation)
    )


def spline_coupling(
    input_dim: int,
    context_dim: int = 0,
    num_layers: int = 4,
    hidden_dims: Sequence[int] = (64, 64),
    bins: int = 8,
    bound: float = 5.0,
    activation: type[nn.Module] = nn.Tanh,
) -> Compose:
    """Stack couplings of rational-quadratic splines, each followed by an affine map.

    The affine map lets a layer move and scale the whole line as a function of the other entries,
    tails included; a spline acts inside its box only.

    References
    ----------
    [1] C. Durkan, A. Bekasov, I. Murray, G. Papamakarios. Neural spline flows.
        `arXiv:1906.04032 <https://arxiv.org/abs/1906.04032>`_, 2019.

    Examples
    --------
    >>> import torch
    >>> spline_coupling(4, num_layers=2)(torch.zeros(4)).shape
    torch.Size([4])
    """
    bijection = Chain(Spline(bins, bound), Affine())
    return Compose(
        coupling_stack(bijection, input_dim, context_dim, num_layers, hidden_dims, activation)
    )


def coupling_stack(
    bijection: ScalarBijection,
    input_dim: int,
    context_dim: int,
    num_layers: int,
    hidden_dims: Sequence[int],
    activation: type[nn.Module],
) -> list[FlowTransform]:
    """Build couplings in pairs that move complementary parts, split anew for each pair."""
    check_num_layers(num_layers)
    if input_dim == 1:
        return elementwise_stack(bijection, context_dim, num_layers, hidden_dims, activation)
    layers: list[FlowTransform] = []
    order = natural = list(range(input_dim))
    for i in range(num_layers):
        if i % 2 == 0:
            previous, order = order, _shuffled(input_dim, seed=i // 2)
            layers += _reordering(previous, order)
        layers.append(
            Coupling(
                bijection,
                input_dim,
                context_dim,
                hidden_dims,
                swap=i % 2 == 1,
                activation=activation,
            )
        )
    return layers + _reordering(order, natural)


def _shuffled(input_dim: int, seed: int) -> list[int]:
    """Return a permutation that depends on nothing but the seed; the identity for seed 0."""
    order = list(range(input_dim))
    if seed:
        random.Random(seed).shuffle(order)
    return order


def _reordering(present: list[int], wanted: list[int]) -> list[Permutation]:
    """Return the permutation that takes one order of the entries to another, if they differ."""
    if present == wanted:
        return []
    return [Permutation([present.index(entry) for entry in wanted])]


register_flow(FlowSpec("nice", nice, fast_forward=True, fast_inverse=True, paper="arXiv:1410.8516"))
register_flow(
    FlowSpec("realnvp", realnvp, fast_forward=True, fast_inverse=True, paper="arXiv:1605.08803")
)
register_flow(
    FlowSpec(
        "spline_coupling",
        spline_coupling,
        fast_forward=True,
        fast_inverse=True,
        paper="arXiv:1906.04032",
    )
)
