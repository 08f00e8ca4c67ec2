"""The score of a flow's draws, carried along from the base: path gradients without inverses."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .autoregressive import Autoregressive
from .base import Conditioned, FlowTransform
from .compose import Compose
from .linear import TriangularAffine


def forward_and_score(flow: FlowTransform, x: Tensor, score: Tensor) -> tuple[Tensor, Tensor]:
    r"""Map ``x`` to ``y``, and the score of the density of ``x`` to that of ``y``.

    With the Jacobian :math:`J = \partial y / \partial x`, layer by layer [1]:

    .. math:: \partial_y \log q(y) = J^{-T} \bigl(\partial_x \log q(x)
        - \partial_x \log|\det J|\bigr) .

    Autoregressive layers solve this equation from the last entry to the first, in the arithmetic
    of one backward pass of their network. Other layers differentiate their inverse, but for affine
    ones, which need not. Records no gradients.

    Parameters
    ----------
    flow
        The flow.
    x
        Inputs, ``(*batch, *event_shape)``.
    score
        The gradient of the log-density of the inputs, of the same shape.

    References
    ----------
    [1] L. Vaitl, L. Winkler, L. Richter, P. Kessel. Fast and unified path gradient estimators for
        normalizing flows. `arXiv:2403.15881 <https://arxiv.org/abs/2403.15881>`_, 2024.

    Examples
    --------
    >>> from pyroflows.transforms import DiagonalAffine
    >>> flow = DiagonalAffine(torch.zeros(2), torch.tensor([1.0, 2.0]))
    >>> x = torch.ones(2)
    >>> forward_and_score(flow, x, -x)  # of a standard normal distribution
    (tensor([1., 2.]), tensor([-1.0000, -0.5000]))
    """
    for layer, context in _layers(flow):
        if isinstance(layer, Autoregressive):
            x, score = layer.forward_and_score(x, score, context)
        elif isinstance(layer, TriangularAffine):  # the outer layer of most guides
            x, score = _by_matrix(layer, x, score)
        else:
            x, score = _by_inverse(layer, x, score, context)
    return x, score


def is_autoregressive(flow: FlowTransform) -> bool:
    """Tell whether a flow has layers whose inverse goes from entry to entry."""
    return any(isinstance(layer, Autoregressive) for layer, _ in _layers(flow))


def _layers(
    flow: FlowTransform, context: Tensor | None = None
) -> Iterator[tuple[FlowTransform, Tensor | None]]:
    """Yield the layers of a flow, each with its context."""
    if isinstance(flow, Compose):
        for part in flow:
            yield from _layers(part, context if part.context_dim else None)
    elif isinstance(flow, Conditioned):
        yield from _layers(flow.flow, flow.context)
    else:
        yield flow, context


@torch.no_grad()
def _by_matrix(layer: TriangularAffine, x: Tensor, score: Tensor) -> tuple[Tensor, Tensor]:
    loc, matrix = layer.affine()
    rows = score.reshape(score.shape[:-1].numel(), score.shape[-1])
    solution = torch.linalg.solve_triangular(matrix, rows, upper=False, left=False)
    return loc + x @ matrix.T, solution.reshape(score.shape)


def _by_inverse(
    layer: FlowTransform, x: Tensor, score: Tensor, context: Tensor | None
) -> tuple[Tensor, Tensor]:
    given = () if context is None else (context,)
    with torch.no_grad():
        y, _ = layer.forward_and_log_det(x, *given)
    with torch.enable_grad():
        leaf = y.detach().requires_grad_()
        x, log_det = layer.inverse_and_log_det(leaf, *given)
        log_density = (x * score).sum() + log_det.sum()
        return y, torch.autograd.grad(log_density, leaf)[0]
