"""Markov chain Monte Carlo in the space that a fitted guide has straightened out."""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Iterator, Mapping

import torch
from pyro.infer import MCMC, NUTS
from torch import Tensor

from ..random_state import seeded
from ..transforms import ConvergenceError, FlowTransform
from .density import CHUNK, ModelDensity
from .neutra_posterior import BASE, NeuTraPosterior
from .posterior import VariationalPosterior
from .training import frozen

MIN_SAMPLES = 8  # R-hat needs two halves of at least four
STARTS_PER_CHAIN = 20  # draws of the guide, of which one of finite density is needed


def neutra(
    result: VariationalPosterior,
    num_samples: int = 1000,
    warmup_steps: int = 500,
    num_chains: int = 1,
    seed: int = 0,
    progress: bool = True,
    *,
    target_accept_prob: float = 0.8,
    max_tree_depth: int = 10,
) -> NeuTraPosterior:
    r"""Sample a posterior by NUTS in the base space of a fitted guide.

    With :math:`T` the guide's map from base to unconstrained vectors, Pyro's NUTS samples

    .. math:: \log p(T(u), y) + \log|\det \partial T / \partial u|

    and :math:`T` maps the draws back. Where the guide is good this density is close to a standard
    normal one, which takes short trajectories; where it is not, the answer is still right, only
    slower: the guide proposes coordinates, it does not approximate [1]. The posterior may be of
    any structure; latent variables inside plates count once. Each chain starts from a draw of the
    guide, and chains run one after another.

    Parameters
    ----------
    result
        What :func:`pyroflows.fit` returned, of any guide that has a transform: every
        :class:`pyroflows.AutoFlow`, ``AutoDiagonalNormal``, ``AutoMultivariateNormal`` and
        ``AutoNormalizingFlow``. It is not changed. Guides whose flow takes one pass forward are
        fast.
    num_samples
        Number of draws of each chain, at least 8.
    warmup_steps
        Number of steps before these, at least 1; they adapt the step size and a diagonal mass
        matrix.
    num_chains
        Number of chains.
    seed
        Makes the result reproducible; the global random state is left alone.
    progress
        Whether to show a progress bar.
    target_accept_prob
        Acceptance probability the step size is adapted to, between 0 and 1. Raise it where
        transitions diverge.
    max_tree_depth
        Trajectories have at most ``2**max_tree_depth - 1`` steps.

    Returns
    -------
    NeuTraPosterior
        The draws, what they are worth, and their export to ArviZ. After an interrupt (Ctrl-C) it
        holds the chains that were finished, or if there is none what the first one has drawn.

    Raises
    ------
    TypeError
        If ``result`` is not a ``VariationalPosterior``, or its guide has no transform.
    ValueError
        If a number is out of range, the density is not finite at the guide's draws, or it is not
        the same each time, as where the model subsamples its data or the flow estimates its
        log-determinant.

    Warns
    -----
    UserWarning
        If transitions diverged, or the run was interrupted.

    References
    ----------
    [1] M. Hoffman, P. Sountsov, J. V. Dillon, I. Langmore, D. Tran, S. Vasudevan. NeuTra-lizing
        bad geometry in Hamiltonian Monte Carlo using neural transport.
        `arXiv:1903.03704 <https://arxiv.org/abs/1903.03704>`_, 2019.
    [2] M. D. Hoffman, A. Gelman. The No-U-Turn sampler.
        `arXiv:1111.4246 <https://arxiv.org/abs/1111.4246>`_, 2011.

    Examples
    --------
    >>> import pyro, pyro.distributions as dist, pyroflows as pf
    >>> def model():
    ...     pyro.sample("x", dist.Normal(0.0, 1.0))
    >>> result = pf.fit(model, pf.AutoRealNVP(model, num_layers=2), num_steps=10, progress=False)
    >>> chains = pf.neutra(result, num_samples=50, warmup_steps=100, progress=False)
    >>> chains.draws["x"].shape
    torch.Size([1, 50])
    """
    if not isinstance(result, VariationalPosterior):
        raise TypeError(f"result must be what pyroflows.fit returns, got {type(result).__name__}")
    _check_integer("num_samples", num_samples, MIN_SAMPLES)
    _check_integer("warmup_steps", warmup_steps, 1)
    _check_integer("num_chains", num_chains, 1)
    _check_integer("max_tree_depth", max_tree_depth, 1)
    if not 0 < target_accept_prob < 1:
        raise ValueError(f"target_accept_prob must be between 0 and 1, got {target_accept_prob}")
    density = result.density
    with seeded(seed), torch.enable_grad(), _constant(density):
        target = _BaseDensity(density)
        chains: list[_Chain] = []
        try:
            for start in _starts(target, num_chains):
                chains.append(_Chain(target))
                kernel = NUTS(
                    potential_fn=target.potential,
                    target_accept_prob=target_accept_prob,
                    max_tree_depth=max_tree_depth,
                )
                chains[-1].run(kernel, start, num_samples, warmup_steps, progress)
        except KeyboardInterrupt:
            chains = _rescued(chains, num_samples)
        base = torch.stack([torch.stack(chain.draws) for chain in chains])
        stats = {
            name: torch.tensor([chain.stats[name] for chain in chains]) for name in chains[0].stats
        }
        posterior = NeuTraPosterior(result, base, *target.evaluate(base), stats)
    if posterior.divergences:
        warnings.warn(posterior.verdict, stacklevel=2)
    return posterior


class _BaseDensity:
    """Evaluate the density that the sampler sees, and count how often it looked."""

    def __init__(self, density: ModelDensity) -> None:
        self.density = density
        self.evaluations = 0
        try:
            self.base = density.guide.get_base_dist()
            self.transform = density.guide.get_transform(*density.args, **density.kwargs)
        except (AttributeError, NotImplementedError):
            raise TypeError(
                "result must be that of a guide with a transform, such as pf.AutoRealNVP or "
                f"Pyro's AutoMultivariateNormal, got one of {type(density.guide).__name__}"
            ) from None

    def push(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """Map base vectors ``(S, D)`` to unconstrained ones; return the log-determinant too."""
        if isinstance(self.transform, FlowTransform):
            return self.transform.forward_and_log_det(u)
        z = self.transform(u)
        # Pyro's elementwise transforms have one log-determinant for each entry.
        return z, self.transform.log_abs_det_jacobian(u, z).reshape(len(u), -1).sum(-1)

    def log_density(self, u: Tensor) -> Tensor:
        """Return the log-density ``(S,)`` of base vectors ``(S, D)``."""
        z, log_det = self.push(u)
        return self.density(z) + log_det

    def potential(self, site: Mapping[str, Tensor]) -> Tensor:
        """Return the negative log-density of one base vector, as Pyro's samplers want it."""
        self.evaluations += 1
        u = site[BASE]
        try:
            # Data may be of higher precision than latents; Pyro's sampler mixes no two.
            return -self.log_density(u.unsqueeze(0)).squeeze(0).to(u.dtype)
        except ConvergenceError:  # a flow that has no answer this far out: the step is rejected
            return u.sum() * math.nan

    @torch.no_grad()
    def evaluate(self, base: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return unconstrained vectors, their log-densities under the model, log-determinants."""
        parts = []
        for u in base.flatten(0, 1).split(CHUNK):
            z, log_det = self.push(u)
            parts.append((z, self.density(z), log_det))
        z, log_p, log_det = (torch.cat(part) for part in zip(*parts, strict=True))
        return (
            z.reshape(base.shape),
            log_p.reshape(base.shape[:-1]),
            log_det.reshape(base.shape[:-1]),
        )


class _Chain:
    """Record a chain as it runs, so that an interrupt loses nothing."""

    def __init__(self, target: _BaseDensity) -> None:
        self.target = target
        self.draws: list[Tensor] = []
        self.stats: dict[str, list] = {"diverging": [], "n_steps": [], "step_size": []}

    def run(
        self, kernel: NUTS, start: Tensor, num_samples: int, warmup_steps: int, progress: bool
    ) -> None:
        sampler = MCMC(
            kernel,
            num_samples,
            warmup_steps,
            initial_params={BASE: start},
            hook_fn=self._record,
            disable_progbar=not progress,
        )
        sampler.run()

    def _record(self, kernel: NUTS, site: Mapping[str, Tensor], stage: str, step: int) -> None:
        steps, self.target.evaluations = self.target.evaluations, 0
        if stage.startswith("Warmup"):
            return
        self.draws.append(site[BASE].detach())
        self.stats["diverging"].append(step in kernel.diagnostics()["divergences"][-1:])
        self.stats["n_steps"].append(steps)
        self.stats["step_size"].append(kernel.step_size)


@contextlib.contextmanager
def _constant(density: ModelDensity) -> Iterator[None]:
    """Hold the guide and the model's parameters fixed within a ``with`` block."""
    guide = density.guide
    was_training = guide.training
    try:
        guide.eval()
        with frozen([*guide.parameters(), *density.parameters()]):
            yield
    finally:
        guide.train(was_training)


@torch.no_grad()
def _starts(target: _BaseDensity, num_chains: int) -> Tensor:
    """Return draws of the guide ``(num_chains, D)``, in base space, where chains can start."""
    u = target.base.sample((STARTS_PER_CHAIN * num_chains,))
    log_p, again = target.log_density(u), target.log_density(u)
    finite = log_p.isfinite()
    if not torch.allclose(log_p[finite], again[finite], rtol=1e-4):
        raise ValueError(
            "result must be that of a model and a guide whose log-density is the same each time: "
            "drop the subsampling of the model's plates, and random estimates of the flow's "
            "log-determinant"
        )
    if int(finite.sum()) < num_chains:
        raise ValueError(
            f"the model's log-density is finite at {int(finite.sum())} of {len(u)} draws of the "
            f"guide of result, too few to start {num_chains} chains: fit the guide first"
        )
    return u[finite][:num_chains]


def _rescued(chains: list[_Chain], num_samples: int) -> list[_Chain]:
    """Return what an interrupted run is worth keeping; raise ``KeyboardInterrupt`` if nothing."""
    finished = [chain for chain in chains if len(chain.draws) == num_samples]
    kept = finished or [chain for chain in chains if len(chain.draws) >= MIN_SAMPLES]
    if not kept:
        raise KeyboardInterrupt
    warnings.warn(
        f"interrupted: the result holds {len(kept)} chains of {len(kept[0].draws)} draws",
        stacklevel=3,
    )
    return kept


def _check_integer(name: str, value: int, minimum: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    if value < minimum:
        raise ValueError(f"{name} must be at least {minimum}, got {value}")
