"""The fit of an amortized guide, to minibatches if the model takes them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pyro.poutine.messenger import Messenger
from torch import Tensor, nn

from .pathwise_elbo import PathwiseELBO
from .plate_density import PlateDensity
from .training import train

NUM_PARTICLES = 8  # each of them draws local variables for all data of the minibatch
MAX_ENTRIES = 5_000_000  # of all draws behind the verdict
MIN_DRAWS = 20


def train_amortized(
    density: PlateDensity,
    num_steps: int,
    num_particles: int,
    learning_rate: float,
    progress: bool,
) -> Tensor:
    """Maximise the ELBO along the path of the draws; return the negative ELBO of each step.

    What minibatches scatter hides how slowly the ELBO still rises: they take all ``num_steps``.
    """
    parameters = [p for p in density.guide.parameters() if p.requires_grad] + density.parameters()
    loss = _loss_function(density, num_particles)
    stop_early = not density.is_subsampled
    return train(loss, parameters, num_steps, learning_rate, progress, stop_early=stop_early)


def affordable_draws(density: PlateDensity, num_draws: int) -> int:
    """Return how many draws of all data, at most ``num_draws``, a verdict can rest on."""
    (dim,) = density.guide.get_posterior(*density.args, **density.kwargs).event_shape
    return min(num_draws, max(MIN_DRAWS, MAX_ENTRIES // dim))


def _loss_function(density: PlateDensity, num_particles: int) -> Callable[[int], Tensor]:
    elbo = PathwiseELBO(
        num_particles,
        max_plate_nesting=density.plate_nesting,
        vectorize_particles=density.vectorized,
    )

    def loss(growth: int) -> Tensor:
        if not density.is_subsampled:  # more draws do not lessen the scatter of minibatches
            elbo.num_particles = growth * num_particles
        with _OwnParameters(density.guide):
            return elbo.differentiable_loss(
                density.model, density.guide, *density.args, **density.kwargs
            )

    return loss


class _OwnParameters(Messenger):
    """Keep the parameters of a module out of the param store.

    Under their names it may hold those of another guide, which Pyro would put in their place.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.owned = {id(parameter) for parameter in module.parameters()}

    def _pyro_param(self, msg: dict[str, Any]) -> None:
        if len(msg["args"]) > 1 and id(msg["args"][1]) in self.owned:
            msg["value"] = msg["args"][1]
