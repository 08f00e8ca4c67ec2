"""Trained posteriors in files: tensors and JSON, never code."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

FORMAT = "pyroflows.Posterior/1"


def write(path: str | Path, state: Mapping[str, Tensor], about: Mapping[str, Any]) -> None:
    """Write a state and what it belongs to, at once or not at all.

    Raises
    ------
    ValueError
        If the file cannot be written.
    """
    tensors = {name: tensor.cpu().contiguous().clone() for name, tensor in state.items()}
    temporary = Path(f"{path}.part")
    try:
        save_file(tensors, temporary, {"format": FORMAT, "json": json.dumps(about)})
        temporary.replace(path)
    except (OSError, SafetensorError) as error:
        temporary.unlink(missing_ok=True)
        raise ValueError(f"path {str(path)!r} cannot be written: {error}") from error


def read(path: str | Path, about: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the state in a file and what it belongs to, which must agree with ``about``.

    Raises
    ------
    ValueError
        If the file cannot be read, holds something else, or belongs to another estimator.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise ValueError(f"path {str(path)!r} cannot be read: {error}") from error
    if metadata.get("format") != FORMAT:
        raise ValueError(
            f"path {str(path)!r} must hold a {FORMAT}, got format {metadata.get('format')!r}"
        )
    found, expected = json.loads(metadata["json"]), json.loads(json.dumps(about))
    for name, value in expected.items():
        if found.get(name) != value:
            raise ValueError(
                f"path {str(path)!r} belongs to another estimator, of {name} {found.get(name)!r}, "
                f"got {value!r}"
            )
    return state, found
