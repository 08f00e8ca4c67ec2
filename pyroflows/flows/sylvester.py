"""A stack of Sylvester flows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

from torch import nn

from ..nn.orthogonal import FixedAxes, Rotation
from ..transforms import Compose, Sylvester
from .registry import FlowSpec, register_flow
from .stacks import check_num_layers

_DEFAULT_UNITS = 16
# What gives the axes of a layer, from the number of entries and the place of the layer.
_AXES: dict[str, Callable[[int, int], nn.Module | None]] = {
    "householder": lambda input_dim, layer: None,  # the layer's default
    "orthogonal": lambda input_dim, layer: Rotation(input_dim, random=True),
    "triangular": lambda input_dim, layer: FixedAxes(input_dim, backwards=layer % 2 == 1),
}


def sylvester(
    input_dim: int,
    context_dim: int = 0,
    num_layers: int = 8,
    hidden_dims: Sequence[int] = (64, 64),
    activation: type[nn.Module] = nn.Tanh,
    num_units: int | None = None,
    parametrization: Literal["householder", "orthogonal", "triangular"] = "householder",
) -> Compose:
    """Stack Sylvester flows. The hidden layers are those of the networks of the context.

    A layer has ``num_units`` hidden units, by default as many as entries but at most 16. The axes
    of a layer are the first columns of a product of reflections (``"householder"``), of the
    exponential of a skew-symmetric matrix (``"orthogonal"``), or those of the entries, in their
    order and backwards in turn (``"triangular"``, with as many units as entries).

    Raises
    ------
    ValueError
        If there is no such parametrization, or the number of units does not go with it.

    References
    ----------
    [1] R. van den Berg, L. Hasenclever, J. M. Tomczak, M. Welling. Sylvester normalizing flows for
        variational inference. `arXiv:1803.05649 <https://arxiv.org/abs/1803.05649>`_, 2018.

    Examples
    --------
    >>> import torch
    >>> sylvester(4, num_layers=2)(torch.zeros(4)).shape
    torch.Size([4])
    """
    check_num_layers(num_layers)
    if parametrization not in _AXES:
        raise ValueError(
            f"parametrization must be one of {', '.join(_AXES)}, got {parametrization!r}"
        )
    triangular = parametrization == "triangular"
    if num_units is None:
        num_units = input_dim if triangular else min(input_dim, _DEFAULT_UNITS)
    if triangular and num_units != input_dim:
        raise ValueError(
            f"num_units must be input_dim {input_dim} for triangular axes, got {num_units}"
        )
    return Compose(
        Sylvester(
            input_dim,
            context_dim,
            hidden_dims,
            activation,
            num_units,
            axes=_AXES[parametrization](input_dim, layer),
        )
        for layer in range(num_layers)
    )


register_flow(
    FlowSpec(
        "sylvester",
        sylvester,
        fast_forward=True,
        fast_inverse=True,
        closed_form_inverse=False,
        paper="arXiv:1803.05649",
    )
)
