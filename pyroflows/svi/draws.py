"""The density of a flow at its own draws, and its gradient with respect to these alone."""

from __future__ import annotations

import torch
from torch import Tensor

from ..distributions import Flow
from ..transforms.score import forward_and_score, is_autoregressive


def log_prob_and_score(flow: Flow, draws: Tensor) -> tuple[Tensor, Tensor]:
    r"""Return :math:`\log q(x)` and :math:`\partial_x \log q(x)`, without gradients.

    Takes an inverse pass of the flow; for draws it has just made, autoregressive layers take a
    forward pass instead.

    Parameters
    ----------
    flow
        The flow :math:`q`, of vectors.
    draws
        Shape ``(*batch, D)``.

    Examples
    --------
    >>> import pyroflows as pf
    >>> flow = Flow(None, pf.flow("iaf", 2))
    >>> log_prob, score = log_prob_and_score(flow, flow.rsample((5,)))
    >>> log_prob.shape, score.shape
    (torch.Size([5]), torch.Size([5, 2]))
    """
    memory = flow.transform.recall(y=draws)
    with torch.enable_grad():
        if memory is None or not is_autoregressive(flow.transform):
            draws = draws.detach().requires_grad_()
            log_prob = flow.log_prob(draws)
            return log_prob.detach(), torch.autograd.grad(log_prob.sum(), draws)[0]
        noise = memory.x.detach().requires_grad_()
        log_prob = flow.base_dist.log_prob(noise)
        (score,) = torch.autograd.grad(log_prob.sum(), noise)
    _, score = forward_and_score(flow.transform, noise.detach(), score)
    return (log_prob - memory.log_det).detach(), score
