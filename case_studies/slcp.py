"""Simple likelihood, complex posterior: what it is worth to know that points are exchangeable.

Four points of the plane are normal; five parameters, uniform in a box, make their mean and
covariance [1]. Standard deviations are squares of parameters, whose signs cannot be told: the
posterior has four modes, with sharp edges where it meets the box. Methods that see the points as
one vector of eight numbers need a hundred thousand simulations for it.

The Pyro model says more: the points are in a plate. Flow matching reads them as a set. Neural
likelihood goes further: given the parameters the points are independent, so a conditional flow
learns the density of one point, from all of them. What it returns is a Pyro model whose observed
site is the flow; annealing a population draws from its posterior, all modes included.

The exact posterior for comparison comes from the true density: draws from the prior, resampled by
their likelihood. What to look at: the classifier two-sample test of both methods (0.5 is perfect),
trained on the same simulations, and the corners of the modes.

[1] G. Papamakarios, D. C. Sterratt, I. Murray. Sequential neural likelihood: fast likelihood-free
    inference with autoregressive flows. arXiv:1805.07226, 2018.
"""

from __future__ import annotations

import time
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

import pyroflows as pf
from pyroflows.arviz import build
from pyroflows.plots import plot_corner

from .accuracy import accuracy
from .budget import Budget
from .command_line import parse, save_figure, write_json

NUM_POINTS = 4
BOUND = 3.0
TRUTH = torch.tensor([0.7, -2.9, -1.0, -0.9, 0.6])
NAMES = tuple(f"theta[{i}]" for i in range(len(TRUTH)))
NUM_PRIOR_DRAWS, CHUNK = 20_000_000, 1_000_000
NUM_EXACT = 20_000  # draws
NEGLIGIBLE = 20.0  # nats below the best: all such draws together have no weight


def slcp() -> Tensor:
    """Draw points around a mean, with a covariance, that five parameters make."""
    theta = pyro.sample("theta", dist.Uniform(-BOUND, BOUND).expand([5]).to_event(1))
    mean, factor = mean_and_factor(theta)
    with pyro.plate("points", NUM_POINTS):
        return pyro.sample("x", dist.MultivariateNormal(mean, scale_tril=factor))


def mean_and_factor(theta: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean ``(*batch, 2)`` and the Cholesky factor of the covariance."""
    first, second = theta[..., 2].square() + 1e-3, theta[..., 3].square() + 1e-3
    correlation = theta[..., 4].tanh()
    rest = (1 - correlation.square()).sqrt()
    rows = [
        torch.stack([first, torch.zeros_like(first)], -1),
        torch.stack([correlation * second, rest * second], -1),
    ]
    return theta[..., :2], torch.stack(rows, -2)


def log_likelihood(theta: Tensor, x: Tensor) -> Tensor:
    """Return the log-density of points ``(n, 2)`` given parameters ``(N, 5)``."""
    mean, factor = mean_and_factor(theta)
    offset = x - mean.unsqueeze(-2)
    first = offset[..., 0] / factor[:, None, 0, 0]
    second = (offset[..., 1] - factor[:, None, 1, 0] * first) / factor[:, None, 1, 1]
    log_scale = (factor[:, 0, 0] * factor[:, 1, 1]).log() + torch.tensor(2 * torch.pi).log()
    return -0.5 * (first.square() + second.square()).sum(-1) - len(x) * log_scale


def exact_draws(
    x: Tensor, num_draws: int, seed: int = 0, num_prior_draws: int = NUM_PRIOR_DRAWS
) -> tuple[Tensor, float]:
    """Resample draws from the prior by their likelihood; return them and their effective number."""
    generator = torch.Generator().manual_seed(seed)
    theta, log_weights = torch.zeros(0, len(TRUTH)), torch.zeros(0)
    for _ in range(0, num_prior_draws, CHUNK):
        some = BOUND * (2 * torch.rand(CHUNK, len(TRUTH), generator=generator) - 1)
        theta = torch.cat([theta, some])
        log_weights = torch.cat([log_weights, log_likelihood(some, x)])
        kept = log_weights > log_weights.max() - NEGLIGIBLE
        theta, log_weights = theta[kept], log_weights[kept]
    weights = log_weights.double().softmax(0)
    uniform = torch.rand(num_draws, generator=generator, dtype=torch.float64)
    index = torch.searchsorted(weights.cumsum(0), uniform)
    return theta[index.clamp(max=len(theta) - 1)], 1 / weights.square().sum().item()


def observe(seed: int) -> Tensor:
    """Simulate the points that are given, at known parameters."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return pyro.condition(slcp, data={"theta": TRUTH})()


def main() -> None:
    """Learn by both methods, compare them with the exact posterior, write the files."""
    options = parse("slcp", __doc__)
    budget, seed, out = Budget.of(options.fast), options.seed, options.out
    simulations = pf.sbi.simulate(slcp, budget.num_simulations, seed=seed, progress=False)
    x = observe(seed)
    exact, effective_number = exact_draws(x, NUM_EXACT, seed)
    metrics: dict[str, Any] = {
        "simulations": budget.num_simulations,
        "effective number of exact draws": effective_number,
    }
    learned = {}
    for method in (pf.sbi.FlowMatching, pf.sbi.NeuralLikelihood):
        start = time.perf_counter()
        result = method(slcp, device=options.device).fit(simulations, seed=seed, **budget.training)
        trained = time.perf_counter()
        draws = result.sample(budget.num_draws, x=x, seed=seed)["theta"].cpu()
        sampled = time.perf_counter()
        name = method.__name__
        learned[name] = draws
        metrics[name] = {
            **accuracy(draws, exact, NAMES),
            "training seconds": trained - start,
            "sampling seconds": sampled - trained,
        }
        print(f"{name}: C2ST {metrics[name]['C2ST']:.3f}", flush=True)
        save_figure(plot_corner(draws, exact, NAMES, TRUTH)[0, 0].figure, out / f"{name}.png")
    write_json(out / "metrics.json", metrics)
    groups = {
        "posterior": {name: draws.numpy()[None] for name, draws in learned.items()},
        "observed_data": {"x": x.numpy()},
    }
    build(groups).to_netcdf(out / "slcp.nc")
    print("\nwritten:", *sorted(str(path) for path in out.iterdir()))


if __name__ == "__main__":
    main()
