"""The case study of digits: its measures, against what is known, and its runs."""

import json
import math
import subprocess
import sys

import arviz as az
import numpy as np
import pyro.distributions as dist
import pytest
import torch
from sklearn.metrics import log_loss
from sklearn.mixture import GaussianMixture

import pyroflows as pf
from case_studies import digits
from case_studies.digits_experiments import (
    CLASSIFIERS,
    NUM_LEVELS,
    SHAPE,
    SPACES,
    Judge,
    Mixture,
    bits,
    covered,
    detect,
    fit_mixtures,
    flat,
    interpolate,
    load,
    reconstruction_errors,
    strangers,
)
from case_studies.digits_pictures import mosaic
from pyroflows.distributions import Dequantized
from pyroflows.transforms import ActNorm


@pytest.fixture(scope="module")
def data():
    return load(seed=0, device="cpu")


def untrained(name="spline_coupling"):
    torch.manual_seed(0)
    transform = pf.flow(name, SHAPE, **digits.RECIPES[name].options)
    return Dequantized(pf.Flow(None, transform), NUM_LEVELS)


def test_a_fifth_of_each_digit_is_set_aside(data):
    assert len(data.train) + len(data.test) == 1797
    shares = torch.bincount(data.test_labels) / (
        torch.bincount(data.train_labels) + torch.bincount(data.test_labels)
    )
    torch.testing.assert_close(shares, torch.full((10,), 0.2), rtol=0, atol=0.005)
    rest = data.without(3)
    assert 3 not in rest.train_labels
    assert len(rest.train) == len(data.train) - (data.train_labels == 3).sum()


def test_a_mixture_gives_the_bits_of_a_flow_with_the_same_base(data):
    torch.manual_seed(0)
    normal, _ = fit_mixtures(data.train[:400], "logits", seed=0)
    base = dist.MultivariateNormal(
        *(
            torch.as_tensor(v[0]).float()
            for v in (normal.mixture.means_, normal.mixture.covariances_)
        )
    )
    flow = Dequantized(pf.Flow(base, ActNorm(64, initialized=True)), NUM_LEVELS)
    levels = data.test.flatten(1)
    found, expected = normal.bits(data.test), bits(flow, levels).numpy()
    # The same images with other noise; five standard errors: false alarms below one in a million.
    error = 5 * (found - expected).std() / math.sqrt(len(levels))
    assert found.mean() == pytest.approx(expected.mean(), abs=error)
    assert error < 0.05


def test_even_levels_take_their_logarithm_by_a_mixture_of_pixels():
    """A normal distribution of the mean and the variance of a uniform one: its cross-entropy."""
    torch.manual_seed(0)
    levels = torch.randint(NUM_LEVELS, (4000, *SHAPE))
    rows = torch.rand(4000, 64).double().numpy()
    mixture = Mixture(GaussianMixture(1, covariance_type="diag").fit(rows), SPACES["pixels"])
    excess = 0.5 * math.log2(2 * math.pi * math.e / 12)  # over a uniform density
    # 256 000 pixels, and 128 parameters fitted to as many others: five standard errors of .64
    # bits a pixel are .006.
    assert mixture.bits(levels).mean() == pytest.approx(math.log2(NUM_LEVELS) + excess, abs=0.007)
    drawn = mixture.sample(100)
    assert drawn.shape == (100, *SHAPE)
    assert (drawn == drawn.floor()).all()
    assert 0 <= drawn.min() < drawn.max() <= NUM_LEVELS - 1


def test_points_within_reach_are_covered():
    centres = np.arange(10.0)[:, np.newaxis]  # third neighbours are 2 away, 3 at the ends
    points = np.array([[4.5], [-2.9], [-3.1], [12.1]])
    assert covered(points, centres) == 0.5
    assert covered(centres, centres) == 1.0


@pytest.mark.slow
def test_the_judge_knows_digits_from_noise(data):
    torch.manual_seed(0)
    judge = Judge(data)
    for name, values in CLASSIFIERS.items():  # the best one lies inside the grid
        assert values[0] < judge.classifier.best_params_[name] < values[-1]
    assert judge.accuracy(data.test, data.test_labels) > 0.96
    loss = log_loss(data.test_labels, judge.classifier.predict_proba(flat(data.test)))
    assert loss < 0.1
    # It says how sure it may be: 360 test images, five standard errors of a share near .98 are .04.
    gap = judge.confidence(data.test) - judge.accuracy(data.test, data.test_labels)
    assert abs(gap) < 0.04
    assert judge(data.train)["recall"] > 0.8
    noise = judge(strangers(data)["noise"])
    assert noise["precision"] == noise["recall"] == 0.0


def test_interpolation_begins_and_ends_with_the_images(data):
    torch.manual_seed(0)
    corners = data.test[:4]
    grid = interpolate(untrained(), corners, num_angles=3)
    assert grid.shape == (3, 3, *SHAPE)
    ends = torch.stack([grid[0, 0], grid[0, -1], grid[-1, 0], grid[-1, -1]])
    error = (NUM_LEVELS * ends - corners - 0.5).abs().max().item()
    assert error <= 0.5 + 1e-3  # within the cells of their levels


@pytest.mark.parametrize("name", ["nice", "realnvp", "glow", "spline_coupling", "cnf"])
def test_untrained_flows_reconstruct_all_images(data, name):
    torch.manual_seed(0)
    errors = reconstruction_errors(untrained(name), data)
    assert set(errors) == {"training data", "noise", "inverted", "blank"}
    assert max(errors.values()) < 1e-3


class _Sloppy(ActNorm):
    def inverse_and_log_det(self, y):
        x, log_det = super().inverse_and_log_det(y)
        return 1.01 * x, log_det


def test_an_inverse_that_is_none_is_found_out(data):
    density = Dequantized(pf.Flow(None, _Sloppy(SHAPE, initialized=True)), NUM_LEVELS)
    assert min(reconstruction_errors(density, data).values()) > 1e-2


class _Brightness:
    """Pretends that an image takes as many bits as it is bright."""

    def bits_per_dim(self, levels, context=None):
        return levels.float().mean((1, 2, 3))


def test_unusually_few_bits_are_an_anomaly_to_typicality_alone():
    normal, kinds = torch.full((50, *SHAPE), 8), {"few": 1, "many": 15}
    abnormal = {kind: torch.full((20, *SHAPE), level) for kind, level in kinds.items()}
    areas, found = detect(_Brightness(), normal, normal, abnormal)
    assert areas["few"] == {"likelihood": 0.0, "typicality": 1.0}
    assert areas["many"] == {"likelihood": 1.0, "typicality": 1.0}
    assert found["few"].mean() == 1.0


def test_images_lie_a_pixel_apart():
    picture = mosaic(torch.ones(2, 3, *SHAPE))
    assert picture.shape == (2 * 9 + 1, 3 * 9 + 1)
    assert picture.sum() == 6 * 64


def run(out, *options):
    command = [sys.executable, "-m", "case_studies.digits", "--out", str(out), *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads((out / "metrics.json").read_text())


def check(metrics):
    """Check what holds for every run."""
    rows = metrics["comparison"]
    real = rows["real images"]["confidence"]
    assert abs(metrics["classes"]["confidence"] - real) < 0.05
    assert metrics["classes"]["draws of the digit asked for"] > 0.9
    assert metrics["classes"]["accuracy by Bayes' rule"] > 0.9
    # Told no digit, a flow has to find out that there are ten.
    even, learned = rows["spline_coupling"], rows["spline_coupling, learned noise"]
    assert metrics["classes"]["bits per dim, digits summed out"] < even["bits per dim"]
    assert learned["bits per dim"] < even["bits per dim"]
    for row in (even, learned):
        assert row["by 20 draws of noise"] < row["bits per dim"]
    for errors in metrics["reconstruction"].values():
        assert max(errors.values()) <= 1e-3
    for areas in metrics["anomalies"].values():
        assert areas["noise"]["likelihood"] > 0.99
    return rows


@pytest.mark.slow
def test_digits_in_fast_mode(tmp_path):
    metrics = run(tmp_path, "--fast")
    rows = check(metrics)
    assert set(digits.FAST_FLOWS) <= set(rows)
    assert rows[metrics["best by validation"]]["bits per dim"] < 2.2
    for name in digits.FAST_FLOWS:
        assert rows[name]["bits per dim"] < rows["normal, logits"]["bits per dim"]
    # Cold draws are nearer to real images, and fewer of these are near a draw.
    by_temperature = metrics["by temperature"]["spline_coupling"]
    assert by_temperature["0.6"]["precision"] > by_temperature["1.0"]["precision"]
    assert by_temperature["0.6"]["recall"] < by_temperature["1.0"]["recall"]
    pictures = {"anomalies", "classes", "comparison", "interpolation", "temperatures"}
    assert {path.stem for path in tmp_path.glob("*.png")} == pictures
    for picture in tmp_path.glob("*.png"):
        assert picture.stat().st_size > 5000
    data = az.from_netcdf(tmp_path / "digits.nc")
    assert data.observed_data["digit"].dims == ("row", "channel", "height", "width")
    assert (tmp_path / "comparison.csv").exists()


@pytest.mark.slow
def test_every_flow_takes_fewer_bits_than_every_mixture(tmp_path):
    rows = check(run(tmp_path))
    mixtures = [rows[f"mixture, {space}"]["bits per dim"] for space in SPACES]
    for name in digits.RECIPES:
        assert rows[name]["bits per dim"] < min(mixtures), name


@pytest.mark.slow
def test_the_best_flow_comes_within_reach_of_the_best_known():
    found = []
    for seed in range(3):
        data = load(seed, "cpu")
        density = digits.fit(digits.FAVOURITE, data.train, seed=seed).density
        found.append(bits(density, data.test).mean().item())
    assert np.mean(found) <= 2.10
