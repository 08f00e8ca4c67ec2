"""Posterior draws from a prior and a likelihood, by a population that cools."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor
from tqdm.auto import tqdm

LogDensity: TypeAlias = Callable[[Tensor], Tensor]

MIN_PARTICLES = 8  # each half of the population has to offer pairs to differ
EFFECTIVE_FRACTION = 0.8  # of the population, that a step of the temperature leaves
BISECTIONS = 60
ACCEPTANCE = 0.35  # what the length of moves is adapted to
JUMP_INTERVAL = 3  # every so many sweeps differences are added whole, from mode to mode
NUM_SHARES = 3  # of the entries that a move changes: a third, two thirds, or all
MIN_SWEEPS, MAX_SWEEPS = 6, 60
GROWTH = 0.01  # of the distance travelled in a sweep, below which nothing is left to forget
FINAL_SWEEPS = 10  # at least, at the posterior itself
JITTER = 1e-3  # of moves, relative to the spread of the population


@dataclass(frozen=True)
class Annealed:
    """Hold what annealing has found.

    Attributes
    ----------
    draws
        Draws from the posterior, shape ``(S, D)``, in random order.
    log_evidence
        Estimate of the log of the mean likelihood under the prior.
    log_evidence_error
        Its standard error.
    num_temperatures
        Number of steps from the prior to the posterior.
    num_evaluations
        Number of vectors that the likelihood was evaluated at.
    """

    draws: Tensor
    log_evidence: float
    log_evidence_error: float
    num_temperatures: int
    num_evaluations: int


def anneal(
    initial: Tensor,
    log_prior: LogDensity,
    log_likelihood: LogDensity,
    *,
    num_draws: int | None = None,
    seed: int = 0,
    progress: bool = False,
) -> Annealed:
    r"""Move a population of draws from the prior to the posterior, by sequential Monte Carlo.

    The target :math:`p(z) \, L(z)^\beta` goes from :math:`\beta = 0` to 1 in steps that leave four
    fifths of the population effective, found by bisection [1]. After each, the population is
    resampled and each half of it moves by differences of the other half [2],

    .. math:: z'_i = z_i + \gamma (z_{a,i} - z_{b,i}) + \epsilon_i, \qquad a \ne b,

    in some entries ``i`` or in all [3], with :math:`\gamma` adapted to the rate of acceptance, and
    sometimes 1, which carries particles from mode to mode, until the distance from where they
    started grows no more. The means of the weights multiply to the evidence; how unequally the
    initial draws have prospered tells its error [4].

    Takes some hundred evaluations of both functions for each initial draw.

    Parameters
    ----------
    initial
        Draws from the prior, shape ``(N, D)``, at least 8.
    log_prior, log_likelihood
        Functions from vectors ``(n, D)`` to numbers ``(n,)``; the likelihood may be zero.
    num_draws
        Number of draws ``S`` that the population becomes at the posterior. Default: ``N``.
    seed
        Determines the result, given the initial draws; the global random state is left alone.
    progress
        Whether to show a progress bar.

    Raises
    ------
    ValueError
        If there are too few draws, initial or wanted, or the likelihood is zero at all of them.

    References
    ----------
    [1] P. Del Moral, A. Doucet, A. Jasra. Sequential Monte Carlo samplers.
        Journal of the Royal Statistical Society B 68, 2006.
    [2] C. J. F. ter Braak. A Markov chain Monte Carlo version of the genetic algorithm differential
        evolution. Statistics and Computing 16, 2006.
    [3] J. A. Vrugt, C. J. F. ter Braak, C. G. H. Diks, B. A. Robinson, J. M. Hyman, D. Higdon.
        Accelerating Markov chain Monte Carlo simulation by differential evolution with
        self-adaptive randomized subspace sampling. International Journal of Nonlinear Sciences and
        Numerical Simulation 10, 2009.
    [4] A. Lee, N. Whiteley. Variance estimation in the particle filter.
        `arXiv:1509.00394 <https://arxiv.org/abs/1509.00394>`_, 2015.

    Examples
    --------
    >>> prior = torch.distributions.Normal(0.0, 1.0)
    >>> initial = torch.randn(1000, 1, generator=torch.Generator().manual_seed(0))
    >>> result = anneal(
    ...     initial,
    ...     lambda z: prior.log_prob(z).sum(-1),
    ...     lambda z: torch.distributions.Normal(z[:, 0], 1.0).log_prob(torch.tensor(2.0)),
    ... )
    >>> round(result.draws.mean().item()), round(result.log_evidence)
    (1, -2)
    """
    if initial.dim() != 2 or len(initial) < MIN_PARTICLES:
        raise ValueError(
            f"initial must have shape (N, D) with N at least {MIN_PARTICLES}, got "
            f"{tuple(initial.shape)}"
        )
    if num_draws is not None and num_draws < MIN_PARTICLES:
        raise ValueError(f"num_draws must be at least {MIN_PARTICLES}, got {num_draws}")
    with torch.no_grad():
        population = _Population(initial, log_prior, log_likelihood, seed)
        return population.run(num_draws or len(initial), progress)


class _Population:
    """Hold particles with their log-densities, and move them."""

    def __init__(
        self, initial: Tensor, log_prior: LogDensity, log_likelihood: LogDensity, seed: int
    ) -> None:
        self.generator = torch.Generator(initial.device).manual_seed(seed)
        self.functions = (log_prior, log_likelihood)
        self.z = initial.detach().clone()
        self.num_founders = len(initial)
        self.founders = torch.arange(len(initial), device=initial.device)
        self.num_evaluations = 0
        self.log_prior, self.log_likelihood = self._evaluate(self.z)
        if not bool(self.log_likelihood.isfinite().any()):
            raise ValueError("log_likelihood must be finite somewhere, got none at initial draws")
        self.temperature = 0.0
        self.log_step = math.log(2.38 / math.sqrt(2))

    def run(self, num_draws: int, progress: bool) -> Annealed:
        log_evidence, steps = 0.0, 0
        layout = "{desc}: {percentage:3.0f}%|{bar}| {elapsed}"
        with tqdm(total=1.0, disable=not progress, desc="anneal", bar_format=layout) as bar:
            while self.temperature < 1:
                step, log_weights = self._next_step()
                log_evidence += float(log_weights.logsumexp(0)) - math.log(len(self.z))
                error = self._error(log_weights)
                steps += 1
                is_last = step == 1 - self.temperature
                self.temperature = 1.0 if is_last else self.temperature + step
                self._resample(log_weights, num_draws if is_last else len(self.z))
                self._forget(FINAL_SWEEPS if is_last else MIN_SWEEPS)
                bar.update(step)
        return Annealed(self.z, log_evidence, error, steps, self.num_evaluations)

    def _error(self, log_weights: Tensor) -> float:
        """Return the error of the log-evidence, from how unequal the initial draws prospered."""
        shares = log_weights.new_zeros(self.num_founders).scatter_add(
            0, self.founders, log_weights.softmax(0)
        )
        return math.sqrt(max(0.0, float(shares.square().sum()) - 1 / self.num_founders))

    def _next_step(self) -> tuple[float, Tensor]:
        """Return the largest step of the temperature that leaves enough of the population."""
        step = 1 - self.temperature
        target = EFFECTIVE_FRACTION * int(self.log_likelihood.isfinite().sum())
        low = 0.0
        if _effective_size(step * self.log_likelihood) < target:
            high = step
            for _ in range(BISECTIONS):
                step = 0.5 * (low + high)
                if _effective_size(step * self.log_likelihood) < target:
                    high = step
                else:
                    low = step
        return step, step * self.log_likelihood

    def _resample(self, log_weights: Tensor, count: int) -> None:
        """Draw the population anew, each particle as often as its weight says, up to one."""
        edges = log_weights.softmax(0).cumsum(0)
        first = torch.rand((), generator=self.generator, device=edges.device, dtype=edges.dtype)
        teeth = (torch.arange(count, device=edges.device) + first) / count
        chosen = torch.searchsorted(edges, teeth).clamp(max=len(edges) - 1)
        # Halves that move by each other's differences must not hold copies of the same particles.
        chosen = chosen[self._permutation(count)]
        self.z = self.z[chosen]
        self.founders = self.founders[chosen]
        self.log_prior = self.log_prior[chosen]
        self.log_likelihood = self.log_likelihood[chosen]

    def _forget(self, min_sweeps: int) -> None:
        """Move until particles are as far from where they started as they will get."""
        start, travelled = self.z.clone(), 0.0
        scale = _positive(start.std(0))
        for sweep in range(MAX_SWEEPS):
            self._sweep(sweep, scale)
            distance = float(((self.z - start) / scale).square().sum(-1).sqrt().mean())
            if sweep + 1 >= min_sweeps and distance < (1 + GROWTH) * travelled:
                return
            travelled = max(distance, travelled)

    def _sweep(self, sweep: int, scale: Tensor) -> None:
        """Move each half by differences of the other."""
        one, other = self._permutation(len(self.z)).tensor_split(2)
        is_jump = sweep % JUMP_INTERVAL == JUMP_INTERVAL - 1
        accepted = 0.0
        for moving, still in ((one, other), (other, one)):
            accepted += self._accept(moving, self._proposal(moving, still, scale, is_jump))
        if not is_jump:
            self.log_step += accepted / len(self.z) - ACCEPTANCE

    def _proposal(self, moving: Tensor, still: Tensor, scale: Tensor, is_jump: bool) -> Tensor:
        """Add differences of two others to particles, in some entries or in all."""
        z, others = self.z[moving], self.z[still]
        first = self._randint(0, len(others), len(z))
        second = (first + self._randint(1, len(others), len(z))) % len(others)
        share = self._randint(1, NUM_SHARES + 1, len(z)).unsqueeze(-1) / NUM_SHARES
        is_moved = torch.rand(z.shape, generator=self.generator, device=z.device) < share
        length = math.exp(self.log_step) / is_moved.sum(-1, keepdim=True).clamp(min=1).sqrt()
        step = (1.0 if is_jump else length) * (others[first] - others[second])
        noise = torch.randn(z.shape, generator=self.generator, device=z.device, dtype=z.dtype)
        return torch.where(is_moved, z + step + JITTER * scale * noise, z)

    def _accept(self, moving: Tensor, proposal: Tensor) -> float:
        """Put proposals in the place of particles, by the rule of Metropolis; count them."""
        log_prior, log_likelihood = self._evaluate(proposal)
        change = log_likelihood - self.log_likelihood[moving]
        log_ratio = log_prior - self.log_prior[moving] + self.temperature * change
        uniform = torch.rand(
            len(proposal), generator=self.generator, device=proposal.device, dtype=torch.float64
        )
        is_accepted = uniform.log() < log_ratio
        chosen = moving[is_accepted]
        self.z[chosen] = proposal[is_accepted]
        self.log_prior[chosen] = log_prior[is_accepted]
        self.log_likelihood[chosen] = log_likelihood[is_accepted]
        return float(len(chosen))

    def _evaluate(self, z: Tensor) -> list[Tensor]:
        """Return the log-prior and the log-likelihood; what is not finite stands for zero."""
        self.num_evaluations += len(z)
        values = (function(z).double() for function in self.functions)
        return [value.nan_to_num(-math.inf, -math.inf, -math.inf) for value in values]

    def _randint(self, low: int, high: int, count: int) -> Tensor:
        return torch.randint(low, high, (count,), generator=self.generator, device=self.z.device)

    def _permutation(self, size: int) -> Tensor:
        return torch.randperm(size, generator=self.generator, device=self.z.device)


def _effective_size(log_weights: Tensor) -> float:
    return float((2 * log_weights.logsumexp(0) - (2 * log_weights).logsumexp(0)).exp())


def _positive(scale: Tensor) -> Tensor:
    return torch.where(scale > 0, scale, 1.0)
