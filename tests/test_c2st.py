"""Classifier two-sample test against its definition and against known overlaps."""

import math

import numpy as np
import pytest
import torch
from sklearn.model_selection import KFold, cross_val_score
from sklearn.neural_network import MLPClassifier
from torch import Tensor

from pyroflows.diagnostics import c2st


def normal(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.mark.parametrize("seed", [1, 2])
def test_follows_the_definition_of_the_benchmark(seed: int) -> None:
    a, b = 3 * normal(500, 2, seed=0) + 5, 2 * normal(500, 2, seed=1) + 8
    features = torch.cat([(a - a.mean(0)) / a.std(0), (b - a.mean(0)) / a.std(0)]).numpy()
    network = MLPClassifier(
        activation="relu",
        hidden_layer_sizes=(20, 20),
        max_iter=10000,
        solver="adam",
        random_state=seed,
    )
    scores = cross_val_score(
        network,
        features,
        np.concatenate([np.zeros(500), np.ones(500)]),
        cv=KFold(n_splits=5, shuffle=True, random_state=seed),
        scoring="accuracy",
    )
    assert c2st(a, b, seed=seed) == pytest.approx(scores.mean(), abs=1e-12)


def test_equal_distributions_score_one_half() -> None:
    """Fails by chance once in 16 000 runs with fresh seeds: four standard deviations."""
    score = c2st(normal(1_000, 1, seed=0), normal(1_000, 1, seed=1))
    assert abs(score - 0.5) < 4 / math.sqrt(8 * 1_000)


@pytest.mark.parametrize("shift", [1.0, 2.0])
def test_shifted_normals_score_the_best_possible_accuracy(shift: float) -> None:
    """Fails by chance once in 16 000 runs with fresh seeds, beyond a learner's loss of 0.01."""
    size = 1_000
    best = (1 + math.erf(shift / 2 / math.sqrt(2))) / 2
    score = c2st(normal(size, 1, seed=0), shift + normal(size, 1, seed=1))
    deviation = math.sqrt(best * (1 - best) / (2 * size))
    assert -4 * deviation - 0.01 < score - best < 4 * deviation


def test_disjoint_sets_score_one() -> None:
    assert c2st(normal(100, 3, seed=0), 100 + normal(100, 3, seed=1)) == 1.0


def test_is_deterministic_and_leaves_random_states_alone() -> None:
    a, b = normal(500, 2, seed=0), 1 + normal(500, 2, seed=1)
    state = torch.get_rng_state()
    numpy_state = np.random.get_state()[1].copy()  # noqa: NPY002
    assert c2st(a, b) == c2st(a, b)
    assert torch.equal(torch.get_rng_state(), state)
    np.testing.assert_array_equal(np.random.get_state()[1], numpy_state)  # noqa: NPY002


def test_units_do_not_matter() -> None:
    a, b = normal(500, 2, seed=0), 1 + normal(500, 2, seed=1)
    units = torch.tensor([2.0**20, 2.0**-20])
    assert c2st(a * units, b * units) == c2st(a, b)


@pytest.mark.parametrize("dtypes", [("float16", "float32"), ("bfloat16",) * 2, ("float64",) * 2])
def test_takes_any_precision(dtypes: tuple[str, str]) -> None:
    a, b = (normal(50, 1, seed=i).to(getattr(torch, dtype)) for i, dtype in enumerate(dtypes))
    assert 0 < c2st(a, b + 10) <= 1


@pytest.mark.slow
def test_folds_run_in_parallel_with_the_same_result() -> None:
    import joblib

    a, b = normal(500, 2, seed=0), 1 + normal(500, 2, seed=1)
    with joblib.parallel_config(n_jobs=2):
        parallel = c2st(a, b)
    assert parallel == c2st(a, b)


GOOD = normal(20, 2, seed=0)


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        (GOOD, GOOD[:, :1], r"b must have shape \(20, 2"),
        (GOOD, GOOD[:15], r"b must have shape \(20, 2"),
        (GOOD[:, 0], GOOD, "a must have shape"),
        (GOOD.unsqueeze(0), GOOD.unsqueeze(0), "a must have shape"),
        (GOOD[:0], GOOD[:0], "a must have shape"),
        (GOOD[:9], GOOD[:9], "at least 2 [*] num_folds = 10 rows, got 9"),
        (GOOD.where(GOOD < 1, math.nan), GOOD, "a must not hold NaN"),
        (GOOD, GOOD.where(GOOD < 1, math.inf), "b must be finite"),
        (GOOD * torch.tensor([1.0, 0.0]), GOOD, r"a must vary in every column.*\[1\]"),
    ],
)
def test_rejects_bad_draws(a: Tensor, b: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        c2st(a, b)


def test_rejects_wrong_types_and_folds() -> None:
    with pytest.raises(TypeError, match=r"a must be a torch.Tensor, got ndarray"):
        c2st(GOOD.numpy(), GOOD)
    with pytest.raises(TypeError, match="b must be of a floating-point dtype"):
        c2st(GOOD, GOOD.long())
    with pytest.raises(ValueError, match="num_folds must be at least 2, got 1"):
        c2st(GOOD, GOOD, num_folds=1)
