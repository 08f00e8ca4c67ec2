"""The case studies run, write their files, and get their answers right."""

import json
import subprocess
import sys

import arviz as az
import pytest

from case_studies import __main__ as overview
from case_studies import densities, eight_schools, energies


def run(name, out, *options):
    command = [sys.executable, "-m", f"case_studies.{name}", "--out", str(out), *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads((out / "metrics.json").read_text()), done.stdout


def test_case_studies_are_listed():
    listed = subprocess.run(
        [sys.executable, "-m", "case_studies"], capture_output=True, text=True, check=True
    )
    for name in ("eight_schools", "moons", "densities", "energies"):
        assert f"python -m case_studies.{name}\n" in listed.stdout
    for tool in ("command_line", "toys", "energy_functions"):
        assert tool not in listed.stdout


def test_every_case_study_tells_a_story_with_references():
    for name in overview.studies():
        source = (overview.FOLDER / f"{name}.py").read_text()
        story = source.split('"""')[1]
        assert "What to look at" in story, name
        assert "\n[1] " in story, name


def test_the_gallery_holds_small_pictures_of_case_studies():
    gallery = overview.FOLDER.parent / "docs" / "gallery"
    pictures = [*gallery.glob("*/*")]
    assert len(pictures) >= 10
    assert {path.parent.name for path in pictures} <= {*overview.studies()}
    for picture in pictures:
        assert picture.suffix == ".png"
        assert 5000 < picture.stat().st_size <= 150 * 1024, picture


@pytest.fixture
def commands(monkeypatch):
    """Record what would be run; case study ``moons`` fails."""
    recorded = []

    def pretend(command, **_):
        recorded.append(command)
        code = int("case_studies.moons" in command)
        return subprocess.CompletedProcess(command, code, stderr="no moons")

    monkeypatch.setattr(overview.subprocess, "run", pretend)
    return recorded


def call(monkeypatch, *options):
    monkeypatch.setattr(sys, "argv", ["case_studies", *options])
    overview.main()


def test_case_studies_are_run_each_with_its_own_folder(commands, monkeypatch, tmp_path):
    options = ("--fast", "--seed", "3")
    call(monkeypatch, "--run", "slcp", "energies", "--out", str(tmp_path), *options)
    assert [command[1:] for command in commands] == [
        ["-m", f"case_studies.{name}", "--out", str(tmp_path / name), *options]
        for name in ("slcp", "energies")
    ]


def test_all_case_studies_are_run_and_failures_told(commands, monkeypatch, capsys):
    with pytest.raises(SystemExit, match="failed: moons"):
        call(monkeypatch, "--run")
    assert [command[2] for command in commands] == [
        f"case_studies.{name}" for name in overview.studies()
    ]
    assert "no moons" in capsys.readouterr().err


@pytest.mark.parametrize("options", [("--fast",), ("--run", "toys")])
def test_what_cannot_be_run_is_refused(commands, monkeypatch, capsys, options):
    with pytest.raises(SystemExit):
        call(monkeypatch, *options)
    assert not commands
    assert options[-1] in capsys.readouterr().err


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


@pytest.mark.slow
def test_moons_in_fast_mode(tmp_path):
    metrics, printed = run("moons", tmp_path, "--fast")
    assert "KL: " in printed
    assert 0.0 < metrics["KL"] < 0.15
    assert metrics["round trip error"] < 1e-4
    assert (tmp_path / "moons.png").stat().st_size > 5000
    data = az.from_netcdf(tmp_path / "moons.nc")
    assert data.posterior_predictive["couplings"].dims == ("chain", "draw", "coordinate")


@pytest.mark.slow
def test_moons_at_defaults(tmp_path):
    metrics, _ = run("moons", tmp_path)
    assert metrics["KL"] <= 0.03


@pytest.mark.slow
def test_densities_in_fast_mode(tmp_path):
    options = ("--fast", "--densities", "moons", "--flows", "spline_coupling")
    metrics, printed = run("densities", tmp_path, *options)
    assert "Kullback-Leibler divergence" in printed
    assert set(metrics) == {"moons"}
    assert 0.0 < metrics["moons"]["spline_coupling"]["KL"] < 0.1
    assert (tmp_path / "moons.png").stat().st_size > 5000
    data = az.from_netcdf(tmp_path / "moons.nc")
    assert (
        data.posterior_predictive["spline_coupling"].shape[1:] == data.observed_data["data"].shape
    )


TARGETS = {
    "moons": 0.03,
    "8gaussians": 0.03,
    "pinwheel": 0.06,
    "swissroll": 0.06,
    "rings": 0.08,
    "circles": 0.05,
    "2spirals": 0.10,
    "checkerboard": 0.10,
}


@pytest.mark.slow
@pytest.mark.parametrize("density", TARGETS)
def test_a_flow_comes_close_to_every_density(tmp_path, density):
    flows = densities.BEST
    metrics, _ = run("densities", tmp_path, "--densities", density, "--flows", *flows)
    best = min(metrics[density].values(), key=lambda values: values["KL"])
    assert best["KL"] <= TARGETS[density]
    assert best["seconds"] <= 600


@pytest.mark.slow
def test_energies_in_fast_mode(tmp_path):
    metrics, printed = run("energies", tmp_path, "--fast", "--energies", "U2")
    assert "Kullback-Leibler divergence" in printed
    assert set(metrics["U2"]) == set(energies.FAST_GUIDES)
    for values in metrics["U2"].values():
        assert values["KL"] > -5 * values["standard error"]
    assert metrics["U2"]["spline"]["KL"] < metrics["U2"]["planar-8"]["KL"]
    assert (tmp_path / "energies.png").stat().st_size > 5000
    assert az.from_netcdf(tmp_path / "U2.nc").posterior["z1"].dims == ("chain", "draw")


@pytest.mark.slow
@pytest.mark.parametrize("energy", ["U1", "U2", "U3", "U4"])
def test_a_guide_comes_close_to_every_energy(tmp_path, energy):
    metrics, _ = run("energies", tmp_path, "--energies", energy, "--guides", "planar-32", "spline")
    assert min(values["KL"] for values in metrics[energy].values()) <= 0.02
    if energy in ("U1", "U2"):
        assert metrics[energy]["planar-32"]["KL"] <= 0.2
