"""The named stack of residual blocks."""

from __future__ import annotations

from collections.abc import Sequence

from ..transforms import Compose, Residual
from ..transforms.residual import LogDet
from .registry import FlowSpec, register_flow
from .stacks import check_num_layers


def residual(
    input_dim: int,
    context_dim: int = 0,
    num_layers: int = 8,
    hidden_dims: Sequence[int] = (64, 64),
    coefficient: float = 0.9,
    log_det: str | LogDet = "auto",
) -> Compose:
    """Stack residual blocks.

    Each block adds a contraction to the identity, see :class:`~pyroflows.transforms.Residual`. The
    forward map takes one pass and its inverse iterates; as a density of data, which needs the
    inverse, prefer ``residual(...).inv``. The log-determinant is exact, except that training with
    more than 16 entries estimates it without bias; ``log_det="exact"`` takes the noise off, at
    ``O(H^2 D + D^3)`` per input and block.

    References
    ----------
    [1] R. T. Q. Chen, J. Behrmann, D. Duvenaud, J.-H. Jacobsen. Residual flows for invertible
        generative modeling. `arXiv:1906.02735 <https://arxiv.org/abs/1906.02735>`_, 2019.

    Examples
    --------
    >>> import torch
    >>> residual(4, num_layers=2)(torch.zeros(4)).shape
    torch.Size([4])
    """
    check_num_layers(num_layers)
    return Compose(
        Residual(input_dim, context_dim, hidden_dims, coefficient, log_det)
        for _ in range(num_layers)
    )


# Exact for up to 16 entries, and for more unless parameters are trained: not a promise to make.
register_flow(
    FlowSpec(
        "residual",
        residual,
        fast_forward=True,
        fast_inverse=False,
        exact_log_det=False,
        closed_form_inverse=False,
        paper="arXiv:1906.02735",
    )
)
