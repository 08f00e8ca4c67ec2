"""The score of what an autoregressive layer maps, found by substitution from the last entry on."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..nn import MaskedMLP
from ..nn.steps import Block, blocks_backwards, least_overhead
from .scalar import Affine, ScalarBijection

STEPS_PER_BLOCK = 16


@torch.no_grad()
def image_and_score(
    network: MaskedMLP,
    bijection: ScalarBijection,
    x: Tensor,
    score: Tensor,
    context: Tensor | None,
    batch_shape: Sequence[int],
) -> tuple[Tensor, Tensor]:
    r"""Map ``x`` by :math:`y_d = g(x_d; \theta_d(x_{<d}))`, and its score along with it.

    With the slopes :math:`g'_d` and :math:`\ell = \sum_d \log g'_d` the score :math:`u` of ``y``
    solves :math:`J^T u = s - \partial_x \ell`. The Jacobian is triangular: from the last entry to
    the first,

    .. math:: g'_d u_d = s_d - \frac{\partial \log g'_d}{\partial x_d} - \sum_{e > d}
        \Bigl(u_e \frac{\partial y_e}{\partial \theta_e} + \frac{\partial \log g'_e}
        {\partial \theta_e}\Bigr) \frac{\partial \theta_e}{\partial x_d} .

    The sum is what the network's backward pass brings to entry ``d``. Each step takes that pass as
    far as the entries solved so far allow, so that the arithmetic of all steps together is that of
    one pass. Entries are in the order in which they depend on each other, and the batch comes last.
    Records no gradients.

    Parameters
    ----------
    network
        Maps ``x`` to the parameters :math:`\theta`.
    bijection
        The map :math:`g`.
    x, score
        Inputs and the gradient :math:`s` of their log-density, ``(D, N)``.
    context
        The context of the network, if it has one.
    batch_shape
        Of ``N`` elements: what the batch shape of the context broadcasts to.
    """
    weights = network.weights_by_rank()
    *biases, output_bias = network.biases_by_rank(context, batch_shape)
    hidden, slopes = x, []
    for weight, bias in zip(weights, biases):
        hidden, slope = _activate(network.activation, torch.addmm(bias, weight, hidden))
        slopes.append(slope)
    outputs = torch.addmm(output_bias, weights[-1], hidden)
    parameters = outputs.unflatten(0, (network.input_dim, network.num_parameters))
    near_x = _differentiate(bijection, x, parameters)
    solution = score - near_x.log_slope_by_x
    factors = [near_x.log_slope.neg().exp_(), *slopes]
    gradient = near_x.log_slope_by_parameters
    blocks = blocks_backwards(
        network.degrees, network.input_dim, network.num_parameters, STEPS_PER_BLOCK
    )
    _substitute(blocks, weights, factors, near_x.by_parameters, solution, gradient)
    return near_x.y, solution


def _substitute(
    blocks: Sequence[Block],
    weights: Sequence[Tensor],
    factors: Sequence[Tensor],
    by_parameters: Tensor,
    solution: Tensor,
    gradient: Tensor,
) -> None:
    """Turn a right-hand side ``(D, N)`` into the solution, in place.

    ``factors`` multiply what arrives at entries and hidden units. ``gradient``, that of the
    log-slopes with respect to the parameters, becomes that of the solution, too.
    """
    # As in `MaskedMLP.fill_in`, but backwards: what later blocks of steps contribute comes in one
    # product per block, tensors are cut into the pieces of a block's steps at once, and masks hide
    # what is not known.
    hidden = [torch.zeros_like(factor) for factor in factors[1:]]
    layers = [solution, *hidden, gradient.flatten(0, 1)]
    transposed = [weight.T.contiguous() for weight in weights]
    with least_overhead():
        for block in reversed(blocks):
            stages = []
            for i, ((units, sizes), (above, _)) in enumerate(pairwise(block)):
                new, weight, sign = layers[i][units], transposed[i][units], 1 if i else -1
                new.addmm_(weight[:, above.stop :], layers[i + 1][above.stop :], alpha=sign)
                parts = (new, weight[:, above], factors[i][units])
                pieces = [*zip(*(part.split(sizes) for part in parts))]
                stages.append((pieces, layers[i + 1][above], sign))
            stages.reverse()
            ranks, sizes = block[0]
            planes = [*zip(by_parameters[ranks].split(sizes), gradient[ranks].split(sizes))]
            for step in reversed(range(len(sizes))):
                for pieces, seen, sign in stages:
                    new, weight, factor = pieces[step]
                    new.addmm_(weight, seen, alpha=sign).mul_(factor)
                own_by_parameters, own = planes[step]
                own.addcmul_(own_by_parameters, new.unsqueeze(1))


def _activate(activation: nn.Module, before: Tensor) -> tuple[Tensor, Tensor]:
    """Return hidden units and their slopes."""
    if isinstance(activation, nn.Tanh):  # in a third of the time that autograd takes
        hidden = before.tanh_()
        return hidden, torch.addcmul(hidden.new_ones(()), hidden, hidden, value=-1)
    with torch.enable_grad():
        hidden = activation(before.requires_grad_())
    (slope,) = _gradients(hidden, before)
    return hidden.detach(), slope


class _Derivatives(NamedTuple):
    """Hold the image of ``x`` ``(D, N)`` and its log-slope, and the gradients of both.

    Those with respect to the parameters are contiguous, of shape ``(D, P, N)``.
    """

    y: Tensor
    log_slope: Tensor
    by_parameters: Tensor
    log_slope_by_x: Tensor
    log_slope_by_parameters: Tensor


def _differentiate(bijection: ScalarBijection, x: Tensor, parameters: Tensor) -> _Derivatives:
    if type(bijection) is Affine:  # in a quarter of the time that autograd takes
        y, log_slope = bijection.forward(x, parameters.transpose(0, 1))
        bend = 1 - (log_slope / bijection.log_scale_bound).square()
        nothing, ones = torch.zeros_like(x), torch.ones_like(x)
        by_parameters = torch.stack([ones, x * log_slope.exp() * bend], 1)
        return _Derivatives(y, log_slope, by_parameters, nothing, torch.stack([nothing, bend], 1))
    with torch.enable_grad():
        x, parameters = x.detach().requires_grad_(), parameters.requires_grad_()
        y, log_slope = bijection.forward(x, parameters.transpose(0, 1))
    (by_parameters,) = _gradients(y, parameters)
    gradients = _gradients(log_slope, x, parameters)
    return _Derivatives(y.detach(), log_slope.detach(), by_parameters, *gradients)


def _gradients(values: Tensor, *sources: Tensor) -> tuple[Tensor, ...]:
    """Return gradients of the sum of some values, zero where they do not depend on a source."""
    if not values.requires_grad:
        return tuple(map(torch.zeros_like, sources))
    gradients = torch.autograd.grad(
        values,
        sources,
        torch.ones_like(values),
        retain_graph=True,
        allow_unused=True,
        materialize_grads=True,
    )
    return tuple(gradient.contiguous() for gradient in gradients)
