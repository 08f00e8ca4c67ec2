"""Rectification: a density of straight paths, learned from one of bent paths."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ...distributions.maximum_likelihood import DensityFit, Rows, Settings, split
from ...random_state import seeded
from ..densities.conditional import ConditionalDensity
from ..densities.flow_matching_density import FlowMatchingDensity
from ..densities.straight_density import StraightDensity
from ..densities.velocity_density import CHUNK, VelocityDensity
from ..model.observations import ObservationSpace
from ..model.simulations import Simulations

VALIDATION_FRACTION = 0.1
WEIGHT_DECAY = 1e-2


def straightened(
    density: ConditionalDensity,
    observations: ObservationSpace,
    simulations: Simulations,
    *,
    num_pairs: int,
    num_steps: int,
    batch_size: int,
    learning_rate: float,
    num_solver_steps: int,
    seed: int,
    progress: bool,
    checkpoint: str | Path | None,
) -> tuple[StraightDensity, DensityFit]:
    """Learn a density from pairs that another one makes; see :meth:`VelocityPosterior.straighten`.

    Raises
    ------
    TypeError
        If the density is not that of :class:`FlowMatching`.
    ValueError
        If a number is out of range, or the simulations do not fit.
    """
    if type(density) is not FlowMatchingDensity:
        raise TypeError(
            f"straighten takes posteriors of FlowMatching, got one of a {type(density).__name__}"
        )
    if not isinstance(simulations, Simulations):
        raise TypeError(f"simulations must be Simulations, got {type(simulations).__name__}")
    if num_pairs < 1:
        raise ValueError(f"num_pairs must be at least 1, got {num_pairs}")
    if num_solver_steps < 1:
        raise ValueError(f"num_solver_steps must be at least 1, got {num_solver_steps}")
    settings = Settings(
        num_steps=num_steps,
        batch_size=batch_size,
        learning_rate=learning_rate,
        weight_decay=WEIGHT_DECAY,
        validation_fraction=VALIDATION_FRACTION,
        patience=None,
        standardize=False,
        seed=seed,
    )
    x = observations.tensor(simulations.observations).to(density.linear.loc)
    with seeded(seed), torch.enable_grad():
        straight = StraightDensity(density, observations, num_solver_steps)
        # Apart by observation: other noise for one that was seen is too easy to predict.
        seen = Rows(density.masking.frozen(x, seed), None)
        parts = split(seen, VALIDATION_FRACTION, seed)
        shares = [math.ceil(num_pairs * len(part) / len(x)) for part in parts]
        training, validation = (
            draw_lines(density, straight, part.data, share, progress)
            for part, share in zip(parts, shares)
        )
        fit = straight.field.fit(training, validation, settings, progress, checkpoint)
    return straight, fit


@torch.no_grad()
def draw_lines(
    curved: VelocityDensity,
    straight: StraightDensity,
    x: Tensor,
    num_lines: int,
    progress: bool = False,
) -> Rows:
    """Draw noise and where it is carried, ``(N, 2 D)``, with the summaries that are seen of ``x``.

    Observations have equally many lines, at least ``num_lines`` together.
    """
    x = x[:num_lines]
    repeats = math.ceil(num_lines / len(x))
    lines, summaries = [], []
    for part in tqdm(x.split(max(1, CHUNK // repeats)), disable=not progress, desc="pairs"):
        summary = curved.encode(part)[1]
        noise = torch.randn(repeats, len(part), curved.dim).to(summary)
        lines.append(torch.cat([noise, curved.carry(noise, summary)], -1).flatten(0, 1))
        summaries.append(straight.encode(part)[1].repeat(repeats, 1))
    return Rows(torch.cat(lines), torch.cat(summaries))
