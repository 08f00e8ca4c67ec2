"""The examples of the README run."""

import re
from pathlib import Path

import pytest
import torch

import pyroflows as pf

README = Path(__file__).parent.parent / "README.md"
EXAMPLES = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)


def test_the_readme_has_examples():
    assert len(EXAMPLES) >= 2


@pytest.mark.slow
def test_first_example_runs_as_it_stands(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(EXAMPLES[0], names)
    assert names["result"].khat < 0.7
    assert (tmp_path / "eight_schools.nc").exists()


def test_second_example_runs_as_it_stands():
    exec(EXAMPLES[1], {"pf": pf, "torch": torch})
