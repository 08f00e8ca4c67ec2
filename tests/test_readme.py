"""The examples of the README run."""

import re
from pathlib import Path

import pytest
import torch

import pyroflows as pf

README = Path(__file__).parent.parent / "README.md"
EXAMPLES = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)


def test_the_readme_has_examples():
    assert len(EXAMPLES) == 3


@pytest.mark.slow
def test_first_example_runs_as_it_stands(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(EXAMPLES[0], names)
    assert names["result"].khat < 0.7
    assert (tmp_path / "eight_schools.nc").exists()


@pytest.mark.slow
def test_a_density_is_learned_as_it_stands():
    names = {"pf": pf, "torch": torch}
    exec(EXAMPLES[1], names)
    # The entropy of the moons in these units is 1 nat lower than that of twice their size.
    assert -names["flow"].log_prob(names["data"]).mean() < 1.3


def test_a_flow_of_ones_own_runs_as_it_stands():
    exec(EXAMPLES[2], {"pf": pf, "torch": torch})
