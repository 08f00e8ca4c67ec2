"""Mass-covering refinement of a fitted guide, by adaptive importance sampling."""

from __future__ import annotations

import copy
import math
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import pyro.distributions as dist
import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..diagnostics import effective_sample_size, log_evidence, psis
from ..random_state import seeded
from .checks import at_least
from .density import CHUNK, ModelDensity
from .fit import LEARNING_RATE, NUM_PARTICLES
from .posterior import VariationalPosterior
from .training import train
from .weighting import weighted_draws, without_nan

NUM_STEPS = 1000
STEPS_PER_ROUND = 100
MIN_DRAWS = 8192  # of the guide, in each round
ROUNDS_KEPT = 4  # whose draws are trained on
DRAWS_PER_WIDE_DRAW = 4  # draws of the guide for each of the wider proposal
WIDE_SCALE, WIDE_DF = 1.5, 4.0  # relative to the guide's spread; degrees of freedom
MIN_ESS_SHARE = 0.1  # weights worth fewer draws are flattened
WIDE_FULL_RANK_MAX_DIM = 128
NUM_BISECTIONS = 15


def cover_mass(
    result: VariationalPosterior,
    num_steps: int | None = None,
    num_particles: int | None = None,
    seed: int = 0,
    progress: bool = True,
    *,
    learning_rate: float = LEARNING_RATE,
) -> VariationalPosterior:
    r"""Refine a fitted guide until it covers the mass of the posterior.

    :func:`pyroflows.fit` minimises :math:`\mathrm{KL}(q \| p)`, which lets a guide be too narrow.
    This goes on from there with the other direction,

    .. math:: \mathrm{KL}(p \| q_\theta) = -\int p(z \mid y) \log q_\theta(z)\, dz + \text{const},

    which does not, by adaptive importance sampling [1] [2]. A round draws from the guide, and a
    fourth as often from a Student distribution :math:`t` of four degrees of freedom, 1.5 times as
    wide, and weights the draws by :math:`w_s = p(z_s, y) / (0.8\, q_\theta(z_s) + 0.2\, t(z_s))`,
    which stays bounded where the guide's tails are lighter than the posterior's. The weights of
    the last four rounds are Pareto-smoothed, and flattened to the largest power at which they are
    worth a tenth of the draws [3], so that a guide far off moves in steps it can take. Then 100
    steps of Adam maximise the mean of :math:`\log q_\theta` over draws resampled by weight.

    The guide after each round is weighed on fresh draws. It counts as better than the best one so
    far, at first the one given, if its forward divergence is lower, by an estimate of the
    difference from the draws of both guides together, and its k-hat is no higher than that of
    ``result``. The ELBO may well be lower: that is the other divergence.

    Parameters
    ----------
    result
        What :func:`pyroflows.fit` returned. It is not changed, nor is its guide: the refined one
        is a copy. The guide's density must be cheap to evaluate; flows whose inverse takes many
        passes, as that of ``AutoIAF``, are slow.
    num_steps
        Number of steps. Default: 1000.
    num_particles
        Draws per step. Default: 256.
    seed
        Makes the result reproducible; the global random state is left alone.
    progress
        Whether to show a progress bar, with k-hat and the effective share of the round's draws.
    learning_rate
        Peak learning rate of Adam, in each round.

    Returns
    -------
    VariationalPosterior
        The best guide and as many weighted draws as ``result`` has, but 8192 at least. Its
        ``losses`` are estimates of :math:`\mathrm{KL}(p \| q)` in the steps that led to it, those
        of rounds with flattened weights too low. Or ``result`` itself, if no guide was better. An
        interrupt (Ctrl-C) ends the rounds early.

    Raises
    ------
    TypeError
        If ``result`` is not a ``VariationalPosterior``, or a number not an integer.
    ValueError
        If a number is out of range.
    FloatingPointError
        If the loss keeps being not finite.

    Warns
    -----
    UserWarning
        If ``result`` itself is returned, or the rounds were interrupted.

    Notes
    -----
    A round costs some 12 000 evaluations of the model, without gradients, and 100 gradients of the
    guide's density at ``num_particles`` vectors. Parameters of the model are held fixed. No
    guide can learn of a mode that neither it nor the wider proposal ever draws from.

    References
    ----------
    [1] G. Jerfel, S. Wang, C. Fannjiang, K. A. Heller, Y. Ma, M. I. Jordan. Variational refinement
        for importance sampling using the forward Kullback-Leibler divergence.
        `arXiv:2106.15980 <https://arxiv.org/abs/2106.15980>`_, 2021.
    [2] O. Cappé, R. Douc, A. Guillin, J.-M. Marin, C. P. Robert. Adaptive importance sampling in
        general mixture classes. `arXiv:0710.4242 <https://arxiv.org/abs/0710.4242>`_, 2007.
    [3] E. Koblents, J. Míguez. A population Monte Carlo scheme with transformed weights and its
        application to stochastic kinetic models.
        `arXiv:1208.5600 <https://arxiv.org/abs/1208.5600>`_, 2012.

    Examples
    --------
    A guide without correlations is narrower than a correlated posterior, until it covers it:

    >>> import pyro, pyro.distributions as dist, pyroflows as pf
    >>> from pyro.infer.autoguide import AutoDiagonalNormal
    >>> def model():
    ...     covariance = torch.tensor([[1.0, 0.9], [0.9, 1.0]])
    ...     pyro.sample("x", dist.MultivariateNormal(torch.zeros(2), covariance))
    >>> result = pf.fit(model, AutoDiagonalNormal(model), num_steps=10, progress=False)
    >>> refined = cover_mass(result, num_steps=400, learning_rate=0.02, progress=False)
    >>> [round(float(r.draws.std(0).mean()), 1) for r in (result, refined)]
    [0.4, 1.0]
    >>> refined.khat < result.khat
    True
    """
    if not isinstance(result, VariationalPosterior):
        raise TypeError(f"result must be what pyroflows.fit returns, got {type(result).__name__}")
    num_steps = at_least("num_steps", num_steps, NUM_STEPS)
    num_particles = at_least("num_particles", num_particles, NUM_PARTICLES)
    if not learning_rate > 0:
        raise ValueError(f"learning_rate must be positive, got {learning_rate}")
    with seeded(seed):
        best = _refine(result, num_steps, num_particles, learning_rate, progress)
    if best is not result:
        return best
    warnings.warn(
        f"no better guide was found: the result that was given, of k-hat {result.khat:.2f}, is "
        "returned as it was; if that is high, try a larger flow, or more steps",
        stacklevel=2,
    )
    return result


def _refine(
    result: VariationalPosterior,
    num_steps: int,
    num_particles: int,
    learning_rate: float,
    progress: bool,
) -> VariationalPosterior:
    """Train a copy of the guide in rounds; return the best of them, or ``result``."""
    density = _with_copy_of_guide(result.density)
    parameters = [p for p in density.guide.parameters() if p.requires_grad]
    lengths = [min(STEPS_PER_ROUND, num_steps - i) for i in range(0, num_steps, STEPS_PER_ROUND)]
    num_draws = max(len(result.draws), MIN_DRAWS)
    best, losses = result, list[Tensor]()
    rounds: deque[_Round] = deque(maxlen=ROUNDS_KEPT)
    with tqdm(total=num_steps, disable=not progress, desc="cover mass") as bar:
        try:
            current = _weighted(density, num_draws, losses)
            for length in lengths:
                rounds.append(_Round.draw(current))
                loss = _loss_function(density, rounds, num_particles)
                losses.append(train(loss, parameters, length, learning_rate, progress=False))
                current = _weighted(density, num_draws, losses)
                if current.khat <= result.khat and forward_kl_gain(best, current) > 0:
                    best = current
                bar.update(len(losses[-1]))
                bar.set_postfix(khat=f"{current.khat:.2f}", ess=f"{current.ess:.0f}")
                if len(losses[-1]) < length:  # interrupted, which has been said
                    break
        except KeyboardInterrupt:
            warnings.warn("interrupted: the best guide so far is kept", stacklevel=3)
    return best


def _with_copy_of_guide(density: ModelDensity) -> ModelDensity:
    guide, model = density.guide, density.guide._model
    copied = copy.copy(density)
    # Nothing changes the trace, and not every trace can be copied.
    copied.guide = copy.deepcopy(guide, {id(guide.prototype_trace): guide.prototype_trace})
    guide._model = copied.guide._model = model  # Pyro's guides lose it when they are copied
    return copied


def _weighted(
    density: ModelDensity, num_draws: int, losses: Sequence[Tensor]
) -> VariationalPosterior:
    """Return weighted draws of the guide as it is now."""
    now = _with_copy_of_guide(density)
    return VariationalPosterior(
        now, torch.cat([torch.zeros(0), *losses]), *weighted_draws(now, num_draws)
    )


class _Round(NamedTuple):
    """Hold draws of a round, their log-densities under the model and their log weights."""

    z: Tensor
    log_p: Tensor
    log_weights: Tensor

    @classmethod
    @torch.no_grad()
    def draw(cls, guide: VariationalPosterior) -> _Round:
        """Add draws from a wider proposal to those of a guide; weight them by the mixture."""
        wide = _wider(guide.draws[guide.draws.isfinite().all(-1)])
        far = wide.sample((len(guide.draws) // DRAWS_PER_WIDE_DRAW,))
        z = torch.cat([guide.draws, far])
        log_p = torch.cat([guide.log_p, *map(guide.density, far.split(CHUNK))])
        log_q = torch.cat([guide.log_q, _log_q(guide.density, far)])
        log_r = _log_mixture(log_q, len(guide.draws), wide.log_prob(z), len(far))
        return cls(z, log_p, without_nan(log_p - log_r))


def _log_mixture(log_q: Tensor, count: int, log_other: Tensor, other_count: int) -> Tensor:
    """Return the log-density of two distributions mixed as their numbers of draws are."""
    total = count + other_count
    return torch.logaddexp(
        log_q + math.log(count / total), log_other + math.log(other_count / total)
    )


def _wider(draws: Tensor) -> dist.MultivariateStudentT:
    """Return a Student distribution around draws ``(S, D)``, wider than they are spread."""
    loc, sd, dim = draws.mean(0), draws.std(0), draws.shape[-1]
    correlation = ((draws - loc) / sd).T.cov().reshape(dim, dim)
    factor, failed = torch.linalg.cholesky_ex(correlation)
    if dim > WIDE_FULL_RANK_MAX_DIM or failed:
        factor = torch.eye(dim).to(draws)
    scale_tril = WIDE_SCALE * sd.unsqueeze(-1) * factor
    return dist.MultivariateStudentT(WIDE_DF, loc, scale_tril)


def _flattened(log_weights: Tensor, min_ess: float) -> Tensor:
    """Take log weights to the largest power up to 1 at which they are worth enough draws."""
    if effective_sample_size(log_weights) >= min_ess:
        return log_weights
    low, high = 0.0, 1.0
    for _ in range(NUM_BISECTIONS):
        middle = (low + high) / 2
        if effective_sample_size(middle * log_weights) < min_ess:
            high = middle
        else:
            low = middle
    return high * log_weights


def _loss_function(
    density: ModelDensity, rounds: Iterable[_Round], num_particles: int
) -> Callable[[int], Tensor]:
    """Return an estimate of the forward divergence, of ``num_particles`` times its argument."""
    z, log_p, log_weights = map(torch.cat, zip(*rounds, strict=True))
    weights = _flattened(psis(log_weights)[0], MIN_ESS_SHARE * len(z)).softmax(0)
    log_posterior = log_p - log_evidence(log_weights)[0]

    def loss(growth: int) -> Tensor:
        index = torch.multinomial(weights, growth * num_particles, replacement=True)
        log_q = _posterior(density).log_prob(z[index])
        return (log_posterior[index] - log_q).mean()

    return loss


@torch.no_grad()
def forward_kl_gain(before: VariationalPosterior, after: VariationalPosterior) -> float:
    """Estimate by how many nats the forward divergence fell, from the draws of both guides."""
    log_p = torch.cat([before.log_p, after.log_p])
    log_q_before = torch.cat([before.log_q, _log_q(before.density, after.draws)])
    log_q_after = torch.cat([_log_q(after.density, before.draws), after.log_q])
    mixture = _log_mixture(log_q_before, len(before.draws), log_q_after, len(after.draws))
    weights = psis(without_nan(log_p - mixture))[0].exp()
    gains = torch.where(weights > 0, log_q_after - log_q_before, 0.0)  # 0 times infinity is 0
    return float((weights * gains).sum())


@torch.no_grad()
def _log_q(density: ModelDensity, z: Tensor) -> Tensor:
    return torch.cat([_posterior(density).log_prob(part) for part in z.split(CHUNK)])


def _posterior(density: ModelDensity) -> torch.distributions.Distribution:
    return density.guide.get_posterior(*density.args, **density.kwargs)
