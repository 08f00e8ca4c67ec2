"""Named architectures, built from transforms, and the registry that lists them."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from .transforms import (
    Affine,
    Autoregressive,
    Chain,
    Compose,
    Coupling,
    Elementwise,
    FlowTransform,
    ScalarBijection,
    Scale,
    Shift,
    Spline,
)


@dataclass(frozen=True)
class FlowSpec:
    """Describe a named architecture: how to build it and what it promises.

    Attributes
    ----------
    name
        Name in the registry.
    factory
        Called as ``factory(input_dim, context_dim, **options)``.
    fast_forward, fast_inverse
        Whether the direction takes one pass, whatever the dimension.
    exact_log_det
        Whether log-determinants are exact rather than estimated.
    closed_form_inverse
        Whether both directions are free of iterations up to a tolerance.
    paper
        Where the architecture comes from.
    """

    name: str
    factory: Callable[..., FlowTransform]
    fast_forward: bool
    fast_inverse: bool
    paper: str
    exact_log_det: bool = True
    closed_form_inverse: bool = True


_registry: dict[str, FlowSpec] = {}


def register_flow(spec: FlowSpec) -> None:
    """Add an architecture to the registry.

    Raises
    ------
    ValueError
        If the name is taken.

    Examples
    --------
    >>> import torch
    >>> from pyroflows.transforms import Permutation
    >>> def reverse(input_dim, context_dim=0):
    ...     return Permutation(range(input_dim)[::-1])
    >>> register_flow(FlowSpec("reverse", reverse, True, True, paper=""))
    >>> flow("reverse", 2)(torch.tensor([1.0, 2.0]))
    tensor([2., 1.])
    >>> del _registry["reverse"]
    """
    if spec.name in _registry:
        raise ValueError(f"a flow named {spec.name!r} is registered already")
    _registry[spec.name] = spec


def names() -> list[str]:
    """Return the names of the registered architectures.

    Examples
    --------
    >>> "realnvp" in names()
    True
    """
    return sorted(_registry)


def spec(name: str) -> FlowSpec:
    """Return what the registry holds about an architecture.

    Raises
    ------
    ValueError
        If there is none of that name.

    Examples
    --------
    >>> spec("maf").fast_inverse
    True
    """
    if name not in _registry:
        raise ValueError(f"unknown flow {name!r}; registered flows: {', '.join(names())}")
    return _registry[name]


def flow(name: str, input_dim: int, context_dim: int = 0, **options: Any) -> FlowTransform:
    """Build a registered architecture.

    Parameters
    ----------
    name
        One of :func:`names`.
    input_dim
        Number of entries ``D`` of a vector.
    context_dim
        Size of the context the flow is conditioned on, 0 for none.
    **options
        Options of the architecture: ``num_layers``, ``hidden_dims``, ``activation``, and ``bins``
        and ``bound`` for splines.

    Returns
    -------
    FlowTransform
        A flow near the identity, in the default dtype and on the default device.

    Raises
    ------
    ValueError
        If the name is unknown or an option has an impossible value.
    TypeError
        If the architecture has no such option.

    Examples
    --------
    >>> import torch
    >>> maf = flow("maf", 10, num_layers=3)
    >>> maf(torch.randn(5, 10)).shape
    torch.Size([5, 10])
    """
    return spec(name).factory(input_dim, context_dim, **options)


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
    layers = _couplings(Shift(), input_dim, context_dim, num_layers, hidden_dims, activation)
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
        _couplings(Affine(), input_dim, context_dim, num_layers, hidden_dims, activation)
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
        _couplings(bijection, input_dim, context_dim, num_layers, hidden_dims, activation)
    )


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
        _autoregressions(Affine(), input_dim, context_dim, num_layers, hidden_dims, activation)
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
    layers = _autoregressions(Affine(), input_dim, context_dim, num_layers, hidden_dims, activation)
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
    layers = _autoregressions(
        bijection, input_dim, context_dim, num_layers, hidden_dims, activation
    )
    return Compose([layer.inv for layer in layers])


def _couplings(
    bijection: ScalarBijection,
    input_dim: int,
    context_dim: int,
    num_layers: int,
    hidden_dims: Sequence[int],
    activation: type[nn.Module],
) -> list[FlowTransform]:
    """Build couplings in pairs that move complementary halves, split anew for each pair."""
    _check_num_layers(num_layers)
    if input_dim == 1:
        return _elementwise(bijection, context_dim, num_layers, hidden_dims, activation)
    split_dim = input_dim // 2
    layers: list[FlowTransform] = []
    for i in range(num_layers):
        order = _shuffled(input_dim, seed=i // 2)
        if i % 2:
            order = order[split_dim:] + order[:split_dim]
        layers.append(
            Coupling(
                bijection,
                input_dim,
                context_dim,
                hidden_dims,
                split_dim=input_dim - split_dim if i % 2 else split_dim,
                order=order,
                activation=activation,
            )
        )
    return layers


def _autoregressions(
    bijection: ScalarBijection,
    input_dim: int,
    context_dim: int,
    num_layers: int,
    hidden_dims: Sequence[int],
    activation: type[nn.Module],
) -> list[FlowTransform]:
    """Build autoregressive layers that run through the entries back and forth in turn."""
    _check_num_layers(num_layers)
    if input_dim == 1:
        return _elementwise(bijection, context_dim, num_layers, hidden_dims, activation)
    order = range(input_dim)
    return [
        Autoregressive(
            bijection, input_dim, context_dim, hidden_dims, order[:: (-1) ** i], activation
        )
        for i in range(num_layers)
    ]


def _elementwise(
    bijection: ScalarBijection,
    context_dim: int,
    num_layers: int,
    hidden_dims: Sequence[int],
    activation: type[nn.Module],
) -> list[FlowTransform]:
    """Build what the stacks come down to for a single entry."""
    return [
        Elementwise(bijection, 1, context_dim, hidden_dims, activation) for _ in range(num_layers)
    ]


def _check_num_layers(num_layers: int) -> None:
    if num_layers < 1:
        raise ValueError(f"num_layers must be at least 1, got {num_layers}")


def _shuffled(input_dim: int, seed: int) -> list[int]:
    """Return a permutation that depends on nothing but the seed; the identity for seed 0."""
    order = list(range(input_dim))
    if seed:
        random.Random(seed).shuffle(order)
    return order


_DINH_2014 = "arXiv:1410.8516"
_DINH_2016 = "arXiv:1605.08803"
_DURKAN_2019 = "arXiv:1906.04032"
_KINGMA_2016 = "arXiv:1606.04934"
_PAPAMAKARIOS_2017 = "arXiv:1705.07057"

for _spec in (
    FlowSpec("nice", nice, fast_forward=True, fast_inverse=True, paper=_DINH_2014),
    FlowSpec("realnvp", realnvp, fast_forward=True, fast_inverse=True, paper=_DINH_2016),
    FlowSpec(
        "spline_coupling", spline_coupling, fast_forward=True, fast_inverse=True, paper=_DURKAN_2019
    ),
    FlowSpec("iaf", iaf, fast_forward=True, fast_inverse=False, paper=_KINGMA_2016),
    FlowSpec("maf", maf, fast_forward=False, fast_inverse=True, paper=_PAPAMAKARIOS_2017),
    FlowSpec(
        "spline_autoregressive",
        spline_autoregressive,
        fast_forward=False,
        fast_inverse=True,
        paper=_DURKAN_2019,
    ),
):
    register_flow(_spec)
