"""The named stack of couplings of angles."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from ..transforms import CircularSpline, Compose, Elementwise
from .couplings import coupling_stack
from .registry import FlowSpec, register_flow


def circular_spline(
    input_dim: int,
    context_dim: int = 0,
    num_layers: int = 4,
    hidden_dims: Sequence[int] = (64, 64),
    bins: int = 8,
    activation: type[nn.Module] = nn.Tanh,
) -> Compose:
    r"""Stack couplings of circular splines, and a circular spline of each angle by itself.

    A flow on the torus :math:`[-\pi, \pi)^D`: its base distribution lives there too.

    References
    ----------
    [1] D. J. Rezende, G. Papamakarios, S. Racanière, M. S. Albergo, G. Kanwar, P. E. Shanahan,
        K. Cranmer. Normalizing flows on tori and spheres.
        `arXiv:2002.02428 <https://arxiv.org/abs/2002.02428>`_, 2020.

    Examples
    --------
    >>> import torch
    >>> circular_spline(4, num_layers=2)(torch.zeros(4)).shape
    torch.Size([4])
    """
    bijection = CircularSpline(bins)
    layers = coupling_stack(bijection, input_dim, context_dim, num_layers, hidden_dims, activation)
    margins = Elementwise(bijection, input_dim, context_dim, hidden_dims, activation)
    return Compose([*layers, margins])


register_flow(
    FlowSpec(
        "circular_spline",
        circular_spline,
        fast_forward=True,
        fast_inverse=True,
        paper="arXiv:2002.02428",
        support="circle",
    )
)
