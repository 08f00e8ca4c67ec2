"""Brownian motion with a gap: a path nobody saw, and how fast it moves, from a flow guide.

A particle takes 30 normal steps. Noisy readings of where it is come in at the first ten and the
last ten times; the middle third is lost. Neither the size of the steps nor that of the noise is
known: both have broad log-normal priors. The posterior of the 30 steps and the two scales is of a
kind that variational methods are often measured on, in 32 dimensions [1, 2]. Given the scales all
steps are normal; but the scales open and close them, and here, where the noise hides the steps, it
cannot be said how small they are. That is a funnel.

Because the path is normal given the scales, both can be integrated out: the path in closed form,
the scales on a grid. So the log evidence, the moments of the scales, and the mean and the standard
deviation of the path at every time are known, and guides are judged against them.

What to look at: the gap between ELBO and log evidence (the Kullback-Leibler divergence from guide
to posterior, in nats); k-hat (below 0.7: weighted answers are reliable); in the pictures, the width
of the band where nothing was read, and how far down a guide follows the scale of the steps, which
the normal distribution takes to be much better known than it is. One arm of the posterior escapes
both guides: with less than a hundredth of the mass the readings are nearly exact, and that adds a
fifth to the standard deviation of the log scale of the noise.

[1] P. Sountsov, A. Radul, and contributors. Inference Gym. 2020.
[2] D. Blessing, X. Jia, J. Esslinger, F. Vargas, G. Neumann. Beyond ELBOs: a large-scale evaluation
    of variational methods for sampling. arXiv:2406.07423, 2024.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
import pyro
import pyro.distributions as dist
import torch
from pyro.infer.autoguide import AutoMultivariateNormal
from torch import Tensor

import pyroflows as pf
from pyroflows.plots import plot_pair

from .command_line import parse, save_figure, write_json

NUM_TIMES = 30
SEEN = [*range(10), *range(20, 30)]
TRUE_SCALES = {"innovation": 0.1, "observation": 0.15}
PRIOR_SCALE = 2.0  # of the logarithms of both scales

GUIDES = {"full-rank normal": AutoMultivariateNormal, "spline": pf.AutoSpline}


def model(y: Tensor, seen: Tensor) -> None:
    """Walk at random and read off the positions at the times seen, with noise."""
    zero = y.new_zeros(())
    innovation = pyro.sample("innovation", dist.LogNormal(zero, PRIOR_SCALE))
    observation = pyro.sample("observation", dist.LogNormal(zero, PRIOR_SCALE))
    steps = dist.Normal(y.new_zeros(NUM_TIMES), innovation.unsqueeze(-1)).to_event(1)
    x = pyro.deterministic("x", pyro.sample("steps", steps).cumsum(-1))
    pyro.sample("y", dist.Normal(x[..., seen], observation.unsqueeze(-1)).to_event(1), obs=y)


def simulate_path(seed: int = 5) -> tuple[Tensor, Tensor]:
    """Return a path, and the readings at the times seen."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(2, NUM_TIMES, generator=generator)
    path = TRUE_SCALES["innovation"] * noise[0].cumsum(0)
    return path, (path + TRUE_SCALES["observation"] * noise[1])[SEEN]


@dataclass(frozen=True)
class Exact:
    """Hold the exact answer.

    Attributes
    ----------
    log_evidence
        In nats.
    axes
        The nodes of the log scales, each ``(N,)``, innovation first.
    mass
        Posterior probability of each pair of nodes, ``(N, N)``.
    mean, sd
        Of the log scales and then of the path, each ``(2 + NUM_TIMES,)``.
    """

    log_evidence: float
    axes: tuple[Tensor, Tensor]
    mass: Tensor
    mean: Tensor
    sd: Tensor


def exact_posterior(y: Tensor, num_nodes: int = 300) -> Exact:
    """Integrate the model: the path in closed form, the log scales on a grid.

    In the eigenvectors of the covariance of the path at the times seen, readings are independent
    for every pair of scales at once.
    """
    axes = (torch.linspace(-9.0, 5.0, num_nodes, dtype=torch.float64),) * 2
    log_scales = torch.cartesian_prod(*axes)
    innovation, observation = (2 * log_scales).exp().split(1, -1)  # variances
    times = torch.arange(1, NUM_TIMES + 1).double()
    covariance = torch.minimum(times, times.unsqueeze(-1))
    values, vectors = torch.linalg.eigh(covariance[SEEN][:, SEEN])
    reading = y.double() @ vectors
    variance = innovation * values + observation
    cell = (axes[0][1] - axes[0][0]).square()
    log_prior = dist.Normal(0.0, PRIOR_SCALE).log_prob(log_scales).sum(-1)
    log_likelihood = dist.Normal(0.0, variance.sqrt()).log_prob(reading).sum(-1)
    log_mass = log_prior + log_likelihood + cell.log()
    gain = covariance[:, SEEN] @ vectors
    path = innovation * ((reading / variance) @ gain.T)
    path_variance = innovation * (covariance.diag() - (innovation / variance) @ gain.square().T)
    mass = log_mass.softmax(0)
    means = torch.cat([log_scales, path], -1)
    mean = mass @ means
    within = torch.cat([torch.zeros_like(log_scales), path_variance], -1)
    sd = (mass @ (within + (means - mean).square())).sqrt()
    return Exact(log_mass.logsumexp(0).item(), axes, mass.view(num_nodes, -1), mean, sd)


def moments(result: pf.VariationalPosterior, weighted: bool) -> tuple[Tensor, Tensor]:
    """Return means and sds of the log scales and the path, ``(2 + NUM_TIMES,)`` each."""
    sites = result.site_values(result.draws)
    scales = torch.stack([sites[name].log() for name in TRUE_SCALES], -1)
    values = torch.cat([scales, sites["x"]], -1).double().cpu()
    log_weights = result.log_weights_psis.cpu()
    weights = (log_weights if weighted else torch.zeros_like(log_weights)).softmax(0)
    mean = weights @ values
    return mean, (weights @ (values - mean).square()).sqrt()


def assess(result: pf.VariationalPosterior, exact: Exact) -> dict[str, float]:
    """Return the verdict on a guide and the errors of its moments, in posterior sds."""
    row = {
        "ELBO": result.elbo,
        "gap": exact.log_evidence - result.elbo,
        "standard error": result.elbo_standard_error,
        "k-hat": result.khat,
        "ESS": result.ess,
        "error of log evidence": result.log_evidence - exact.log_evidence,
    }
    for weighted, label in ((False, ""), (True, ", weighted")):
        mean, sd = moments(result, weighted)
        mean_error, sd_error = (mean - exact.mean) / exact.sd, sd / exact.sd - 1
        for i, name in enumerate(TRUE_SCALES):
            row[f"mean log {name}{label}"] = mean_error[i].item()
            row[f"sd log {name}{label}"] = sd_error[i].item()
        row[f"worst mean of path{label}"] = mean_error[2:].abs().max().item()
        row[f"worst sd of path{label}"] = sd_error[2:].abs().max().item()
    return row


def draw_paths(
    results: dict[str, pf.VariationalPosterior], exact: Exact, path: Tensor, y: Tensor
) -> plt.Figure:
    """Draw each guide's band of the path, two sds wide each way, against the exact one."""
    figure, axes = plt.subplots(1, len(results), figsize=(6 * len(results), 4), sharey=True)
    times = torch.arange(1, NUM_TIMES + 1)
    for ax, (name, result) in zip(axes, results.items(), strict=True):
        mean, sd = (part[2:] for part in moments(result, weighted=False))
        ax.fill_between(times, mean - 2 * sd, mean + 2 * sd, color="0.85", label="guide, 2 sd")
        ax.plot(times, mean, color="0.5", linewidth=3, label="guide, mean")
        ax.plot(times, exact.mean[2:], "k-", linewidth=1, label="exact, mean")
        for sign, label in ((-2, "exact, 2 sd"), (2, None)):
            edge = exact.mean[2:] + sign * exact.sd[2:]
            ax.plot(times, edge, "k--", linewidth=1, label=label)
        ax.plot(times, path, "k:", linewidth=1.5, label="the path walked")
        ax.plot(times[SEEN], y, "ko", markersize=4, label="readings")
        ax.set(title=name, xlabel="time")
    axes[0].set_ylabel("position")
    axes[-1].legend(fontsize="small", ncols=2)
    return figure


def draw_scales(results: dict[str, pf.VariationalPosterior], exact: Exact) -> plt.Figure:
    """Draw the two log scales from each guide over contours that hold 50 % and 95 % exactly."""
    figure, axes = plt.subplots(1, len(results), figsize=(4 * len(results), 3.8), sharey=True)
    ordered = exact.mass.flatten().sort(descending=True).values
    levels = [ordered[(ordered.cumsum(0) < share).sum()] for share in (0.95, 0.5)]
    for ax, (name, result) in zip(axes, results.items(), strict=True):
        draws = result.sample(2000, seed=2)
        points = torch.stack([draws[scale].log() for scale in TRUE_SCALES], -1).cpu()
        plot_pair(points, labels=[f"log {scale}" for scale in TRUE_SCALES], ax=ax)
        ax.contour(*exact.axes, exact.mass.T, levels=levels, colors="black", linestyles=["--", "-"])
        for line, value in zip((ax.axvline, ax.axhline), TRUE_SCALES.values(), strict=True):
            line(math.log(value), color="0.4", linestyle=":")
        ax.set(title=f"{name}, k-hat {result.khat:.2f}", xlim=(-7, -1), ylim=(-2.7, -0.6))
        ax.label_outer()
    return figure


def main() -> None:
    """Fit the guides, print the table, write the files."""
    options = parse("brownian", __doc__)
    path, y = simulate_path()
    exact = exact_posterior(y)
    print(f"exact log evidence: {exact.log_evidence:.4f}")
    args = (y.to(options.device), torch.tensor(SEEN, device=options.device))
    budget: dict[str, Any] = {"num_steps": 200, "num_particles": 64} if options.fast else {}
    results, metrics = {}, {}
    for name, guide in GUIDES.items():
        start = time.perf_counter()
        results[name] = pf.fit(model, guide(model), args, seed=options.seed, **budget)
        seconds = time.perf_counter() - start
        metrics[name] = {**assess(results[name], exact), "seconds": seconds}
    print(pd.DataFrame(metrics).round(3).to_string())

    best = min(metrics, key=lambda name: metrics[name]["gap"])
    result = results[best]
    print(f"\nbest guide: {best}. {result.verdict}")
    dims = {"steps": ["time"], "x": ["time"], "y": ["reading"]}
    result.to_arviz(dims=dims).to_netcdf(options.out / "brownian.nc")
    write_json(options.out / "metrics.json", metrics)
    save_figure(draw_paths(results, exact, path, y), options.out / "paths.png")
    save_figure(draw_scales(results, exact), options.out / "scales.png")
    print("\nwritten:", *sorted(str(path) for path in options.out.iterdir()))


if __name__ == "__main__":
    main()
