"""Whether a simulator can draw many times at once."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from pyro import poutine
from torch import Tensor

from ...svi.export import plate_dims
from ..model.simulator_runs import (
    Job,
    close,
    in_plate,
    is_deterministic,
    run,
    sample_sites,
    seeded,
    values,
)


def plan(job: Job, seed: int) -> Job:
    """Return the job with what a single run tells of its sites, and the dimension of its plate.

    A simulator says itself whether it works in a plate by an attribute ``works_in_plate``; others
    are tried. Runs in plates of different sizes are repeated draw by draw, with all sites set to
    what they were there: if log-densities and deterministic values agree, the model works on
    batches. Some draws are at the edge of what arithmetic can bear, so one failure does not count.
    """
    with seeded(seed), torch.no_grad():
        single = run(job, job.simulator)
        drawn = values(single)
        names = (*job.parameters, *job.observed)
        job = job._replace(
            shapes={name: drawn[name].shape for name in names},
            dims=plate_dims({name: single.nodes[name] for name in names}),
            device=drawn[job.parameters[0]].device,
        )
        trial = job._replace(plate_dim=_free_dim(single))
        works = getattr(job.simulator, "works_in_plate", None)
        if works is None:
            works = any(_agrees(trial, single, sizes) for sizes in ((3, 4), (4, 5), (5, 6)))
    return trial if works else job


def _free_dim(single: poutine.Trace) -> int:
    """Return the dimension to the left of all plates of a model."""
    frames = [frame for site in single.nodes.values() for frame in site.get("cond_indep_stack", ())]
    return min((frame.dim for frame in frames if frame.dim is not None), default=0) - 1


def _agrees(job: Job, single: poutine.Trace, sizes: Sequence[int]) -> bool:
    try:
        return all(_agrees_in_plate(job, single, size) for size in sizes)
    except Exception:  # whatever it is, the model does not work on this batch
        return False


def _agrees_in_plate(job: Job, single: poutine.Trace, size: int) -> bool:
    batch = run(job, in_plate(job, size))
    shapes = {name: value.shape for name, value in values(single).items()}
    drawn = values(batch)
    if drawn.keys() != shapes.keys():
        return False
    rows = {name: drawn[name].reshape(size, *shape) for name, shape in shapes.items()}
    densities = _densities(batch, size)
    for i in range(size):
        given = {name: rows[name][i] for name in densities}
        repeated = run(job, poutine.condition(job.simulator, given))
        alone, computed = _densities(repeated, 1), values(repeated)
        same = [close(densities[name][i], alone[name][0]) for name in densities]
        same += [close(rows[name][i], computed[name]) for name in rows.keys() - densities.keys()]
        if not all(same):
            return False
    return True


def _densities(trace: poutine.Trace, size: int) -> dict[str, Tensor]:
    """Return the log-density of each random site in each draw of a plate."""
    trace.compute_log_prob()
    return {
        name: site["log_prob"].reshape(size, -1).sum(1)
        for name, site in sample_sites(trace).items()
        if not is_deterministic(site)
    }
