"""Files of tensors and JSON: what every result is stored in, for no code can hide in them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor


def write(
    path: str | Path, format: str, tensors: Mapping[str, Tensor], content: Any, name: str = "path"
) -> None:
    """Write tensors and JSON to a file, at once or not at all.

    Raises
    ------
    ValueError
        If the file cannot be written; ``name`` is what the message calls it.
    """
    path = Path(path)
    temporary = path.with_name(path.name + ".part")
    try:
        save_file(
            {key: value.detach().cpu().contiguous().clone() for key, value in tensors.items()},
            temporary,
            metadata={"format": format, "json": json.dumps(content)},
        )
        temporary.replace(path)
    except (OSError, SafetensorError) as error:
        temporary.unlink(missing_ok=True)
        raise ValueError(f"{name} {str(path)!r} cannot be written: {error}") from error


def read(path: str | Path, format: str, name: str = "path") -> tuple[dict[str, Tensor], Any]:
    """Return the tensors and the JSON of a file.

    Raises
    ------
    ValueError
        If the file cannot be read, or is of another format.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{name} {str(path)!r} cannot be read: {error}") from error
    if metadata.get("format") != format:
        raise ValueError(
            f"{name} {str(path)!r} must hold a {format}, got format {metadata.get('format')!r}"
        )
    try:
        return tensors, json.loads(metadata["json"])
    except (KeyError, ValueError) as error:
        raise ValueError(f"{name} {str(path)!r} holds a damaged result: {error!r}") from error
