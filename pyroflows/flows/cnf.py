"""The named continuous flow."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from ..transforms import Compose, conditional_cnf
from .registry import FlowSpec, register_flow
from .stacks import check_num_layers


def cnf(
    input_dim: int,
    context_dim: int = 0,
    num_layers: int = 1,
    hidden_dims: Sequence[int] = (64, 64),
    activation: type[nn.Module] = nn.Tanh,
    **options: Any,
) -> Compose:
    """Stack continuous flows; one is usually enough, as its field changes with time.

    Takes the options of :class:`~pyroflows.transforms.ContinuousFlow`: ``trace``, ``noise``,
    ``solver``, ``rtol``, ``atol``, ``num_steps``, ``adjoint``, ``max_evaluations``.

    References
    ----------
    [1] W. Grathwohl, R. T. Q. Chen, J. Bettencourt, I. Sutskever, D. Duvenaud. FFJORD: Free-form
        continuous dynamics for scalable reversible generative models.
        `arXiv:1810.01367 <https://arxiv.org/abs/1810.01367>`_, 2018.

    Examples
    --------
    >>> import torch
    >>> cnf(4)(torch.zeros(4)).shape
    torch.Size([4])
    """
    check_num_layers(num_layers)
    return Compose(
        [
            conditional_cnf(input_dim, context_dim, hidden_dims, activation, **options)
            for _ in range(num_layers)
        ]
    )


# The number of evaluations of the field depends on its shape, not on the dimension: one solve is
# one pass, in either direction.
register_flow(
    FlowSpec(
        "cnf",
        cnf,
        fast_forward=True,
        fast_inverse=True,
        closed_form_inverse=False,
        traceable=False,
        paper="arXiv:1810.01367",
    )
)
