"""Results in files: tensors and JSON, never code."""

from __future__ import annotations

import inspect
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pyro.infer.autoguide import AutoDiagonalNormal, AutoMultivariateNormal
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from .. import guides
from .density import ModelDensity
from .posterior import VariationalPosterior

FORMAT = "pyroflows.VariationalPosterior/1"

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
_RESULT_TENSORS = ("losses", "draws", "log_p", "log_q")


def save(result: VariationalPosterior, path: str | Path) -> None:
    """Write a result to a file, replacing it at once or not at all."""
    tensors: dict[str, Tensor] = {name: getattr(result, name) for name in _RESULT_TENSORS}
    tensors.update({f"guide.{k}": v for k, v in result.guide.state_dict().items()})
    metadata = {
        "guide": _describe_guide(result.guide),
        "args": _encode(result.density.args, "args", tensors),
        "kwargs": _encode(result.density.kwargs, "kwargs", tensors),
    }
    path = Path(path)
    temporary = path.with_name(path.name + ".part")
    try:
        save_file(
            {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()},
            temporary,
            metadata={"format": FORMAT, "json": json.dumps(metadata)},
        )
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"path {str(path)!r} cannot be written: {error}") from error


def load(path: str | Path, model: Callable) -> VariationalPosterior:
    """Read a result written by :meth:`VariationalPosterior.save`.

    The file holds no code and loading it runs none but the model's.

    Parameters
    ----------
    path
        The file.
    model
        The Pyro model the result belongs to.

    Raises
    ------
    ValueError
        If the file cannot be read, is not such a result, or belongs to another model.

    Examples
    --------
    >>> import pyro, pyro.distributions as dist, pyroflows as pf, tempfile
    >>> def model():
    ...     pyro.sample("x", dist.Normal(0.0, 1.0))
    >>> result = pf.fit(model, pf.AutoRealNVP(model, num_layers=2), num_steps=10, progress=False)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     result.save(f"{folder}/result.safetensors")
    ...     again = pf.load(f"{folder}/result.safetensors", model)
    >>> again.elbo == result.elbo
    True
    """
    tensors, metadata = _read(path)
    args = _decode(metadata["args"], tensors)
    kwargs = _decode(metadata["kwargs"], tensors)
    guide = _build_guide(metadata["guide"], model)
    state = {k.removeprefix("guide."): v for k, v in tensors.items() if k.startswith("guide.")}
    with torch.random.fork_rng():
        density = ModelDensity(model, guide, args, kwargs)
    try:
        guide.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(
            f"path {str(path)!r} holds the result of another model: {error}"
        ) from error
    return VariationalPosterior(density, *(tensors[name] for name in _RESULT_TENSORS))


def _read(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise ValueError(f"path {str(path)!r} cannot be read: {error}") from error
    if metadata.get("format") != FORMAT:
        raise ValueError(
            f"path {str(path)!r} must hold a {FORMAT}, got format {metadata.get('format')!r}"
        )
    return tensors, json.loads(metadata["json"])


def _describe_guide(guide: nn.Module) -> dict[str, Any]:
    name = type(guide).__name__
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
    if name and getattr(nn, name, None) is value:
        return {"torch.nn": name}
    if isinstance(value, str | int | float | bool | None):
        return value
    if isinstance(value, list | tuple | range) and all(isinstance(v, int | float) for v in value):
        return list(value)
    raise TypeError(f"option {key} of the guide cannot be saved: {value!r}")


def _decode_option(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    activation = getattr(nn, value["torch.nn"], None)
    if not (inspect.isclass(activation) and issubclass(activation, nn.Module)):
        raise ValueError(f"the file names an unknown activation {value['torch.nn']!r}")
    return activation


def _encode(value: Any, key: str, tensors: dict[str, Tensor]) -> Any:
    """Turn an argument into JSON; tensors in it go to ``tensors`` and leave their key."""
    if isinstance(value, np.ndarray):
        return {"array": _encode(torch.as_tensor(value), key, tensors)["tensor"]}
    if isinstance(value, Tensor):
        tensors[key] = value
        return {"tensor": key}
    if value is None or isinstance(value, str | int | float | bool):
        return value
    if isinstance(value, list | tuple):
        kind = "tuple" if isinstance(value, tuple) else "list"
        return {kind: [_encode(item, f"{key}.{i}", tensors) for i, item in enumerate(value)]}
    if isinstance(value, Mapping) and all(isinstance(name, str) for name in value):
        return {"dict": {name: _encode(v, f"{key}.{name}", tensors) for name, v in value.items()}}
    raise TypeError(
        f"{key} of the model cannot be saved: expected tensors, arrays, numbers, strings, lists, "
        f"tuples and dictionaries of these, got {type(value).__name__}"
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
    items = [_decode(item, tensors) for item in content]
    return tuple(items) if kind == "tuple" else items
