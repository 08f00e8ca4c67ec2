"""The case studies run, write their files, and get their answers right."""

import json
import subprocess
import sys

import arviz as az
import pytest

from case_studies import eight_schools


def run(name, out, *options):
    command = [sys.executable, "-m", f"case_studies.{name}", "--out", str(out), *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads((out / "metrics.json").read_text()), done.stdout


def test_case_studies_are_listed():
    listed = subprocess.run(
        [sys.executable, "-m", "case_studies"], capture_output=True, text=True, check=True
    )
    assert "python -m case_studies.eight_schools" in listed.stdout


def test_the_exact_posterior_of_eight_schools_agrees_with_published_quadrature():
    exact = eight_schools.exact_posterior()
    assert exact.log_evidence == pytest.approx(-31.3113, abs=1e-4)
    # 200 000 exact draws: five standard errors of a mean are 0.011 posterior sds.
    assert exact.mu.mean().item() == pytest.approx(4.3968, abs=0.04)
    assert exact.tau.log().mean().item() == pytest.approx(0.8021, abs=0.015)


def test_eight_schools_in_fast_mode(tmp_path):
    metrics, printed = run("eight_schools", tmp_path, "--fast")
    assert set(metrics) == set(eight_schools.GUIDES)
    assert metrics["spline"]["gap"] < metrics["full-rank normal"]["gap"]
    assert "exact log evidence: -31.3113" in printed
    for picture in ("pair.png", "elbo.png", "weights.png"):
        assert (tmp_path / picture).stat().st_size > 5000
    data = az.from_netcdf(tmp_path / "eight_schools.nc")
    assert data.posterior["theta"].dims == ("chain", "draw", "school")


@pytest.mark.slow
def test_eight_schools_at_defaults_finds_the_exact_answer(tmp_path):
    metrics, _ = run("eight_schools", tmp_path)
    for name in ("RealNVP", "IAF", "spline"):
        assert metrics[name]["ELBO"] > -32.787  # the best normal distribution of full rank
    best = min(metrics.values(), key=lambda row: row["gap"])
    assert best["gap"] <= 0.10
    assert best["k-hat"] < 0.7
    assert abs(best["mean mu"]) <= 0.05
    assert abs(best["mean log_tau"]) <= 0.05
    assert best["seconds"] <= 120
