"""The registry of named architectures."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ..transforms import Flattened, FlowTransform


@dataclass(frozen=True)
class FlowSpec:
    r"""Describe a named architecture: how to build it and what it promises.

    Attributes
    ----------
    name
        Name in the registry.
    factory
        Called as ``factory(input_dim, context_dim, **options)``; for images the first argument is
        their shape.
    fast_forward, fast_inverse
        Whether the direction takes one pass, whatever the dimension.
    exact_log_det
        Whether log-determinants are exact rather than estimated.
    closed_form_inverse
        Whether both directions are free of iterations up to a tolerance.
    support
        The space of the events: ``"real"`` for all vectors, ``"circle"`` for vectors of angles in
        :math:`[-\pi, \pi)`.
    event
        What it maps: ``"vector"`` for vectors of any size, ``"image"`` for arrays of shape
        ``(C, H, W)``.
    traceable
        Whether ``torch.jit.trace`` can record it: its control flow does not depend on its inputs.
    paper
        Where the architecture comes from.

    Examples
    --------
    >>> realnvp = spec("realnvp")
    >>> realnvp.fast_forward, realnvp.fast_inverse, realnvp.paper
    (True, True, 'arXiv:1605.08803')
    """

    name: str
    factory: Callable[..., FlowTransform]
    fast_forward: bool
    fast_inverse: bool
    paper: str
    exact_log_det: bool = True
    closed_form_inverse: bool = True
    support: Literal["real", "circle"] = "real"
    event: Literal["vector", "image"] = "vector"
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


def names(event: Literal["vector", "image"] = "vector") -> list[str]:
    """Return the names of the registered architectures for vectors, or of those for images.

    Examples
    --------
    >>> "realnvp" in names(), names("image")
    (True, ['glow', 'realnvp_image'])
    """
    return sorted(name for name, spec in _registry.items() if spec.event == event)


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
        known = ", ".join(sorted(_registry))
        raise ValueError(f"unknown flow {name!r}; registered flows: {known}")
    return _registry[name]


def flow(
    name: str, input_dim: int | Sequence[int], context_dim: int = 0, **options: Any
) -> FlowTransform:
    """Build a registered architecture.

    Parameters
    ----------
    name
        One of :func:`names`.
    input_dim
        Number of entries ``D`` of a vector, or the shape ``(C, H, W)`` of an image. An architecture
        for vectors sees the entries of an image in a row.
    context_dim
        Size of the context the flow is conditioned on, 0 for none.
    **options
        Options of the architecture: ``num_layers``, ``hidden_dims``, ``activation``, and ``bins``
        and ``bound`` for splines; for images ``num_scales``, ``num_layers`` at each, ``width`` and
        ``num_blocks`` of the networks, ``activation``, and the ``bijection`` of the couplings.

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
    >>> glow = flow("glow", (3, 8, 8), width=16)
    >>> glow(torch.randn(5, 3, 8, 8)).shape
    torch.Size([5, 3, 8, 8])
    """
    architecture = spec(name)
    if architecture.event == "image" or isinstance(input_dim, int):
        return architecture.factory(input_dim, context_dim, **options)
    shape = tuple(input_dim)
    return Flattened(architecture.factory(math.prod(shape), context_dim, **options), shape)
