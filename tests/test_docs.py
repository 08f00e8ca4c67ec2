"""The pages that are generated say what the code says."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

import pyroflows as pf
from tests.benchmarks.libraries import kinds

DOCS = Path(__file__).parents[1] / "docs"


@pytest.fixture
def flow_table() -> ModuleType:
    specification = importlib.util.spec_from_file_location("flow_table", DOCS / "flow_table.py")
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def test_the_table_of_flows_is_up_to_date(flow_table: ModuleType) -> None:
    assert (DOCS / "flows.md").read_text() == flow_table.markdown()


def test_every_registered_flow_is_in_the_table_with_its_times(flow_table: ModuleType) -> None:
    rows = flow_table.rows()
    assert rows["flow"].tolist() == [f"`{name}`" for name in pf.flows.names()]
    assert not rows.isin(["-"]).any(axis=None)


def test_every_registered_flow_is_in_the_benchmark() -> None:
    assert set(pf.flows.names()) <= set(kinds())
