"""What is asked of densities of digits: baselines, quality of draws, codes, anomalies, rounding.

The digits are the 1797 images of 8 x 8 pixels and 17 levels that come with scikit-learn.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.kernel_approximation import Nystroem
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.mixture import GaussianMixture
from sklearn.model_selection import GridSearchCV, train_test_split
from sklearn.neighbors import NearestNeighbors
from sklearn.pipeline import make_pipeline
from torch import Tensor

from pyroflows.distributions import Dequantized, dequantize, image_levels
from pyroflows.transforms import FlowTransform, Logit, Permutation

SHAPE = (1, 8, 8)
NUM_ENTRIES = math.prod(SHAPE)
NUM_LEVELS = 17
TEST_FRACTION = 0.2
VALIDATION_FRACTION = 0.1
NUM_NOISE_DRAWS = 5  # for each test image: the bound on its bits is random
NUM_NEIGHBOURS = 3
NUM_LANDMARKS = 400  # images that the classifier compares others with
CLASSIFIERS = {"nystroem__gamma": [5e-4, 1e-3, 2e-3], "logisticregression__C": [1e2, 1e3, 1e4]}
RIDGE = 0.01  # of the variance, added to that of each component: without it, mixtures overfit

MIXTURES = [
    *itertools.product(["full"], [1, 5, 10, 20]),
    *itertools.product(["diag"], [10, 40, 80]),
]
SPACES: dict[str, FlowTransform] = {
    "pixels": Permutation(list(range(NUM_ENTRIES))),
    "logits": Logit(NUM_ENTRIES),
}


@dataclass(frozen=True)
class Digits:
    """Hold levels ``(N, 1, 8, 8)`` and the digits they show ``(N,)``, to train on and to test."""

    train: Tensor
    train_labels: Tensor
    test: Tensor
    test_labels: Tensor

    def without(self, digit: int) -> Digits:
        """Leave out the images of a digit."""
        train, test = self.train_labels != digit, self.test_labels != digit
        return Digits(
            self.train[train], self.train_labels[train], self.test[test], self.test_labels[test]
        )


def load(seed: int, device: str) -> Digits:
    """Set a fifth of each digit's images aside as a test."""
    data = load_digits()
    levels = image_levels(data.images, NUM_LEVELS).to(device)
    labels = torch.as_tensor(data.target, device=device)
    train, test = train_test_split(
        np.arange(len(labels)), test_size=TEST_FRACTION, stratify=data.target, random_state=seed
    )
    return Digits(levels[train], labels[train], levels[test], labels[test])


def flat(levels: Tensor) -> np.ndarray:
    """Return images as rows ``(N, 64)``."""
    return levels.flatten(1).float().cpu().numpy()


@torch.no_grad()
def bits(density: Dequantized, levels: Tensor, context: Tensor | None = None) -> Tensor:
    """Return the bound on the bits per pixel of each image, averaged over draws of the noise."""
    draws = [density.bits_per_dim(levels, context=context) for _ in range(NUM_NOISE_DRAWS)]
    return torch.stack(draws).mean(0)


class Mixture:
    """Give levels the probability that a mixture of normal distributions gives their cells.

    It lives in the space of the pixels, or in that of their logits, as the flows do.
    """

    def __init__(self, mixture: GaussianMixture, space: FlowTransform) -> None:
        self.mixture = mixture
        self.space = space

    def bits(self, levels: Tensor) -> np.ndarray:
        """Return the bound on the bits per pixel of each image."""
        y, log_det = continuous(levels, self.space)
        nats = -self.mixture.score_samples(y.numpy()) - log_det.numpy()
        return nats / (NUM_ENTRIES * math.log(2)) + math.log2(NUM_LEVELS)

    def sample(self, num_draws: int) -> Tensor:
        """Draw levels."""
        y = torch.as_tensor(self.mixture.sample(num_draws)[0])
        x, _ = self.space.inverse_and_log_det(y)
        levels = (NUM_LEVELS * x).floor().clamp(0, NUM_LEVELS - 1)
        return levels.unflatten(1, SHAPE).float()

    @property
    def num_parameters(self) -> int:
        """Return the number of free weights, means and covariances."""
        count = self.mixture.n_components
        shape = {"full": NUM_ENTRIES * (NUM_ENTRIES + 1) // 2, "diag": NUM_ENTRIES}
        return count * (1 + NUM_ENTRIES + shape[self.mixture.covariance_type]) - 1


def continuous(levels: Tensor, space: FlowTransform) -> tuple[Tensor, Tensor]:
    """Return dequantized images as rows ``(N, 64)`` of a space, and its log-determinants."""
    return space.forward_and_log_det(dequantize(levels.cpu().double().flatten(1), NUM_LEVELS))


def fit_mixtures(levels: Tensor, space: str, seed: int) -> list[Mixture]:
    """Fit mixtures of several sizes; return the single normal one, and the best by validation."""
    held_out = round(VALIDATION_FRACTION * len(levels))
    y, _ = continuous(levels, SPACES[space])
    training, validation = y[held_out:], y[:held_out]
    fits = [
        GaussianMixture(
            size, covariance_type=kind, reg_covar=RIDGE * y.var().item(), random_state=seed
        ).fit(training)
        for kind, size in MIXTURES
    ]
    best = max(fits, key=lambda fit: fit.score(validation))
    return [Mixture(fit, SPACES[space]) for fit in (fits[0], best)]


def fit_classifier(digits: Digits) -> GridSearchCV:
    """Fit a kernel logistic regression to the training images.

    The width of its kernel and its penalty are those of the least log loss in five-fold
    cross-validation, for what is asked of it are probabilities. It never sees a draw.
    """
    classifier = make_pipeline(
        Nystroem(n_components=NUM_LANDMARKS, random_state=0), LogisticRegression(max_iter=1000)
    )
    search = GridSearchCV(classifier, CLASSIFIERS, scoring="neg_log_loss")
    return search.fit(flat(digits.train), digits.train_labels.cpu())


class Judge:
    """Look at drawn images through a classifier of real ones, and next to the real test images.

    Precision is the share of draws within reach of a real image, its distance to its third-nearest
    neighbour; recall the share of real images within reach of a draw: diversity. [1]

    [1] T. Kynkäänniemi, T. Karras, S. Laine, J. Lehtinen, T. Aila. Improved precision and recall
        metric for assessing generative models. arXiv:1904.06991, 2019.
    """

    def __init__(self, digits: Digits) -> None:
        self.classifier = fit_classifier(digits)
        self.real = flat(digits.test)
        self.labels = digits.test_labels.cpu().numpy()

    def confidence(self, levels: Tensor) -> float:
        """Return the mean probability of the likeliest digit."""
        return float(self.classifier.predict_proba(flat(levels)).max(1).mean())

    def accuracy(self, levels: Tensor, labels: Tensor) -> float:
        """Return the share of images that are taken for the digits they should show."""
        return float((self.classifier.predict(flat(levels)) == labels.cpu().numpy()).mean())

    def __call__(self, levels: Tensor) -> dict[str, float]:
        """Return the confidence, the precision and the recall of as many draws as test images."""
        drawn = flat(levels[: len(self.real)])
        return {
            "confidence": self.confidence(levels),
            "precision": covered(drawn, self.real),
            "recall": covered(self.real, drawn),
        }


def covered(points: np.ndarray, centres: np.ndarray) -> float:
    """Return the share of points closer to a centre than its third-nearest fellow centre."""
    neighbours = NearestNeighbors(n_neighbors=NUM_NEIGHBOURS + 1).fit(centres)
    radius = neighbours.kneighbors(centres)[0][:, -1]  # the nearest is the centre itself
    distance = np.linalg.norm(points[:, np.newaxis] - centres, axis=-1)
    return float((distance <= radius).any(1).mean())


def encode(density: Dequantized, levels: Tensor) -> Tensor:
    """Return latent codes of images, with fresh noise."""
    return density.flow.transform.inverse_and_log_det(density.logits(levels)[0])[0]


def decode(density: Dequantized, codes: Tensor) -> Tensor:
    """Return the images of latent codes as numbers around [0, 1]."""
    y, _ = density.flow.transform.forward_and_log_det(codes)
    return density.logit.inverse_and_log_det(y)[0]


@torch.no_grad()
def interpolate(density: Dequantized, corners: Tensor, num_angles: int = 8) -> Tensor:
    r"""Return images ``(num_angles, num_angles, 1, 8, 8)`` between four ``(4, 1, 8, 8)``.

    .. math:: z = \cos\phi \, (z_1 \cos\phi' + z_2 \sin\phi')
        + \sin\phi \, (z_3 \cos\phi' + z_4 \sin\phi')

    with both angles from 0 to a right angle: sums of squares of the weights are one, so that codes
    stay where a normal distribution has its mass.
    """
    angles = torch.linspace(0, math.pi / 2, num_angles, device=corners.device)
    turn = torch.stack([angles.cos(), angles.sin()])
    weights = torch.einsum("ai,bj->ijab", turn, turn).flatten(2)
    codes = encode(density, corners)
    return decode(density, torch.tensordot(weights.to(codes), codes, 1))


def strangers(digits: Digits) -> dict[str, Tensor]:
    """Return images that are no scanned digits, as many as test images."""
    test = digits.test
    return {
        "noise": torch.randint_like(test, NUM_LEVELS),
        "inverted": NUM_LEVELS - 1 - test,
        "blank": torch.zeros_like(test),
    }


@torch.no_grad()
def reconstruction_errors(density: Dequantized, digits: Digits) -> dict[str, float]:
    """Return the largest error of a pixel, in levels, after the way to the codes and back."""
    errors = {}
    for name, levels in {"training data": digits.train, **strangers(digits)}.items():
        y, _ = density.logits(levels)
        z, _ = density.flow.transform.inverse_and_log_det(y)
        error = decode(density, z) - density.logit.inverse_and_log_det(y)[0]
        errors[name] = NUM_LEVELS * error.abs().max().item()
    return errors


def detect(
    density: Dequantized, normal: Tensor, validation: Tensor, abnormal: Mapping[str, Tensor]
) -> tuple[dict[str, dict[str, float]], dict[str, np.ndarray]]:
    """Tell abnormal images from normal ones by their bits, and by how unusual their bits are.

    Returns the areas under the ROC curve of both scores by kind of abnormal image: 0.5 is chance,
    below it abnormal images look more normal than normal ones. Then the bits of all.
    """
    typical = bits(density, validation).mean().item()
    found = {"normal": bits(density, normal).cpu().numpy()}
    areas = {}
    for name, levels in abnormal.items():
        found[name] = bits(density, levels).cpu().numpy()
        both = np.concatenate([found["normal"], found[name]])
        truth = np.repeat([0, 1], [len(found["normal"]), len(found[name])])
        areas[name] = {
            "likelihood": float(roc_auc_score(truth, both)),
            "typicality": float(roc_auc_score(truth, np.abs(both - typical))),
        }
    return areas, found
