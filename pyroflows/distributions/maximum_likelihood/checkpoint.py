"""The state of a training, in memory and in a file."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ... import tensor_file
from .data import Rows
from .settings import Settings

FORMAT = "pyroflows.DensityTraining/1"
SECONDS_BETWEEN_WRITES = 30.0
_GROUPS = ("weights", "best", "average", "optimizer")


@dataclass(frozen=True)
class State:
    """Hold all that the rest of a training depends on."""

    weights: dict[str, Tensor]
    best: dict[str, Tensor]
    average: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    losses: Tensor
    validation_losses: Tensor
    validation_steps: Tensor
    best_step: int = 0
    best_loss: float = math.inf
    clip: float = math.inf
    recoveries: int = 0
    seconds: float = 0.0

    @property
    def step(self) -> int:
        """Return the number of steps made."""
        return len(self.losses)


class Checkpoint:
    """Keep the state of a training in a file of tensors and JSON.

    Raises
    ------
    ValueError
        If the file cannot be read or written, or belongs to another training.
    """

    def __init__(
        self, path: str | Path, settings: Settings, training: Rows, validation: Rows
    ) -> None:
        self.path = Path(path)
        self.identity = {**asdict(settings), "data": _digest(training, validation)}
        self.written = -math.inf

    def read(self) -> State | None:
        """Return the state in the file; ``None`` if there is no file yet."""
        if not self.path.exists():
            return None
        tensors, content = tensor_file.read(self.path, FORMAT, "checkpoint")
        try:
            self._check_identity(content["identity"])
            return _unpack(tensors, content["numbers"])
        except (KeyError, TypeError) as error:
            message = f"checkpoint {str(self.path)!r} holds a damaged training: {error!r}"
            raise ValueError(message) from error

    def _check_identity(self, identity: Mapping) -> None:
        for name, expected in self.identity.items():
            if identity.get(name) != expected:
                raise ValueError(
                    f"checkpoint {str(self.path)!r} belongs to another training, of {name} "
                    f"{identity.get(name)!r}, got {expected!r}: give the same, or another path"
                )

    def write(self, state: State, at_once: bool) -> None:
        """Write a state, unless one was written a moment ago."""
        if not at_once and time.monotonic() - self.written < SECONDS_BETWEEN_WRITES:
            return
        tensors, numbers = _pack(state)
        content = {"identity": self.identity, "numbers": numbers}
        tensor_file.write(self.path, FORMAT, tensors, content, "checkpoint")
        self.written = time.monotonic()


def _pack(state: State) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Return the tensors and the numbers of a state, by name."""
    tensors, numbers = {}, {}
    for name, value in vars(state).items():
        if isinstance(value, dict):
            tensors.update({f"{name}.{key}": tensor for key, tensor in value.items()})
        elif isinstance(value, Tensor):
            tensors[name] = value
        else:
            numbers[name] = value
    return tensors, numbers


def _unpack(tensors: Mapping[str, Tensor], numbers: Mapping[str, float]) -> State:
    """Return the state that :func:`_pack` was given."""
    fields: dict[str, Any] = {**numbers, **{group: {} for group in _GROUPS}}
    for name, tensor in tensors.items():
        group, _, key = name.partition(".")
        if key:
            fields[group][key] = tensor
        else:
            fields[name] = tensor
    return State(**fields)


def _digest(*parts: Rows) -> str:
    """Identify rows of data by what they hold."""
    digest = hashlib.sha256()
    for rows in parts:
        for tensor in (rows.data, rows.context):
            if tensor is not None:
                digest.update(repr((tensor.dtype, tuple(tensor.shape))).encode())
                digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()
