"""Fits guides to posteriors whose evidence is known, and says how far off they are.

The gap is how far the ELBO lies below the log evidence: the Kullback-Leibler divergence of the
guide from the posterior, in nats. Moments are compared before and after importance resampling,
marginals with reference draws where there are some. Guides of Pyro get as much wall time, for each
target and seed, as the first guide of this package took; a gap is infinite where their parameters
become NaN. Run it from the root of the repository:

    PYROFLOWS_REFERENCE_DIR=... python -m tests.benchmarks.posteriors --targets funnel --seeds 5
"""

import argparse
import math
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial

import pandas as pd
import pyro
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormalizingFlow
from pyro.infer.autoguide.initialization import init_to_feasible
from scipy.stats import wasserstein_distance
from torch import Tensor

import pyroflows as pf
from pyroflows.svi.density import ModelDensity
from tests.reference import exact, posteriordb
from tests.reference.exact import Moment

PEER_PARTICLES = 64
PEER_STEPS = 3000  # the schedule's length; the wall time ends it earlier
NUM_DRAWS = 10_000
NUM_SETS = 10
FAILURES = (FloatingPointError, RuntimeError, ValueError)


@dataclass(frozen=True)
class Target:
    """Hold a model with its log evidence, and moments or draws to compare with."""

    model: Callable
    args: tuple
    log_evidence: float
    moments: Mapping[str, Moment] = field(default_factory=dict)
    draws: Mapping[str, Tensor] = field(default_factory=dict)
    options: Mapping[str, float] = field(default_factory=dict)  # of pf.fit


def _exact(build: Callable[[], exact.ExactTarget], **options: float) -> Target:
    target = build()
    return Target(target.model, target.args, target.log_evidence, target.moments, options=options)


def _sampled(name: str) -> Target:
    target = posteriordb.load(name)
    return Target(target.model, target.args, target.log_evidence, draws=target.draws)


TARGETS: dict[str, Callable[[], Target]] = {
    "funnel": partial(_exact, exact.funnel),
    "banana": partial(_exact, exact.banana),
    "ill_conditioned": partial(_exact, exact.ill_conditioned_gaussian),
    "many_well": partial(_exact, exact.many_well, initial_temperature=10.0),
    "brownian": partial(_exact, exact.brownian_motion),
    **{name: partial(_sampled, name) for name in posteriordb.names()},
}


def fit_ours(kind: Callable, target: Target, seed: int, seconds: float) -> pf.VariationalPosterior:
    """Fit a guide by the one call a user makes."""
    guide = kind(target.model)
    return pf.fit(target.model, guide, target.args, seed=seed, progress=False, **target.options)


def fit_pyro(kind: Callable, target: Target, seed: int, seconds: float) -> pf.VariationalPosterior:
    """Fit a guide of Pyro by its own SVI, for a given time."""
    pyro.clear_param_store()
    pyro.set_rng_seed(seed)
    guide = kind(target.model)
    decay = 0.1 ** (1 / PEER_STEPS)
    svi = SVI(
        target.model,
        guide,
        pyro.optim.ClippedAdam({"lr": 5e-3, "lrd": decay}),
        Trace_ELBO(num_particles=PEER_PARTICLES, vectorize_particles=True),
    )
    start, losses = time.perf_counter(), []
    while time.perf_counter() - start < seconds:
        losses.append(svi.step(*target.args))
    density = ModelDensity(target.model, guide, target.args)
    return pf.VariationalPosterior.from_guide(density, torch.tensor(losses), NUM_DRAWS, seed)


def _pyro_flow(model: Callable) -> AutoNormalizingFlow:
    from pyro.distributions.transforms import iterated, spline_coupling

    return AutoNormalizingFlow(model, partial(iterated, 4, spline_coupling))


GUIDES: dict[str, Callable[..., pf.VariationalPosterior]] = {
    "AutoSpline": partial(fit_ours, pf.AutoSpline),
    "AutoRealNVP": partial(fit_ours, pf.AutoRealNVP),
    "AutoIAF": partial(fit_ours, pf.AutoIAF),
    "Pyro AutoNormalizingFlow": partial(fit_pyro, _pyro_flow),
    "Pyro AutoMultivariateNormal": partial(
        fit_pyro, partial(AutoMultivariateNormal, init_loc_fn=init_to_feasible)
    ),
}


def moment_errors(moments: Mapping[str, Moment], draws: Mapping[str, Tensor]) -> Iterator[float]:
    """Yield errors of means, in standard deviations, and relative ones of these."""
    for moment in moments.values():
        values = moment.statistic(draws).double()
        sd = torch.as_tensor(moment.standard_deviation, dtype=torch.float64)
        yield float(((values.mean(0) - moment.mean) / sd).abs().max())
        yield float((values.std(0) / sd - 1).abs().max())


def marginal_errors(
    reference: Mapping[str, Tensor], draws: Mapping[str, Tensor]
) -> dict[str, float]:
    """Return the worst Wasserstein distance of a marginal, and errors of mean and deviation."""
    errors: dict[str, list[float]] = {"W1 / sd": [], "mean": [], "sd": []}
    for name, truth in reference.items():
        if name not in draws:
            continue
        truth = truth.flatten(1).double() if truth.dim() > 1 else truth.double().unsqueeze(-1)
        ours = draws[name].double().reshape(len(draws[name]), -1)
        sd = truth.std(0)
        for a, b, scale in zip(truth.unbind(-1), ours.unbind(-1), sd):
            errors["W1 / sd"].append(wasserstein_distance(a.numpy(), b.numpy()) / float(scale))
        errors["mean"].append(float(((ours.mean(0) - truth.mean(0)) / sd).abs().max()))
        errors["sd"].append(float((ours.std(0) / sd - 1).abs().max()))
    return {key: max(values) for key, values in errors.items()}


def mean_khat(result: pf.VariationalPosterior) -> float:
    """Return the mean over sets of draws: that of one set scatters by a tenth or two."""
    sets = (
        pf.VariationalPosterior.from_guide(result.density, result.losses, NUM_DRAWS, seed)
        for seed in range(100, 100 + NUM_SETS)
    )
    return sum(one.khat for one in sets) / NUM_SETS


def compare(target: Target, result: pf.VariationalPosterior) -> dict[str, float]:
    """Return how far a fitted guide is from what is known of its target."""
    row = {
        "gap": target.log_evidence - result.elbo,
        "+-": result.elbo_standard_error,
        "k-hat": result.khat,
        "mean k-hat": mean_khat(result),
        "evidence error": result.log_evidence - target.log_evidence,
        "steps": len(result.losses),
    }
    for title, resample in (("", False), (" resampled", True)):
        draws = result.sample(NUM_DRAWS, resample=resample, seed=1)
        if target.moments:
            row[f"moments{title}"] = max(moment_errors(target.moments, draws))
        if target.draws:
            errors = marginal_errors(target.draws, draws)
            row[f"moments{title}"] = max(errors["mean"], errors["sd"])
            row[f"W1 / sd{title}"] = errors["W1 / sd"]
    return row


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks.posteriors",
        description=__doc__.split("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--targets", nargs="+", choices=TARGETS, default=[*TARGETS], help="targets")
    add("--guides", nargs="+", choices=GUIDES, default=["AutoSpline"], help="guides")
    add("--seeds", type=int, default=5, help="number of seeds")
    add("--threads", type=int, default=2, help="threads of torch")
    add("--csv", help="file for the table")
    return parser.parse_args()


def main() -> None:
    """Run the benchmark and print its tables."""
    arguments = parse()
    torch.set_num_threads(arguments.threads)
    rows: list[dict] = []
    for name in arguments.targets:
        target = TARGETS[name]()
        for seed in range(arguments.seeds):
            seconds = 0.0
            for guide in arguments.guides:
                start = time.perf_counter()
                errors = {"gap": math.inf}  # of guides whose parameters become NaN
                try:
                    with warnings.catch_warnings():
                        warnings.simplefilter("ignore")
                        result = GUIDES[guide](target, seed, seconds)
                    taken = time.perf_counter() - start
                    errors = {**compare(target, result), "s": taken}
                    seconds = seconds or taken
                except FAILURES as error:
                    print(f"{guide} failed: {str(error).splitlines()[:1]}", flush=True)
                rows.append({"target": name, "guide": guide, "seed": seed, **errors})
                print(pd.DataFrame(rows[-1:]).round(4).to_string(header=seed == 0), flush=True)
    table = pd.DataFrame(rows)
    if arguments.csv:
        table.to_csv(arguments.csv, index=False)
    worst = table.drop(columns="seed").groupby(["target", "guide"], sort=False).max()
    median = table.groupby(["target", "guide"], sort=False)["k-hat"].median()
    print(f"\nworst seed:\n{worst.assign(**{'median k-hat': median}).round(4).to_string()}")


if __name__ == "__main__":
    main()
