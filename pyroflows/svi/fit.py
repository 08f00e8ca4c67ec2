"""The whole job of variational inference in one call."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from pyro.infer.autoguide import AutoContinuous, AutoDiagonalNormal, AutoMultivariateNormal
from torch import Tensor

from ..guides import AmortizedFlow, AutoFlow
from ..random_state import seeded
from . import amortized
from .checks import at_least
from .density import ModelDensity
from .objective import Cooling, loss_function
from .plate_density import PlateDensity
from .posterior import VariationalPosterior
from .training import train
from .warm_start import Gaussian, fit_gaussian

NUM_STEPS = 4000
NUM_PARTICLES = 256
LEARNING_RATE = 5e-3
NUM_DRAWS = 10_000


def fit(
    model: Callable,
    guide: AutoContinuous | AmortizedFlow,
    args: tuple = (),
    kwargs: Mapping[str, Any] | None = None,
    num_steps: int | None = None,
    num_particles: int | None = None,
    seed: int = 0,
    progress: bool = True,
    *,
    learning_rate: float = LEARNING_RATE,
    warm_start: bool = True,
    initial_temperature: float = 1.0,
    num_draws: int | None = None,
) -> VariationalPosterior:
    r"""Fit a guide to the posterior of a model, and say how good the answer is.

    Flow guides, and Pyro's ``AutoDiagonalNormal`` and ``AutoMultivariateNormal``, start from the
    normal distribution with the highest ELBO, found by deterministic optimisation. Then the ELBO is
    maximised by Adam with many vectorised particles. Where the flow's inverse is cheap, or its
    layers are autoregressive and draw in one pass, the gradients are those of both directions of
    the divergence,

    .. math:: \mathrm{KL}(q_\theta \| p) + \lambda \, \mathrm{KL}(p \| q_\theta) ,

    the first along the path of the draws [1], the second by their importance, :math:`\lambda` from
    0 to 1 as the weights are worth none to all of the draws. They have no variance where the guide
    is exact, and the second keeps guides from being too narrow; half of the draws reach into the
    tails, on which the importance weights depend. Where a fit cools, both are taken at draws that
    do not move [2], which tells the masses of modes that lie apart. The learning rate warms up, is
    held until the ELBO has converged, and decays while the batch grows to four times its size.
    Steps that are not finite, or after which the ELBO has collapsed, are undone. Finally fresh
    draws from the guide are weighted against the model.

    A :class:`pyroflows.AmortizedFlow` starts as it is and is fitted by
    :class:`pyroflows.PathwiseELBO`, to minibatches where the model subsamples the plate, all
    ``num_steps`` of them, because their scatter hides whether the ELBO still rises. Its draws are
    then weighted against all data, a minibatch after the other. They are fewer the more data there
    are. Fewer than 1000 draws, by default in more than 5000 latent dimensions, give the ELBO with
    its standard error, but neither k-hat nor log evidence, which are NaN: the verdict says so.

    Parameters
    ----------
    model
        A Pyro model.
    guide
        An autoguide over the unconstrained latent vector: any :class:`pyroflows.AutoFlow`, or
        Pyro's ``AutoMultivariateNormal`` and its like; or a :class:`pyroflows.AmortizedFlow`.
    args, kwargs
        Arguments of the model.
    num_steps
        Largest number of steps. Default: 4000; most fits stop earlier.
    num_particles
        Draws per step, before the batch grows. Default: 256; for an ``AmortizedFlow`` 8, of all
        data of a minibatch.
    seed
        Makes the result reproducible; the global random state is left alone.
    progress
        Whether to show a progress bar.
    learning_rate
        Peak learning rate of Adam.
    warm_start
        Whether guides start from the best normal distribution; turn it off to go on with a guide
        that has been fitted before. An ``AmortizedFlow`` always goes on.
    initial_temperature
        The temperature :math:`T \ge 1` to start at: the target is :math:`p(z, y)^{1 / T}`, whose
        modes have merged if :math:`T` is high enough, and cools to :math:`p(z, y)` over the first
        half of the steps. For posteriors of several modes, which fits at :math:`T = 1` lose all but
        one of; choose a flow that can part them, such as ``pf.AutoSpline``. Default: 1, the only
        one for an ``AmortizedFlow``.
    num_draws
        Number of weighted draws behind the verdict. Default: 10 000; for an ``AmortizedFlow`` as
        many of these as hold five million numbers, but 20 at least.

    Returns
    -------
    VariationalPosterior
        Draws, densities and the verdict. The guide itself is fitted in place.

    Raises
    ------
    TypeError
        If the guide is neither an ``AutoContinuous`` nor an ``AmortizedFlow``.
    ValueError
        If a number is out of range, the guide cannot handle the model, or the log-density is not
        finite at the start.
    FloatingPointError
        If the ELBO keeps being not finite.

    Warns
    -----
    UserWarning
        If k-hat is above 0.7: the message is the verdict. If steps had to be undone.

    Notes
    -----
    An ``AmortizedFlow`` cannot be tempered, and takes no model with discrete sites to sum out: for
    these, use ``SVI`` with ``TraceEnum_ELBO``.

    References
    ----------
    [1] G. Roeder, Y. Wu, D. Duvenaud. Sticking the landing: simple, lower-variance gradient
        estimators for variational inference.
        `arXiv:1703.09194 <https://arxiv.org/abs/1703.09194>`_, 2017.
    [2] L. Richter, A. Boustati, N. Nüsken, F. J. R. Ruiz, Ö. D. Akyildiz. VarGrad: a low-variance
        gradient estimator for variational inference.
        `arXiv:2010.10436 <https://arxiv.org/abs/2010.10436>`_, 2020.

    Examples
    --------
    >>> import pyro, pyro.distributions as dist
    >>> import pyroflows as pf
    >>> def model(data):
    ...     mean = pyro.sample("mean", dist.Normal(0.0, 10.0))
    ...     with pyro.plate("data", len(data)):
    ...         pyro.sample("x", dist.Normal(mean, 1.0), obs=data)
    >>> guide = pf.AutoRealNVP(model, num_layers=2)
    >>> result = pf.fit(model, guide, (torch.tensor([1.0, 2.0, 3.0]),), progress=False)
    >>> round(result.sample(1000)["mean"].mean().item(), 1)
    2.0
    """
    num_steps = at_least("num_steps", num_steps, NUM_STEPS)
    is_amortized = isinstance(guide, AmortizedFlow)
    default_particles = amortized.NUM_PARTICLES if is_amortized else NUM_PARTICLES
    num_particles = at_least("num_particles", num_particles, default_particles)
    if num_draws is not None:
        num_draws = at_least("num_draws", num_draws, NUM_DRAWS, minimum=2)
    if not learning_rate > 0:
        raise ValueError(f"learning_rate must be positive, got {learning_rate}")
    if not 1 <= initial_temperature < math.inf:
        raise ValueError(
            f"initial_temperature must be at least 1 and finite, got {initial_temperature}"
        )
    if initial_temperature > 1 and num_particles < 2:
        raise ValueError("num_particles must be at least 2 where a fit cools, got 1")
    if is_amortized and initial_temperature != 1:
        raise ValueError(
            f"initial_temperature must be 1 for an AmortizedFlow, got {initial_temperature}"
        )
    if not callable(model):
        raise TypeError(f"model must be a callable, got {type(model).__name__}")
    with seeded(seed), torch.enable_grad():
        density: ModelDensity
        if is_amortized:
            density = PlateDensity(model, guide, args, kwargs)
            losses = amortized.train_amortized(
                density, num_steps, num_particles, learning_rate, progress
            )
            num_draws = num_draws or amortized.affordable_draws(density, NUM_DRAWS)
        else:
            density = ModelDensity(model, guide, args, kwargs)
            cooling = Cooling(initial_temperature, num_steps // 2)
            if warm_start and density.vectorized:  # one at a time, it would take minutes
                _start_from_gaussian(lambda z: cooling.power(0) * density(z), guide, seed)
            parameters = [p for p in guide.parameters() if p.requires_grad] + density.parameters()
            losses = train(
                loss_function(density, num_particles, cooling),
                parameters,
                num_steps,
                learning_rate,
                progress,
                cooling.num_steps,
            )
        result = VariationalPosterior.from_guide(density, losses, num_draws or NUM_DRAWS, seed)
    if result.is_weighted and not result.is_reliable:
        warnings.warn(result.verdict, stacklevel=2)
    return result


def _start_from_gaussian(
    log_density: Callable[[Tensor], Tensor], guide: AutoContinuous, seed: int
) -> None:
    """Start a guide that has a normal distribution in it from the best one of that kind."""
    with torch.no_grad():
        start = _gaussian_of(guide)
        if start is None:
            return
        gaussian = fit_gaussian(log_density, start, seed)
        if isinstance(guide, AutoFlow):
            guide.get_transform()[-1].set_frame(gaussian.loc, gaussian.scale)
            return
        guide.loc.copy_(gaussian.loc)
        if gaussian.scale.dim() == 1:
            guide.scale = gaussian.scale
        else:
            guide.scale = gaussian.scale.diagonal()
            guide.scale_tril = gaussian.scale / gaussian.scale.diagonal().unsqueeze(-1)


def _gaussian_of(guide: AutoContinuous) -> Gaussian | None:
    if isinstance(guide, AutoFlow):
        return Gaussian(*guide.get_transform()[-1].affine())
    if isinstance(guide, AutoDiagonalNormal):
        return Gaussian(guide.loc.clone(), guide.scale.clone())
    if isinstance(guide, AutoMultivariateNormal):
        return Gaussian(guide.loc.clone(), guide.scale.unsqueeze(-1) * guide.scale_tril)
    return None
