"""Results in files: what is read is what was written, and it is never code."""

import json
import os
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import constraints
from pyro.infer.autoguide import (
    AutoDiagonalNormal,
    AutoLaplaceApproximation,
    AutoMultivariateNormal,
)
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import pyroflows as pf
from pyroflows.distributions import standard_normal
from pyroflows.nn import GrowingTanh
from pyroflows.svi.density import ModelDensity
from tests.models import (
    GUIDES,
    HEIGHTS,
    TABLE,
    GuideBuilder,
    conjugate,
    gaussian,
    groups,
    perturb,
    realnvp,
    regression,
)

Y = torch.tensor([0.3, 1.1, 1.9])


def posterior_of(model: Callable, *args: Any, guide: Any = None, **kwargs: Any) -> Any:
    """Return the result of a guide that was moved a little instead of fitted."""
    guide = realnvp(model) if guide is None else guide
    density = ModelDensity(model, guide, args, kwargs)
    perturb(guide)
    return pf.VariationalPosterior.from_guide(density, torch.linspace(3, 1, 7), 100)


def round_trip(
    result: pf.VariationalPosterior, folder: Path, model: Callable | None = None
) -> pf.VariationalPosterior:
    path = folder / "result.safetensors"
    result.save(path)
    pyro.clear_param_store()
    return pf.load(path, model or result.model)


def assert_same(result: pf.VariationalPosterior, other: pf.VariationalPosterior) -> None:
    assert other.scalars() == result.scalars()
    for name in ("losses", "draws", "log_p", "log_q", "log_weights"):
        assert torch.equal(getattr(other, name), getattr(result, name))
    draws, expected = other.sample(5, seed=1), result.sample(5, seed=1)
    assert draws.keys() == expected.keys()
    assert all(torch.equal(draws[name], expected[name]) for name in expected)
    torch.testing.assert_close(other.log_prob(draws), result.log_prob(draws), rtol=0, atol=0)
    z = result.draws[:5]
    torch.testing.assert_close(other.density(z), result.density(z), rtol=0, atol=0)


# Round trips


@pytest.mark.parametrize("build", GUIDES.values(), ids=GUIDES)
def test_every_flow_guide_comes_back(build: GuideBuilder, tmp_path: Path) -> None:
    result = posterior_of(regression, Y, Y, guide=build(regression))
    other = round_trip(result, tmp_path)
    assert type(other.guide) is type(result.guide)
    assert other.guide.flow == result.guide.flow
    assert_same(result, other)


@pytest.mark.parametrize("guide", [AutoMultivariateNormal, AutoDiagonalNormal])
def test_normal_guides_of_pyro_come_back(guide: Callable, tmp_path: Path) -> None:
    result = posterior_of(regression, Y, Y, guide=guide(regression))
    other = round_trip(result, tmp_path)
    assert type(other.guide) is guide
    assert_same(result, other)


def test_results_of_a_fit_come_back(tmp_path: Path) -> None:
    options = {"num_steps": 5, "num_particles": 16, "num_draws": 100, "progress": False}
    result = pf.fit(groups, realnvp(groups), (TABLE,), **options)
    assert_same(result, round_trip(result, tmp_path))


def test_results_come_back_in_a_fresh_process_state(tmp_path: Path) -> None:
    """Neither the parameter store nor the random state has a say."""
    result = posterior_of(regression, Y, Y)
    result.save(tmp_path / "result")
    pyro.clear_param_store()
    torch.manual_seed(123)
    before = torch.get_rng_state()
    other = pf.load(tmp_path / "result", regression)
    assert torch.equal(torch.get_rng_state(), before)
    assert_same(result, other)


@pytest.mark.parametrize("as_string", [True, False])
def test_paths_are_strings_or_paths(as_string: bool, tmp_path: Path) -> None:
    result = posterior_of(conjugate, Y)
    path: Any = tmp_path / "no.extension needed"
    path = str(path) if as_string else path
    result.save(path)
    assert_same(result, pf.load(path, conjugate))


@pytest.mark.parametrize(
    "options",
    [
        {"num_layers": 3},
        {"hidden_dims": [5, 6]},
        {"hidden_dims": (5,)},
        {"activation": nn.SiLU},
        {"activation": GrowingTanh},
        {"bins": 5, "bound": 2.5},
    ],
    ids=str,
)
def test_options_come_back(options: dict[str, Any], tmp_path: Path) -> None:
    sizes = {"num_layers": 2, "hidden_dims": (4,), **options}
    result = posterior_of(gaussian, guide=pf.AutoSpline(gaussian, **sizes))
    other = round_trip(result, tmp_path)
    assert repr(other.guide) == repr(result.guide)
    assert_same(result, other)


def test_double_precision_comes_back(tmp_path: Path) -> None:
    result = posterior_of(conjugate, Y.double())
    other = round_trip(result, tmp_path)
    assert other.draws.dtype == torch.float64
    assert all(p.dtype == torch.float64 for p in other.guide.parameters())
    assert_same(result, other)


def read_only(values: list[float]) -> np.ndarray:
    """Return an array as pandas hands it out."""
    array = np.array(values)
    array.flags.writeable = False
    return array


ARGUMENTS: dict[str, Any] = {
    "tensor": Y,
    "integers": torch.tensor([1, 2]),
    "booleans": torch.tensor([True, False]),
    "number": torch.tensor(2.5),
    "empty": torch.zeros(0, 3),
    "transposed": torch.arange(6.0).reshape(2, 3).T,
    "array": np.array([1.0, 2.0]),
    "array of integers": np.arange(6).reshape(2, 3),
    "read-only array": read_only([1.0, 2.0]),
    "int": 3,
    "float": 0.1,
    "infinity": float("inf"),
    "bool": True,
    "none": None,
    "text": "a.b",
    "list": [1, Y, "x"],
    "tuple": (Y, (2.0, None)),
    "dictionary": {"a": Y, "b": {"c": [Y + 1, 2]}, "tensor": 1, "dict": None},
    "empty containers": [(), [], {}],
    "names with dots": {"a.b": Y, "a": {"b": Y + 1}},
    "names of containers": {"list": [1], "tuple": (2,), "array": np.zeros(1)},
}


def assert_equal(value: Any, expected: Any) -> None:
    assert type(value) is type(expected)
    if isinstance(expected, Tensor):
        assert value.dtype == expected.dtype
        assert torch.equal(value, expected)
    elif isinstance(expected, np.ndarray):
        assert value.dtype == expected.dtype
        np.testing.assert_array_equal(value, expected)
    elif isinstance(expected, list | tuple):
        assert len(value) == len(expected)
        for one, other in zip(value, expected):
            assert_equal(one, other)
    elif isinstance(expected, dict):
        assert list(value) == list(expected)
        for name in expected:
            assert_equal(value[name], expected[name])
    else:
        assert value == expected


def with_data(data: Any = None, **more: Any) -> None:
    """Ignore the arguments: they are stored all the same."""
    pyro.sample("x", dist.Normal(0.0, 1.0))


@pytest.mark.parametrize("name", ARGUMENTS)
def test_arguments_come_back(name: str, tmp_path: Path) -> None:
    value = ARGUMENTS[name]
    other = round_trip(posterior_of(with_data, value), tmp_path)
    assert_equal(other.density.args, (value,))
    other = round_trip(posterior_of(with_data, data=value, option=1), tmp_path)
    assert_equal(other.density.kwargs, {"data": value, "option": 1})


def test_arguments_on_the_same_memory_come_back(tmp_path: Path) -> None:
    table = torch.arange(6.0).reshape(2, 3)
    result = posterior_of(with_data, [table, table, table[0], table.T])
    other = round_trip(result, tmp_path)
    assert_equal(other.density.args, result.density.args)


def test_parameters_of_the_model_come_back(tmp_path: Path) -> None:
    """What a model has learned belongs to the result as much as the guide's weights do."""

    def model(y: Tensor) -> None:
        spread = pyro.param("spread", torch.tensor(1.0), constraint=constraints.positive)
        mean = pyro.sample("mean", dist.Normal(0.0, spread))
        with pyro.plate("item", len(y)):
            pyro.sample("y", dist.Normal(mean, 1.0), obs=y)

    result = posterior_of(model, Y)
    with torch.no_grad():
        result.density.parameters()[0].fill_(1.5)
    z = result.draws[:5]
    expected = result.density(z)
    other = round_trip(result, tmp_path)
    torch.testing.assert_close(other.density(z), expected)


# The file


def test_file_is_safetensors_and_json(tmp_path: Path) -> None:
    result = posterior_of(regression, Y, Y)
    path = tmp_path / "result.safetensors"
    result.save(path)
    tensors = load_file(path)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    content = json.loads(metadata["json"])
    assert metadata["format"] == "pyroflows.VariationalPosterior/2"
    assert content["guide"]["class"] == "AutoRealNVP"
    assert content["guide"]["options"] == {"num_layers": 2, "hidden_dims": [8]}
    assert torch.equal(tensors["draws"], result.draws)
    assert {f"guide.{name}" for name in result.guide.state_dict()} < set(tensors)


def test_file_holds_no_pickle(tmp_path: Path) -> None:
    path = tmp_path / "result.safetensors"
    posterior_of(regression, Y, Y).save(path)
    data = path.read_bytes()
    size = struct.unpack("<Q", data[:8])[0]
    json.loads(data[8 : 8 + size])
    with pytest.raises(pickle.UnpicklingError):
        pickle.loads(data)


def test_saving_leaves_no_other_files(tmp_path: Path) -> None:
    posterior_of(conjugate, Y).save(tmp_path / "result")
    assert os.listdir(tmp_path) == ["result"]


def test_saving_replaces_an_older_file(tmp_path: Path) -> None:
    posterior_of(gaussian).save(tmp_path / "result")
    result = posterior_of(conjugate, Y)
    result.save(tmp_path / "result")
    assert_same(result, pf.load(tmp_path / "result", conjugate))


def test_saving_leaves_the_result_alone(tmp_path: Path) -> None:
    result = posterior_of(conjugate, Y)
    expected = result.sample(5, seed=1)
    result.save(tmp_path / "result")
    assert torch.equal(result.sample(5, seed=1)["mean"], expected["mean"])
    assert result.model is conjugate


# What cannot be saved


@pytest.mark.parametrize("path", ["missing/result", "folder"])
def test_paths_that_cannot_be_written_are_an_error(path: str, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(ValueError, match=r"path .* cannot be written"):
        posterior_of(conjugate, Y).save(tmp_path / path)
    assert os.listdir(tmp_path) == ["folder"]
    assert os.listdir(tmp_path / "folder") == []


def test_failed_saves_keep_the_older_file(tmp_path: Path) -> None:
    result = posterior_of(conjugate, Y)
    result.save(tmp_path / "result")
    before = (tmp_path / "result").read_bytes()
    with pytest.raises(TypeError):
        posterior_of(with_data, object()).save(tmp_path / "result")
    assert (tmp_path / "result").read_bytes() == before
    assert os.listdir(tmp_path) == ["result"]


@pytest.mark.parametrize(
    "value",
    [object(), {1, 2}, {1: 2}, lambda: None, 1j, np.array(["text"]), np.array([object()])],
    ids=["object", "set", "integer keys", "function", "complex", "strings", "objects"],
)
@pytest.mark.parametrize("place", ["args.0", "args.0.1", "kwargs.data.key"])
def test_arguments_that_cannot_be_saved_are_named(value: Any, place: str, tmp_path: Path) -> None:
    build = {
        "args.0": lambda: posterior_of(with_data, value),
        "args.0.1": lambda: posterior_of(with_data, [Y, value]),
        "kwargs.data.key": lambda: posterior_of(with_data, data={"key": value}),
    }[place]
    with pytest.raises(TypeError, match=f"^{place} of the model cannot be saved"):
        build().save(tmp_path / "result")
    assert os.listdir(tmp_path) == []


class OwnGuide(pf.AutoRealNVP):
    """A guide of the user's own."""


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: OwnGuide(gaussian), "got OwnGuide"),
        (lambda: AutoLaplaceApproximation(gaussian), "got AutoLaplaceApproximation"),
        (lambda: pf.AutoFlow(gaussian, lambda dim: pf.flow("maf", dim)), "flow function"),
        (lambda: realnvp(gaussian, base=lambda dim: standard_normal(torch.zeros(dim))), "base"),
        (lambda: realnvp(gaussian, base=standard_normal(torch.zeros(3))), "base"),
        (lambda: realnvp(gaussian, activation=lambda: nn.Tanh()), "option activation"),
    ],
    ids=["subclass", "other guide", "flow", "base factory", "base", "activation"],
)
def test_guides_that_cannot_be_saved_are_named(
    build: Callable, message: str, tmp_path: Path
) -> None:
    result = posterior_of(gaussian, guide=build())
    with pytest.raises(TypeError, match=message):
        result.save(tmp_path / "result")
    assert os.listdir(tmp_path) == []


def test_flows_of_the_users_own_registry_come_back(tmp_path: Path) -> None:
    name = "test_storage_flow"
    factory = pf.flows.spec("realnvp").factory
    pf.register_flow(pf.flows.FlowSpec(name, factory, True, True, paper=""))
    try:
        guide = pf.AutoFlow(gaussian, flow=name, num_layers=2, hidden_dims=(4,))
        result = posterior_of(gaussian, guide=guide)
        assert_same(result, round_trip(result, tmp_path))
    finally:
        del pf.flows.registry._registry[name]


# What cannot be loaded


def saved(folder: Path, model: Callable = gaussian, *args: Any) -> Path:
    path = folder / "result.safetensors"
    posterior_of(model, *args).save(path)
    return path


def two_numbers() -> None:
    pyro.sample("a", dist.Normal(0.0, 1.0))
    pyro.sample("b", dist.Normal(0.0, 1.0))


def without_latents() -> None:
    pyro.sample("y", dist.Normal(0.0, 1.0), obs=torch.tensor(0.0))


@pytest.mark.parametrize("model", [two_numbers, without_latents, conjugate])
def test_the_result_of_another_model_is_an_error(model: Callable, tmp_path: Path) -> None:
    path = saved(tmp_path)
    with pytest.raises(ValueError, match=r"another model|no continuous latent|argument"):
        pf.load(path, model)


def test_the_result_of_another_model_of_equal_size_is_an_error(tmp_path: Path) -> None:
    def other() -> None:
        pyro.sample("c", dist.LogNormal(torch.zeros(3), 1.0).to_event(1))

    path = saved(tmp_path)
    with pytest.raises(ValueError, match="another model"):
        pf.load(path, other)


@pytest.mark.parametrize("content", [b"", b"garbage", b"\x80\x04K\x01.", bytes(range(256)) * 4])
def test_garbage_is_an_error(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "result"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"path .*result.* cannot be read"):
        pf.load(path, gaussian)


@pytest.mark.parametrize("missing", ["nothing here", "."])
def test_files_that_are_not_there_are_an_error(missing: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"path .* cannot be read"):
        pf.load(tmp_path / missing, gaussian)


def test_truncated_files_are_an_error(tmp_path: Path) -> None:
    path = saved(tmp_path)
    data = path.read_bytes()
    for size in (4, 100, len(data) - 1):
        path.write_bytes(data[:size])
        with pytest.raises(ValueError, match=r"path .* cannot be read"):
            pf.load(path, gaussian)


class Bomb:
    """Write a file when unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return (Path.touch, (self.path,))


def dump(bomb: Bomb, path: Path) -> None:
    path.write_bytes(pickle.dumps(bomb))


@pytest.mark.parametrize("save", [torch.save, dump])
def test_pickles_are_refused_unread(save: Callable, tmp_path: Path) -> None:
    save(Bomb(tmp_path / "exploded"), tmp_path / "result")
    with pytest.raises(ValueError, match="cannot be read"):
        pf.load(tmp_path / "result", gaussian)
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}, {"format": "pyroflows.Other/1"}])
def test_foreign_files_are_an_error(metadata: dict | None, tmp_path: Path) -> None:
    save_file({"weight": torch.zeros(3)}, tmp_path / "result", metadata=metadata)
    with pytest.raises(ValueError, match=r"must hold a pyroflows\.VariationalPosterior/2"):
        pf.load(tmp_path / "result", gaussian)


def tampered(
    path: Path,
    change: Callable[[dict], Any] = lambda content: None,
    drop: tuple[str, ...] = (),
    text: str | None = None,
) -> Path:
    """Change the JSON of a file, or the tensors that it holds."""
    tensors = load_file(path)
    with safe_open(path, framework="pt") as file:
        metadata = dict(file.metadata())
    content = json.loads(metadata["json"])
    change(content)
    metadata["json"] = json.dumps(content) if text is None else text
    save_file({k: v for k, v in tensors.items() if k not in drop}, path, metadata=metadata)
    return path


def test_tampering_nothing_changes_nothing(tmp_path: Path) -> None:
    assert pf.load(tampered(saved(tmp_path)), gaussian).draws.shape == (100, 3)


@pytest.mark.parametrize("name", ["AutoNormal", "os.system", "__builtins__", "FORMAT", ""])
def test_unknown_guides_are_an_error(name: str, tmp_path: Path) -> None:
    path = tampered(saved(tmp_path), lambda content: content["guide"].update({"class": name}))
    with pytest.raises(ValueError, match=f"unknown guide {name!r}"):
        pf.load(path, gaussian)


@pytest.mark.parametrize("name", ["Missing", "functional", "Module.apply", "__name__", "Parameter"])
def test_unknown_activations_are_an_error(name: str, tmp_path: Path) -> None:
    def change(content: dict) -> None:
        content["guide"]["options"]["activation"] = {"torch.nn": name}

    with pytest.raises(ValueError, match=f"unknown activation {name!r}"):
        pf.load(tampered(saved(tmp_path), change), gaussian)


@pytest.mark.parametrize("options", [{"flow": "missing"}, {"surprise": 1}, {"num_layers": "2"}])
def test_unknown_options_are_an_error(options: dict, tmp_path: Path) -> None:
    path = saved(tmp_path)
    tampered(
        path, lambda content: content["guide"].update({"class": "AutoFlow", "options": options})
    )
    with pytest.raises(ValueError, match=r"result\.safetensors|unknown flow"):
        pf.load(path, gaussian)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"guide": {}}', "null"])
def test_files_with_broken_json_are_an_error(text: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"result\.safetensors"):
        pf.load(tampered(saved(tmp_path), text=text), gaussian)


@pytest.mark.parametrize("name", ["losses", "draws", "log_p", "log_q"])
def test_files_without_a_tensor_are_an_error(name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"result\.safetensors"):
        pf.load(tampered(saved(tmp_path), drop=(name,)), gaussian)


def test_files_without_an_argument_are_an_error(tmp_path: Path) -> None:
    path = saved(tmp_path, conjugate, Y)
    argument = tuple(name for name in load_file(path) if name.startswith("args."))
    assert len(argument) == 1
    with pytest.raises(ValueError, match=r"result\.safetensors"):
        pf.load(tampered(path, drop=argument), conjugate)


@pytest.mark.parametrize("value", [{"tensor": "missing"}, {"eval": "1"}, {"dict": 3}, {}])
def test_files_with_unknown_kinds_of_arguments_are_an_error(value: Any, tmp_path: Path) -> None:
    path = saved(tmp_path, conjugate, HEIGHTS)
    with pytest.raises(ValueError, match=r"result\.safetensors"):
        pf.load(tampered(path, lambda content: content.update(args={"tuple": [value]})), conjugate)
