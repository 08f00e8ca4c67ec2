"""Draws from a simulator: parameters and what was observed with them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from ... import tensor_file
from ...diagnostics.frames import frame
from .export import export

FORMAT = "pyroflows.Simulations/1"


@dataclass(frozen=True, eq=False)
class Simulations:
    """Hold draws of parameters and of the observations simulated with them.

    Attributes
    ----------
    parameters
        From parameter sites to draws of shape ``(N, *shape)``, in the site's own space.
    observations
        From observed sites to simulated values of shape ``(N, *shape)``.
    num_invalid
        How many draws were left out because a number was not finite.
    dims
        Names of the dimensions in ``shape`` by site, where they are known: those of plates after
        the plate.

    Raises
    ------
    ValueError
        If the numbers of draws differ.

    Examples
    --------
    >>> simulations = Simulations({"theta": torch.zeros(5, 2)}, {"x": torch.zeros(5, 3)})
    >>> len(simulations), len(simulations[:2])
    (5, 2)
    """

    parameters: Mapping[str, Tensor]
    observations: Mapping[str, Tensor]
    num_invalid: int = 0
    dims: Mapping[str, Sequence[str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        sizes = {name: len(values) for name, values in self._sites()}
        if len(set(sizes.values())) > 1:
            raise ValueError(f"all sites must have the same number of draws, got {sizes}")

    def __len__(self) -> int:
        return len(next(iter(self.parameters.values())))

    def __getitem__(self, index: slice | Tensor) -> Simulations:
        return self._with(lambda values: values[index], num_invalid=0)

    def to(self, device: torch.device | str) -> Simulations:
        """Return the draws on a device."""
        return self._with(lambda values: values.to(device))

    def empty(self, num_draws: int) -> Simulations:
        """Return room for draws like these, to be filled."""
        return self._with(lambda v: v.new_empty(num_draws, *v.shape[1:]), num_invalid=0)

    def fill(self, rows: slice, draws: Simulations) -> Simulations:
        """Write draws into these rows, in place where the type of their numbers allows.

        Raises
        ------
        ValueError
            If a site has another shape.
        """
        return replace(
            self,
            parameters=_filled(self.parameters, rows, draws.parameters),
            observations=_filled(self.observations, rows, draws.observations),
        )

    @classmethod
    def concatenate(cls, parts: Iterable[Simulations]) -> Simulations:
        """Return the draws of several parts in a row.

        Raises
        ------
        ValueError
            If the shape of a site changes from part to part.
        """
        parts = list(parts)
        for part in parts:
            given = dict(part._sites())
            for name, values in parts[0]._sites():
                _check_shape(name, values, given[name])
        return cls(
            {n: torch.cat([part.parameters[n] for part in parts]) for n in parts[0].parameters},
            {n: torch.cat([part.observations[n] for part in parts]) for n in parts[0].observations},
            sum(part.num_invalid for part in parts),
            parts[0].dims,
        )

    def valid(self, keep_nan: bool = False) -> Simulations:
        """Return the draws in which every number is finite, with a count of the others.

        With ``keep_nan``, NaN in observations counts as finite.
        """
        groups = ((self.parameters, False), (self.observations, keep_nan))
        finite = torch.stack(
            [
                (values.isfinite() | (values.isnan() & nan)).unsqueeze(-1).flatten(1).all(1)
                for group, nan in groups
                for values in group.values()
            ]
        ).all(0)
        if bool(finite.all()):
            return self
        kept = self[finite.nonzero().squeeze(1)]
        return replace(kept, num_invalid=self.num_invalid + len(self) - len(kept))

    def save(self, path: str | Path) -> None:
        """Write the draws to a safetensors file."""
        tensors = {
            f"{group}.{name}": values
            for group in ("parameters", "observations")
            for name, values in getattr(self, group).items()
        }
        about = {"num_invalid": self.num_invalid, "dims": dict(self.dims)}
        tensor_file.write(path, FORMAT, tensors, about)

    @classmethod
    def load(cls, path: str | Path) -> Simulations:
        """Read draws from a file that :meth:`save` has written.

        Raises
        ------
        ValueError
            If it is not such a file.
        """
        tensors, about = tensor_file.read(path, FORMAT)
        groups: dict[str, dict[str, Tensor]] = {"parameters": {}, "observations": {}}
        for key, values in tensors.items():
            group, name = key.split(".", 1)
            groups[group][name] = values
        # Files of earlier versions do not name dimensions.
        return cls(**groups, num_invalid=about["num_invalid"], dims=about.get("dims", {}))

    def to_frame(self) -> pd.DataFrame:
        """Return parameters and observations as a table, a row for each draw."""
        return frame(dict(self._sites()))

    def to_arviz(
        self,
        *,
        x: Tensor | Mapping[str, Tensor] | None = None,
        dims: Mapping[str, Sequence[str]] | None = None,
        coords: Mapping[str, Sequence[Any]] | None = None,
    ) -> Any:
        """Return the draws as ArviZ data, in the groups ``prior`` and ``prior_predictive``.

        Parameters
        ----------
        x
            What was observed: a tensor for one observed site, else a dict of tensors, each of shape
            ``(*shape)``. It becomes ``observed_data``, for prior predictive checks.
        dims
            Names of the dimensions of a site, instead of those of its plates.
        coords
            Labels of dimensions.

        Returns
        -------
        arviz.InferenceData or xarray.DataTree
            The former with ArviZ 0.x, the latter with ArviZ 1.x.
        """
        groups = {"prior": self.parameters, "prior_predictive": self.observations}
        if x is not None:
            observed = x if isinstance(x, Mapping) else {next(iter(self.observations)): x}
            groups["observed_data"] = {n: torch.as_tensor(v) for n, v in observed.items()}
        names = {**self.dims, **(dims or {})}
        return export(groups, {"num_invalid": self.num_invalid}, dims=names, coords=coords)

    def _with(self, change: Callable[[Tensor], Tensor], **changes: Any) -> Simulations:
        """Return the same with the values of all sites changed."""
        return replace(
            self,
            parameters={name: change(values) for name, values in self.parameters.items()},
            observations={name: change(values) for name, values in self.observations.items()},
            **changes,
        )

    def _sites(self) -> list[tuple[str, Tensor]]:
        return [*self.parameters.items(), *self.observations.items()]


def _filled(
    room: Mapping[str, Tensor], rows: slice, draws: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    filled = {}
    for name, values in room.items():  # sites from a file come in another order
        _check_shape(name, values, draws[name])
        # A simulator may give whole numbers at first, and others later.
        filled[name] = values.to(torch.promote_types(values.dtype, draws[name].dtype))
        filled[name][rows] = draws[name]
    return filled


def _check_shape(name: str, values: Tensor, other: Tensor) -> None:
    if values.shape[1:] != other.shape[1:]:
        raise ValueError(
            f"site {name!r} must have one shape in all draws, got {tuple(values.shape[1:])} and "
            f"{tuple(other.shape[1:])}; pad the shorter ones"
        )
