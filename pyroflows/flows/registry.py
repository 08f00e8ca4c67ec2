"""The registry of named architectures."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from ..transforms import FlowTransform


@dataclass(frozen=True)
class FlowSpec:
    r"""Describe a named architecture: how to build it and what it promises.

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
    support
        The space of the events: ``"real"`` for all vectors, ``"circle"`` for vectors of angles in
        :math:`[-\pi, \pi)`.
    traceable
        Whether ``torch.jit.trace`` can record it: its control flow does not depend on its inputs.
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
    support: Literal["real", "circle"] = "real"
    traceable: bool = True


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
