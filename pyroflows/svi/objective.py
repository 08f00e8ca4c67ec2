"""What a fit minimises, and the gradients it takes of it."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from pyro.infer.autoguide import AutoContinuous
from torch import Tensor

from .. import flows
from ..distributions import Flow
from ..guides import AutoFlow
from ..transforms.score import is_autoregressive
from .density import ModelDensity
from .draws import log_prob_and_score
from .training import clip_outliers

# Draws of a guide hardly show it the tails, which decide how heavy its importance weights are.
STRETCH = 2.0


@dataclass(frozen=True)
class Cooling:
    """Lower a temperature to 1, by the same factor each step."""

    initial_temperature: float
    max_steps: int

    @property
    def num_steps(self) -> int:
        """Return how many steps it takes."""
        return self.max_steps if self.initial_temperature > 1 else 0

    def power(self, step: int) -> float:
        """Return the inverse temperature at a step."""
        if step >= self.num_steps:
            return 1.0
        return self.initial_temperature ** (step / self.num_steps - 1)


def loss_function(
    density: ModelDensity, num_particles: int, cooling: Cooling
) -> Callable[[int], Tensor]:
    """Return the negative ELBO as a function of by how much to multiply the number of draws.

    Every call takes new draws, and a cooler target. The gradient is that of both directions of the
    divergence where the guide's inverse is cheap, and, without cooling, where its layers are
    autoregressive and draw in one pass.
    """
    estimate = _reverse
    if _has_fast_inverse(density.guide):
        # Only densities at fixed draws tell the masses of modes that lie apart. Shapes that are
        # hard to learn, such as narrow necks, are told better by paths.
        estimate = both_at_draws if cooling.num_steps else both_along_path
    elif _has_fast_path(density.guide) and not cooling.num_steps:
        estimate = both_along_path
    powers = map(cooling.power, itertools.count())
    return lambda growth: estimate(density, growth * num_particles, next(powers))


def both_along_path(density: ModelDensity, num_draws: int, power: float = 1.0) -> Tensor:
    r"""Return the negative ELBO; its gradient sees both directions along the path of the draws.

    For draws :math:`z_s` of the guide with weights :math:`w_s = p(z_s) / q_\theta(z_s)`, of
    which :math:`\tilde w_s` are normalised, the gradient is

    .. math::
        -\sum_s \bigl(1/S + \lambda \tilde w_s\bigr) \,
        \partial_\theta z_s \, \partial_z \log w_s ,
        \qquad \lambda = \frac{1}{S \sum_s \tilde w_s^2} .

    The first term is the gradient of :math:`\mathrm{KL}(q_\theta \| p)` [1], which leaves guides
    too narrow; the second that of :math:`\mathrm{KL}(p \| q_\theta)` [2], which does not. It fades
    out where the weights rest on few of the draws.

    That holds for draws of the guide, which hardly see its tails. Here one entry of the noise,
    whichever, is doubled in half of the draws, and nothing corrects for it: both terms count errors
    in the tails for more than those divergences do. They still vanish, without noise, where the
    guide is exact. The value is the negative ELBO of the other half.

    Parameters
    ----------
    density
        The log-density :math:`\log p` of a model, with its guide.
    num_draws
        The number ``S``.
    power
        Multiplies :math:`\log p`.

    References
    ----------
    [1] G. Roeder, Y. Wu, D. Duvenaud. Sticking the landing: simple, lower-variance gradient
        estimators for variational inference.
        `arXiv:1703.09194 <https://arxiv.org/abs/1703.09194>`_, 2017.
    [2] G. Tucker, D. Lawson, S. Gu, C. J. Maddison. Doubly reparameterized gradient estimators for
        Monte Carlo objectives. `arXiv:1810.04152 <https://arxiv.org/abs/1810.04152>`_, 2018.
    """
    posterior = _posterior(density)
    noise = posterior.base_dist.rsample((num_draws,))
    num_stretched = num_draws // 2
    stretched = torch.arange(num_draws, device=noise.device) < num_stretched
    z = posterior.transform(noise * _stretches(noise, num_stretched))
    log_q, slope = log_prob_and_score(posterior, z)
    z = clip_outliers(_drop_failures(z, stretched))
    log_p = power * density(z)
    log_weights = (log_p - log_q).detach()
    # Models may fail in tails that guides do not reach: those draws do not count.
    failed = stretched & ~log_weights.isfinite()
    importance, share = _importance(log_weights.masked_fill(failed, -torch.inf))
    along_path = ((z * slope).sum(-1) - log_p).masked_fill(failed, 0.0)
    gradient = ((1 / num_draws + share * importance) * along_path).sum()
    return _with_value(gradient, -log_weights[num_stretched:].mean())


def both_at_draws(density: ModelDensity, num_draws: int, power: float = 1.0) -> Tensor:
    r"""Return the negative ELBO; its gradient sees both directions at draws that do not move.

    For draws and weights as in :func:`both_along_path`, none stretched, the gradient is

    .. math::
        \sum_s \Bigl(\frac{\overline{\log w} - \log w_s}{S - 1}
        + \lambda \bigl(1/S - \tilde w_s\bigr)\Bigr) \, \partial_\theta \log q_\theta(z_s) .

    The first term is that of :math:`\mathrm{KL}(q_\theta \| p)` [1], the second that of
    :math:`\mathrm{KL}(p \| q_\theta)`; where the guide is exact, they have no variance either.
    Paths do not lead from one mode to another: gradients along them say little of the masses of
    modes, in much noise. These do, and need no gradient of the model, but at least two draws.

    References
    ----------
    [1] L. Richter, A. Boustati, N. Nüsken, F. J. R. Ruiz, Ö. D. Akyildiz. VarGrad: a low-variance
        gradient estimator for variational inference.
        `arXiv:2010.10436 <https://arxiv.org/abs/2010.10436>`_, 2020.
    """
    posterior = _posterior(density)
    with torch.no_grad():
        z = posterior.sample((num_draws,))
    log_q = posterior.log_prob(z)
    log_p = power * density(z)  # which may have parameters to learn
    log_weights = (log_p - log_q).detach()
    importance, share = _importance(log_weights)
    reverse = (log_weights.mean() - log_weights) / (num_draws - 1)
    forward = share * (1 / num_draws - importance)
    gradient = ((reverse + forward) * log_q).sum() - log_p.mean()
    return _with_value(gradient, -log_weights.mean())


def _importance(log_weights: Tensor) -> tuple[Tensor, Tensor]:
    """Return normalised weights, and the share of the draws that they are worth."""
    importance = log_weights.softmax(0)
    return importance, 1 / (len(importance) * importance.square().sum())


def _drop_failures(draws: Tensor, stretched: Tensor) -> Tensor:
    """Return draws of which the stretched ones pass on only gradients that are finite."""

    def drop(gradient: Tensor) -> Tensor:
        failed = stretched & ~gradient.isfinite().all(-1)
        return gradient.masked_fill(failed.unsqueeze(-1), 0.0)

    if draws.requires_grad:
        draws.register_hook(drop)
    return draws


def _stretches(noise: Tensor, num_stretched: int) -> Tensor:
    """Return factors of noise ``(S, D)``: in each of the first rows one that is not 1."""
    factors = torch.ones_like(noise)
    entries = torch.randint(noise.shape[-1], (num_stretched, 1), device=noise.device)
    factors[:num_stretched].scatter_(-1, entries, STRETCH)
    return factors


def _with_value(loss: Tensor, value: Tensor) -> Tensor:
    """Return a tensor with the gradient of one and the value of another."""
    return loss + (value - loss).detach()


def _reverse(density: ModelDensity, num_draws: int, power: float) -> Tensor:
    """Return the negative ELBO, which differentiates as it stands."""
    posterior = _posterior(density)
    if isinstance(posterior, Flow):
        z, log_q = posterior.rsample_and_log_prob((num_draws,))
    else:
        z = posterior.rsample((num_draws,))
        log_q = posterior.log_prob(z)
    return (log_q - power * density(clip_outliers(z))).mean()


def _posterior(density: ModelDensity) -> Any:
    return density.guide.get_posterior(*density.args, **density.kwargs)


def _has_fast_inverse(guide: AutoContinuous) -> bool:
    """Tell whether the guide's log-density takes one pass and no sampling goes on in it."""
    spec = _spec(guide)
    return spec is not None and spec.fast_inverse and spec.fast_forward


def _has_fast_path(guide: AutoContinuous) -> bool:
    """Tell whether draws take one pass, and the gradient of their log-density no inverse."""
    spec = _spec(guide)
    return spec is not None and spec.fast_forward and is_autoregressive(guide.transform)


def _spec(guide: AutoContinuous) -> flows.FlowSpec | None:
    if not isinstance(guide, AutoFlow) or not isinstance(guide.flow, str):
        return None
    return flows.spec(guide.flow)
