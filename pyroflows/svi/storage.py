"""Results in files: tensors and JSON, never code."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pyro.infer.autoguide import AutoDiagonalNormal, AutoMultivariateNormal
from torch import Tensor, nn

from .. import guides, tensor_file
from ..nn import activation as activations
from ..random_state import preserved
from .density import ModelDensity

FORMAT = "pyroflows.VariationalPosterior/2"

_ACTIVATIONS = {"torch.nn": nn, "pyroflows.nn": activations}
_GUIDES = {
    cls.__name__: cls
    for cls in (
        *(
            c
            for c in vars(guides).values()
            if inspect.isclass(c) and issubclass(c, guides.AutoFlow)
        ),
        AutoDiagonalNormal,
        AutoMultivariateNormal,
    )
}


def write(path: str | Path, density: ModelDensity, tensors: Mapping[str, Tensor]) -> None:
    """Write a model's arguments, its guide and tensors to a file, at once or not at all.

    Learned parameters of the model are written too, the model is not.

    Raises
    ------
    TypeError
        If the guide or an argument cannot be written as tensors and JSON.
    ValueError
        If ``path`` cannot be written.
    """
    content = {**tensors, **_parameters(density)}
    content.update({f"guide.{name}": value for name, value in density.guide.state_dict().items()})
    metadata = {
        "guide": _describe_guide(density.guide),
        "args": _encode(density.args, "args", content),
        "kwargs": _encode(density.kwargs, "kwargs", content),
        "sites": _site_shapes(density),
    }
    tensor_file.write(path, FORMAT, content, metadata)


def read(
    path: str | Path, model: Callable, names: Sequence[str]
) -> tuple[ModelDensity, list[Tensor]]:
    """Read a file written by :func:`write`; no code in it is executed, for there is none.

    Parameters
    ----------
    path
        The file.
    model
        The model it belongs to, whose learned parameters are put back in place.
    names
        The tensors to return, besides the model with its guide.

    Raises
    ------
    ValueError
        If the file cannot be read, holds something else, lacks one of the tensors, or belongs to
        another model.
    """
    tensors, content = tensor_file.read(path, FORMAT)
    try:
        wanted = [tensors[name] for name in names]
        guide = _build_guide(content["guide"], model)
        args, kwargs = (_decode(content[key], tensors) for key in ("args", "kwargs"))
        sites = content["sites"]
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"path {str(path)!r} holds a damaged result: {error!r}") from error
    try:
        with preserved():
            density = ModelDensity(model, guide, args, kwargs)
        if (shapes := _site_shapes(density)) != sites:
            raise ValueError(f"its sites are {sites}, the model's {shapes}")
        _fill(density, tensors)
    except (KeyError, RuntimeError, TypeError, ValueError) as error:
        foreign = f"path {str(path)!r} holds the result of another model"
        raise ValueError(f"{foreign}: {error}") from error
    return density, wanted


def _fill(density: ModelDensity, tensors: Mapping[str, Tensor]) -> None:
    """Give the guide its weights, and the model its learned parameters."""
    weights = {k.removeprefix("guide."): v for k, v in tensors.items() if k.startswith("guide.")}
    density.guide.load_state_dict(weights)
    with torch.no_grad():
        for name, parameter in _parameters(density).items():
            parameter.copy_(tensors[name])


def _parameters(density: ModelDensity) -> dict[str, Tensor]:
    return {f"model.{i}": parameter for i, parameter in enumerate(density.parameters())}


def _site_shapes(density: ModelDensity) -> dict[str, list[int]]:
    return {name: list(site["value"].shape) for name, site in density.sites.items()}


def _describe_guide(guide: nn.Module) -> dict[str, Any]:
    name = type(guide).__name__
    if isinstance(guide, guides.AmortizedFlow):
        raise TypeError(
            "an AmortizedFlow reads data through its model and cannot be saved: save "
            "guide.state_dict() and load it into a new guide of the same model"
        )
    if _GUIDES.get(name) is not type(guide):
        raise TypeError(f"guide must be one of {sorted(_GUIDES)} to be saved, got {name}")
    if not isinstance(guide, guides.AutoFlow):
        return {"class": name, "options": {}}
    if guide.base is not None or not isinstance(guide.flow, str):
        raise TypeError(
            "a guide with a base distribution or a flow function of its own cannot be saved: "
            "save guide.state_dict() and rebuild the guide in code"
        )
    options = {key: _encode_option(key, value) for key, value in guide.options.items()}
    if type(guide) is guides.AutoFlow:
        options["flow"] = guide.flow
    return {"class": name, "options": options}


def _build_guide(description: Mapping[str, Any], model: Callable) -> Any:
    if description["class"] not in _GUIDES:
        raise ValueError(f"the file names an unknown guide {description['class']!r}")
    options = {key: _decode_option(value) for key, value in description["options"].items()}
    return _GUIDES[description["class"]](model, **options)


def _encode_option(key: str, value: Any) -> Any:
    name = getattr(value, "__name__", "")
    for room, module in _ACTIVATIONS.items():
        if name and getattr(module, name, None) is value:
            return {room: name}
    if isinstance(value, str | int | float | bool | None):
        return value
    if isinstance(value, list | tuple | range) and all(isinstance(v, int | float) for v in value):
        return list(value)
    raise TypeError(f"option {key} of the guide cannot be saved: {value!r}")


def _decode_option(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    for room, module in _ACTIVATIONS.items():
        activation = getattr(module, str(value.get(room)), None)
        if inspect.isclass(activation) and issubclass(activation, nn.Module):
            return activation
    (name,) = value.values()
    raise ValueError(f"the file names an unknown activation {name!r}")


def _encode(value: Any, key: str, tensors: dict[str, Tensor]) -> Any:
    """Turn an argument into JSON; tensors in it go to ``tensors`` and leave their key."""
    if isinstance(value, np.ndarray) and value.dtype.kind in "biuf":
        tensor = torch.from_numpy(np.array(value))  # a copy: arrays may be read-only
        return {"array": _encode(tensor, key, tensors)["tensor"]}
    if isinstance(value, Tensor):
        unique = f"{key}#{len(tensors)}"
        tensors[unique] = value
        return {"tensor": unique}
    if value is None or isinstance(value, str | int | float | bool):
        return value
    if isinstance(value, list | tuple):
        kind = "tuple" if isinstance(value, tuple) else "list"
        return {kind: [_encode(item, f"{key}.{i}", tensors) for i, item in enumerate(value)]}
    if isinstance(value, Mapping) and all(isinstance(name, str) for name in value):
        return {"dict": {name: _encode(v, f"{key}.{name}", tensors) for name, v in value.items()}}
    kind = f"array of {value.dtype}" if isinstance(value, np.ndarray) else type(value).__name__
    raise TypeError(
        f"{key} of the model cannot be saved: expected tensors, arrays of numbers, numbers, "
        f"strings, lists, tuples and dictionaries of these, got {kind}"
    )


def _decode(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "array":
        return tensors[content].numpy()
    if kind == "dict":
        return {name: _decode(item, tensors) for name, item in content.items()}
    if kind not in ("list", "tuple"):
        raise ValueError(f"unknown kind {kind!r} of argument")
    items = [_decode(item, tensors) for item in content]
    return tuple(items) if kind == "tuple" else items
