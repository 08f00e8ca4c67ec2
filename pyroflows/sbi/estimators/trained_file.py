"""Files of trained densities, and whether they belong to an estimator."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ... import tensor_file


def read_trained(
    path: str | Path, format: str, expected: Mapping[str, Any]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read weights, and what is said about them.

    Raises
    ------
    ValueError
        If the file holds something else, or says other than expected.
    """
    state, about = tensor_file.read(path, format)
    for name, value in expected.items():
        if about.get(name) != value:
            raise ValueError(
                f"path {str(path)!r} belongs to another estimator, of {name} "
                f"{about.get(name)!r}, got {value!r}"
            )
    return state, about


def load_weights(density: Any, state: Mapping[str, Tensor], path: str | Path) -> None:
    """Give a density the weights of a file.

    Raises
    ------
    ValueError
        If they are those of other networks.
    """
    try:
        density.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(
            f"path {str(path)!r} belongs to an estimator of other networks: {error}"
        ) from error
