"""The prior of a simulator as a Pyro model of its own."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

import pyro
from pyro import poutine
from torch import Tensor


class Prior:
    """Sample the parameters of a simulator, and hide everything else it does.

    Parameters
    ----------
    simulator, args, kwargs
        The model.
    names
        The parameter sites.
    """

    def __init__(
        self,
        simulator: Callable,
        names: Collection[str],
        args: tuple = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        self.simulator = simulator
        self.names = frozenset(names)
        self.args = args
        self.kwargs = dict(kwargs or {})

    def __call__(self) -> dict[str, Tensor]:
        """Sample each parameter site; return the values by name."""
        values = _Values(self.names)
        with values, poutine.block(hide_fn=lambda msg: msg["name"] not in self.names):
            self.simulator(*self.args, **self.kwargs)
        return values.found


class _Values(pyro.poutine.messenger.Messenger):
    def __init__(self, names: Collection[str]) -> None:
        super().__init__()
        self.names = names
        self.found: dict[str, Tensor] = {}

    def _pyro_post_sample(self, msg: dict) -> None:
        if msg["name"] in self.names:
            self.found[msg["name"]] = msg["value"]
