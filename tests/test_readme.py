"""The examples of the README run."""

import re
from pathlib import Path

import pyro
import pyro.distributions as dist
import pytest
import torch

import pyroflows as pf

ROOT = Path(__file__).parent.parent


def examples(path):
    """Return the Python code of a page, block by block."""
    return re.findall(r"```python\n(.*?)```", path.read_text(), flags=re.DOTALL)


EXAMPLES = examples(ROOT / "README.md")
GUIDE = examples(ROOT / "docs" / "simulation_based_inference.md")
VARIATIONAL_GUIDE = examples(ROOT / "docs" / "variational_inference.md")


def test_the_readme_has_examples():
    assert len(EXAMPLES) == 4


@pytest.mark.slow
def test_first_example_runs_as_it_stands(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(EXAMPLES[0], names)
    assert names["result"].khat < 0.7
    assert (tmp_path / "eight_schools.nc").exists()


@pytest.mark.slow
def test_a_simulator_is_inferred_as_it_stands(capsys):
    names = {"pf": pf, "pyro": pyro, "dist": dist}
    torch.manual_seed(0)
    exec(EXAMPLES[1], names)
    # The posterior is Gamma-like around n / sum(x), its relative width about 1 / sqrt(20).
    rate = names["posterior"].sample(4000, x=names["x"], seed=0)["rate"]
    assert rate.mean().item() == pytest.approx(1 / names["x"].mean().item(), rel=0.15)
    assert "SBC" in capsys.readouterr().out


@pytest.mark.slow
def test_the_guide_to_simulators_runs_as_it_stands(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    exec("\n".join(GUIDE), {})
    assert (tmp_path / "rates.nc").exists()


@pytest.mark.slow
def test_the_guide_to_variational_inference_runs_as_it_stands(capsys):
    torch.manual_seed(0)
    names = {}
    exec(VARIATIONAL_GUIDE[0], names)
    assert names["result"].is_reliable
    assert names["result"].sample(4000, seed=0)["slope"].mean().item() == pytest.approx(2, abs=0.5)
    exec("\n".join(VARIATIONAL_GUIDE[1:3]), names)
    # The modes are equal; 1000 resampled draws err by 0.016, and weights by as much again.
    draws = names["result"].sample(1000, resample=True, seed=0)["theta"]
    assert (draws > 0).double().mean().item() == pytest.approx(0.5, abs=0.1)
    assert not names["restarts"].agree
    exec("\n".join(VARIATIONAL_GUIDE[3:]), names)
    assert names["draws"]["log_rate"].shape == (100, 3)
    assert "mean_pit" in capsys.readouterr().out


@pytest.mark.slow
def test_a_density_is_learned_as_it_stands():
    names = {"pf": pf, "torch": torch}
    exec(EXAMPLES[2], names)
    # The entropy of the moons in these units is 1 nat lower than that of twice their size.
    assert -names["flow"].log_prob(names["data"]).mean() < 1.3


def test_a_flow_of_ones_own_runs_as_it_stands():
    exec(EXAMPLES[3], {"pf": pf, "torch": torch})
