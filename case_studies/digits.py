"""Handwritten digits: six flows of small images, and what each of them is good for.

The data are 1797 scanned digits of 8 x 8 pixels and 17 levels; a fifth of them is the test. Levels
are spread over the unit interval by noise [1], so that a density of their logits bounds the bits
that an image takes when coded by it. The architectures are those of NICE [2], RealNVP [3], Glow
[4], neural spline flows [5], residual flows [6] and FFJORD [7]; each is trained by one call of
`fit`, which keeps the weights that were best for images held out. They are compared with normal
distributions, and with mixtures of them of sizes chosen by validation, in the space of pixels and
in that of logits, where flows live. Mixtures do far better there: that is the one to beat.

Draws are shown at the temperatures of Glow's figure: cold ones are nearer to real images
(precision), and more alike (recall). Many are strokes that belong to no digit, and a classifier of
real digits is less sure of them, at any temperature: a flow is one connected cloud. A flow that is
told the digit has ten, its draws look like what was asked for, the classifier is at least as sure
of them as of real images, and Bayes' rule makes it a classifier itself. Codes of four images are
joined along circles, as for RealNVP.

What to look at, besides the bits: likelihood is a poor judge of what does not belong. Noise and
inverted digits stand out, but a blank image takes fewer bits than most digits [8], and ones, where
they were left out of the training, take as few as the digits that were not. An area under the ROC
curve (AUROC) of 0.5 is chance. Asking how unusual the bits are, either way [9], helps with some of
this and harms elsewhere. Then the rounding errors of single precision, in levels: the way to the
codes and back should leave no trace, nor on noise, though inverses can explode on what is far from
the data [10]. This takes bounded networks: without tanh, Glow and RealNVP stretch noise until it is
lost in rounding; and the solver of the continuous flow has to be told to take care.

Last, all bits are bounds. Noise that is learned along with the flow [11] takes about 0.02 bits a
pixel off; averaging the probability of an image over twenty draws of the noise, instead of its
logarithm, takes 0.06 off with either noise.

[1] L. Theis, A. van den Oord, M. Bethge. A note on the evaluation of generative models.
    arXiv:1511.01844, 2015.
[2] L. Dinh, D. Krueger, Y. Bengio. NICE: Non-linear independent components estimation.
    arXiv:1410.8516, 2014.
[3] L. Dinh, J. Sohl-Dickstein, S. Bengio. Density estimation using Real NVP. arXiv:1605.08803,
    2016.
[4] D. P. Kingma, P. Dhariwal. Glow: Generative flow with invertible 1x1 convolutions.
    arXiv:1807.03039, 2018.
[5] C. Durkan, A. Bekasov, I. Murray, G. Papamakarios. Neural spline flows. arXiv:1906.04032, 2019.
[6] R. T. Q. Chen, J. Behrmann, D. Duvenaud, J.-H. Jacobsen. Residual flows for invertible
    generative modeling. arXiv:1906.02735, 2019.
[7] W. Grathwohl, R. T. Q. Chen, J. Bettencourt, I. Sutskever, D. Duvenaud. FFJORD: Free-form
    continuous dynamics for scalable reversible generative models. arXiv:1810.01367, 2018.
[8] E. Nalisnick, A. Matsukawa, Y. W. Teh, D. Gorur, B. Lakshminarayanan. Do deep generative models
    know what they don't know? arXiv:1810.09136, 2018.
[9] E. Nalisnick, A. Matsukawa, Y. W. Teh, B. Lakshminarayanan. Detecting out-of-distribution inputs
    to deep generative models using typicality. arXiv:1906.02994, 2019.
[10] J. Behrmann, P. Vicol, K.-C. Wang, R. Grosse, J.-H. Jacobsen. Understanding and mitigating
    exploding inverses in invertible neural networks. arXiv:2006.09347, 2020.
[11] J. Ho, X. Chen, A. Srinivas, Y. Duan, P. Abbeel. Flow++: Improving flow-based generative models
    with variational dequantization and architecture design. arXiv:1902.00275, 2019.
"""

from __future__ import annotations

import math
import time
from argparse import Namespace
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pyroflows as pf
from pyroflows.distributions import Dequantized

from .command_line import parse, write_json
from .digits_experiments import (
    NUM_ENTRIES,
    NUM_LEVELS,
    SHAPE,
    VALIDATION_FRACTION,
    Digits,
    Judge,
    bits,
    detect,
    fit_mixtures,
    interpolate,
    load,
    reconstruction_errors,
    strangers,
)
from .digits_pictures import draw_anomalies, draw_comparison, draw_grid, draw_temperatures

TEMPERATURES = [0.0, 0.25, 0.6, 0.7, 0.8, 0.9, 1.0]
TEMPERATURE = 0.7  # of draws that are judged
NUM_CLASSES = 10
NUM_DRAWS = 1000
NUM_WEIGHTED_DRAWS = 20  # of the noise, for a tighter bound on the bits
LEFT_OUT = [1, 4, 8]


@dataclass(frozen=True)
class Recipe:
    """Hold the options of a flow and the learning rate of its fit."""

    options: dict[str, Any] = field(default_factory=dict)
    learning_rate: float = 2e-3


RECIPES = {
    "nice": Recipe({"num_layers": 8, "hidden_dims": (256,), "activation": nn.SiLU}),
    "realnvp": Recipe({"hidden_dims": (128,)}),  # networks without a bound lose noise to overflow
    "glow": Recipe({"num_layers": 4, "width": 32, "activation": nn.Tanh}, learning_rate=5e-3),
    "spline_coupling": Recipe(),
    "residual": Recipe({"hidden_dims": (128,)}, learning_rate=5e-3),
    "cnf": Recipe({"hidden_dims": (128, 128), "rtol": 1e-6, "atol": 1e-7}, learning_rate=5e-3),
}
NUM_STEPS = 500
BATCH_SIZE = 256
WEIGHT_DECAY = 0.3  # strong, for there are few images
FAST_FLOWS = ["realnvp", "spline_coupling"]
FAST_STEPS = 150
FAVOURITE = "spline_coupling"  # for what one flow does: a class, a digit left out, its own noise
NOISE = {"num_layers": 2, "hidden_dims": (32,)}


@dataclass(frozen=True)
class Fitted:
    """Hold a density and its fit."""

    density: Dequantized
    fit: pf.distributions.DensityFit


def fit(
    name: str,
    images: Tensor,
    labels: Tensor | None = None,
    learned_noise: bool = False,
    fast: bool = False,
    seed: int = 0,
) -> Fitted:
    """Fit a flow to images ``(N, 1, 8, 8)``, or to images given their digits ``(N,)``."""
    recipe = RECIPES[name]
    torch.manual_seed(seed)
    context = None if labels is None else one_hot(labels)
    context_dim = 0 if labels is None else NUM_CLASSES
    transform = pf.flow(name, SHAPE, context_dim, **recipe.options)
    # Maximum likelihood takes inverse passes.
    flow = pf.Flow(None, transform if pf.flows.spec(name).fast_inverse else transform.inv)
    noise = pf.flow("realnvp", SHAPE, NUM_ENTRIES, **NOISE) if learned_noise else None
    density = Dequantized(flow, NUM_LEVELS, noise=noise).to(images.device)
    result = density.fit(
        images,
        context,
        num_steps=FAST_STEPS if fast else NUM_STEPS,
        batch_size=BATCH_SIZE,
        learning_rate=recipe.learning_rate,
        weight_decay=WEIGHT_DECAY,
        validation_fraction=VALIDATION_FRACTION,
        seed=seed,
    )
    return Fitted(density, result)


def one_hot(labels: Tensor) -> Tensor:
    """Return digits as contexts ``(N, 10)``."""
    return F.one_hot(labels, NUM_CLASSES).float()


def measure(fitted: Fitted, digits: Digits, judge: Judge) -> dict[str, float]:
    """Return a row of the table of comparison."""
    density = fitted.density
    test = bits(density, digits.test)
    with torch.no_grad():
        tighter = density.bits_per_dim(digits.test, num_draws=NUM_WEIGHTED_DRAWS)
    start = time.perf_counter()
    density.sample((NUM_DRAWS,))
    seconds = time.perf_counter() - start
    return {
        "bits per dim": test.mean().item(),
        "standard error": test.std().item() / len(test) ** 0.5,
        f"by {NUM_WEIGHTED_DRAWS} draws of noise": tighter.mean().item(),
        "train bits per dim": bits(density, digits.train).mean().item(),
        "parameters": sum(p.numel() for p in density.parameters()),
        "training, s": fitted.fit.seconds,
        "a step, ms": 1e3 * fitted.fit.seconds / fitted.fit.num_steps,
        "1000 draws, ms": 1e3 * seconds,
        **judge(density.temper(TEMPERATURE).sample((NUM_DRAWS,))),
        "recall at T = 1": judge(density.sample((NUM_DRAWS,)))["recall"],
    }


def measure_baselines(digits: Digits, judge: Judge, seed: int) -> dict[str, dict[str, float]]:
    """Return rows of the table for normal distributions and mixtures, in pixels and in logits."""
    real = {**judge(digits.train), "confidence": judge.confidence(digits.test)}
    rows: dict[str, dict[str, float]] = {"real images": real}
    for space in ("pixels", "logits"):
        normal, best = fit_mixtures(digits.train, space, seed)
        for name, mixture in (("normal", normal), ("mixture", best)):
            drawn = judge(mixture.sample(NUM_DRAWS))
            rows[f"{name}, {space}"] = {
                "bits per dim": float(mixture.bits(digits.test).mean()),
                "train bits per dim": float(mixture.bits(digits.train).mean()),
                "parameters": mixture.num_parameters,
                "confidence": drawn["confidence"],
                "recall at T = 1": drawn["recall"],
            }
    return rows


def draw_classes(digits: Digits, judge: Judge, options: Namespace) -> dict[str, float]:
    """Fit a flow that is told the digit; draw each digit, and tell digits by Bayes' rule."""
    density = fit(
        FAVOURITE, digits.train, digits.train_labels, fast=options.fast, seed=options.seed
    ).density
    classes = torch.arange(NUM_CLASSES, device=digits.train.device)
    cool = density.condition(one_hot(classes)).temper(TEMPERATURE)
    drawn = cool.sample((NUM_DRAWS // NUM_CLASSES,))
    draw_grid(drawn[:NUM_CLASSES].transpose(0, 1), options.out / "classes.png")
    contexts = one_hot(classes).unsqueeze(1).expand(-1, len(digits.test), -1)
    lengths = torch.stack([bits(density, digits.test, context) for context in contexts])
    nats = lengths * NUM_ENTRIES * math.log(2)
    summed = nats.new_tensor(NUM_CLASSES).log() - (-nats).logsumexp(0)
    correct = lengths.argmin(0) == digits.test_labels
    mixed = drawn.flatten(0, 1)
    return {
        "bits per dim": bits(density, digits.test, one_hot(digits.test_labels)).mean().item(),
        "bits per dim, digits summed out": summed.mean().item() / (NUM_ENTRIES * math.log(2)),
        "accuracy by Bayes' rule": correct.float().mean().item(),
        "draws of the digit asked for": judge.accuracy(mixed, classes.repeat(len(drawn))),
        **judge(mixed),
    }


def leave_out(digit: int, digits: Digits, options: Namespace) -> tuple[dict, dict[str, np.ndarray]]:
    """Fit a flow to all digits but one; return how well it tells what does not belong."""
    rest = digits.without(digit)
    held_out = round(VALIDATION_FRACTION * len(rest.train))
    density = fit(FAVOURITE, rest.train[held_out:], fast=options.fast, seed=options.seed).density
    missing = digits.test[digits.test_labels == digit]
    abnormal = {"left out": missing, **strangers(rest)}
    return detect(density, rest.test, rest.train[:held_out], abnormal)


def draw_samples(models: dict[str, Fitted], judge: Judge, seed: int, out: Path) -> dict:
    """Draw from each flow at all temperatures, from the same codes; return what they look like."""
    pictures, quality = {}, {}
    for name, fitted in models.items():
        draws = []
        for temperature in TEMPERATURES:
            torch.manual_seed(seed)
            draws.append(fitted.density.temper(temperature).sample((NUM_DRAWS,)))
        pictures[name] = torch.stack(draws)
        quality[name] = {str(t): judge(drawn) for t, drawn in zip(TEMPERATURES, draws)}
    draw_temperatures(pictures, TEMPERATURES, out / "temperatures.png")
    return quality


def main() -> None:
    """Fit the flows, print the tables, write the files."""
    options = parse("digits", __doc__, flows=RECIPES)
    names = options.flows or (FAST_FLOWS if options.fast else list(RECIPES))
    digits = load(options.seed, options.device)
    judge = Judge(digits)

    rows = measure_baselines(digits, judge, options.seed)
    models = {}
    for name in names:
        models[name] = fit(name, digits.train, fast=options.fast, seed=options.seed)
        rows[name] = measure(models[name], digits, judge)
        print(f"{name}: {rows[name]['bits per dim']:.3f} bits per dim", flush=True)
    noisy = fit(FAVOURITE, digits.train, learned_noise=True, fast=options.fast, seed=options.seed)
    rows[f"{FAVOURITE}, learned noise"] = measure(noisy, digits, judge)
    table = pd.DataFrame.from_dict(rows, orient="index")
    table.to_csv(options.out / "comparison.csv", index_label="density")
    draw_comparison(table, options.out / "comparison.png")
    print(f"\n{table.round(3).to_string()}")

    best = min(models, key=lambda name: models[name].fit.best_validation_loss)
    density = models[best].density
    corners = torch.stack([digits.test[digits.test_labels == d][0] for d in (0, 1, 4, 6)])
    draw_grid(interpolate(density, corners), options.out / "interpolation.png")
    quality = draw_samples(models, judge, options.seed, options.out)
    errors = {name: reconstruction_errors(m.density, digits) for name, m in models.items()}
    print("\nlargest error of a pixel after the way to the codes and back, in levels:")
    print(pd.DataFrame(errors).T.to_string(float_format="{:.1e}".format))
    classes = draw_classes(digits, judge, options)
    print("\ntold the digit:")
    print(pd.Series(classes).round(3).to_string())

    areas, found = {}, {}
    for digit in LEFT_OUT[:1] if options.fast else LEFT_OUT:
        areas[str(digit)], found[digit] = leave_out(digit, digits, options)
        print(f"\narea under the ROC curve, with {digit} left out of the training:")
        print(pd.DataFrame(areas[str(digit)]).T.round(3).to_string())
    draw_anomalies(found, options.out / "anomalies.png")
    metrics = {
        "comparison": rows,
        "best by validation": best,
        "by temperature": quality,
        "classes": classes,
        "reconstruction": errors,
        "anomalies": areas,
    }
    write_json(options.out / "metrics.json", metrics)

    dims = ["channel", "height", "width"]
    density.to_arviz(digits.test, name="digit", num_replicates=4, dims=dims).to_netcdf(
        options.out / "digits.nc"
    )
    print("\nwritten:", *sorted(str(path) for path in options.out.iterdir()))


if __name__ == "__main__":
    main()
