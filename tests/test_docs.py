"""The documentation says what the code says: generated pages, examples, and what is public."""

import importlib
import importlib.util
import inspect
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

import pyroflows as pf
from pyroflows.flows import registry
from tests.benchmarks.libraries import kinds
from tests.test_readme import examples

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
ROOMS = ("", "flows", "transforms", "distributions", "sbi", "diagnostics", "plots")


def load(name: str) -> ModuleType:
    """Import a script of the documentation, which is no package."""
    specification = importlib.util.spec_from_file_location(name, DOCS / f"{name}.py")
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


# The table of flows


@pytest.fixture
def flow_table() -> ModuleType:
    return load("flow_table")


def test_the_table_of_flows_is_up_to_date(flow_table: ModuleType) -> None:
    assert (DOCS / "flows.md").read_text() == flow_table.markdown()


def test_every_registered_flow_is_in_the_table_with_its_times(flow_table: ModuleType) -> None:
    rows = flow_table.rows()
    assert rows["flow"].tolist() == [f"`{name}`" for name in pf.flows.names()]
    assert not rows.isin(["-"]).any(axis=None)
    assert not flow_table.rows("image").isin(["-"]).any(axis=None)


def test_every_registered_flow_is_in_the_benchmark() -> None:
    assert set(pf.flows.names()) <= set(kinds())


# The case studies


@pytest.fixture
def gallery() -> ModuleType:
    return load("gallery")


def test_every_case_study_is_on_its_page(gallery: ModuleType) -> None:
    from case_studies.__main__ import studies

    page = gallery.markdown()
    assert set(gallery.studies()) == set(studies())
    assert all(f"`python -m case_studies.{name}`" in page for name in studies())


def test_the_page_shows_every_picture_there_is(gallery: ModuleType) -> None:
    paths = sorted(path.relative_to(DOCS) for path in (DOCS / "gallery").glob("*/*.png"))
    assert sorted(map(Path, re.findall(r"!\[.*?\]\((.*?)\)", gallery.markdown()))) == paths


# What is public


def module(room: str) -> ModuleType:
    return importlib.import_module(f"pyroflows.{room}" if room else "pyroflows")


def public(room: str) -> dict[str, object]:
    """Return the public classes and functions of a part of the library."""
    named = {name: getattr(module(room), name) for name in module(room).__all__}
    return {n: thing for n, thing in named.items() if inspect.isclass(thing) or callable(thing)}


PUBLIC = {f"{room}.{name}".strip("."): t for room in ROOMS for name, t in public(room).items()}


@pytest.mark.parametrize("name", PUBLIC)
def test_every_public_name_has_an_example_that_is_run(name: str) -> None:
    thing = PUBLIC[name]
    assert ">>> " in (thing.__doc__ or "")  # of the thing itself, not inherited
    # Doctests are collected from the package.
    assert thing.__module__.startswith("pyroflows.")


def documented() -> set[str]:
    """Return what the pages of the API describe, by full name."""
    names = set()
    pattern = re.compile(r"^\.\. (\w+):: (\S+)$", re.MULTILINE)
    for page in (DOCS / "api").glob("*.md"):
        room = ""
        for directive, target in pattern.findall(page.read_text()):
            if directive == "currentmodule":
                room = target
            elif directive == "automodule":
                every = getattr(importlib.import_module(target), "__all__", ())
                names |= {f"{target}.{name}" for name in every}
            elif directive.startswith("auto"):
                names.add(f"{room}.{target}")
    return names


def test_every_public_name_is_in_the_api() -> None:
    described = {id(resolve(name)) for name in documented()}
    missing = [name for name, thing in PUBLIC.items() if id(thing) not in described]
    assert not missing


def resolve(name: str) -> object:
    room, _, attribute = name.rpartition(".")
    return getattr(importlib.import_module(room), attribute)


# The examples of the guides


def run(page: str) -> dict:
    """Run the examples of a page, one after the other, as they stand."""
    torch.manual_seed(0)
    names: dict = {}
    exec("\n".join(examples(DOCS / page)), names)
    return names


def test_the_home_page_shows_the_example_of_the_readme() -> None:
    assert examples(DOCS / "index.md") == examples(ROOT / "README.md")[:1]


def test_the_guide_to_flows_runs_as_it_stands(capsys: pytest.CaptureFixture) -> None:
    names = run("choosing_a_flow.md")
    assert "spline_coupling" in capsys.readouterr().out
    torch.testing.assert_close(names["stack"].inv(names["stack"](torch.ones(4))), torch.ones(4))


def test_the_guide_to_new_flows_runs_as_it_stands(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_registry", dict(registry._registry))
    names = run("new_flow.md")
    assert "stretches" in pf.flows.names()
    bijection = names["SinhArcsinh"]()
    x = torch.linspace(-3, 3, 20, dtype=torch.float64).requires_grad_()
    y, log_derivative = bijection.forward(x, torch.tensor([0.3, -0.5]).double().expand(20, 2).T)
    (derivative,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(log_derivative.exp(), derivative)
    same, zero = bijection.forward(x, torch.zeros(2, 20))
    torch.testing.assert_close(same, x)
    torch.testing.assert_close(zero, torch.zeros_like(x))


@pytest.mark.slow
def test_the_guide_to_the_verdict_runs_as_it_stands() -> None:
    names = run("reading_the_verdict.md")
    assert not names["normal"].is_reliable
    assert names["flow"].is_reliable
    assert names["gap"] < 0.05


@pytest.mark.slow
@pytest.mark.parametrize("page", ["saving.md", "gpu.md", "images.md"])
def test_a_guide_runs_as_it_stands(
    page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run(page)


# The site


@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    for package in ("furo", "myst_parser", "sphinx"):
        pytest.importorskip(package)
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-b", "html"]
    done = subprocess.run(
        [*command, str(DOCS), str(tmp_path / "html")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "html" / "index.html").exists()
