"""The observations of a simulator as tensors that networks can read."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .exchangeable import exchangeable_sites, hidden_trace

MAX_QUANTILE_ENTRIES = 10_000_000  # torch sorts no more than 16 million at a time
MISSING = (None, "random", "simulated")


class ObservationSpace:
    """Turn the values of observed sites into one tensor, and tell whether it is a set.

    Sites in a plate of exchangeable elements become a set, a row for each element of the plate;
    sites outside the plate are repeated in each row. Without such a plate all sites together become
    one vector. Missing entries are NaN.

    Parameters
    ----------
    shapes
        From observed sites to their shapes.
    is_set
        Whether the first dimension of each site runs over exchangeable elements.
    common
        The sites outside the plate, where the others are in it.
    missing
        Why entries may be missing, see :class:`FlowMatching`. Default: none may.
    sizes
        The smallest and the largest number of elements of a set that are expected; others raise a
        warning. Default: any.

    Examples
    --------
    >>> space = ObservationSpace({"x": torch.Size([4, 2])}, is_set=True)
    >>> space.tensor({"x": torch.zeros(10, 4, 2)}).shape
    torch.Size([10, 4, 2])
    """

    def __init__(
        self,
        shapes: Mapping[str, torch.Size],
        is_set: bool = False,
        common: Collection[str] = (),
        missing: str | None = None,
        sizes: tuple[int, int] | None = None,
    ) -> None:
        self.shapes = dict(sorted(shapes.items(), key=lambda item: item[0] in common))
        self.is_set = is_set
        self.common = frozenset(common)
        self.missing = missing
        self.sizes = sizes

    @classmethod
    def of_model(
        cls,
        model: Callable,
        observed: Collection[str],
        args: tuple = (),
        kwargs: Mapping[str, Any] | None = None,
        parameters: Collection[str] = (),
    ) -> ObservationSpace:
        """Read the shapes of the observed sites, and their plates, from traces of a model."""
        trace = hidden_trace(model, args, kwargs or {})
        shapes = {name: torch.as_tensor(trace.nodes[name]["value"]).shape for name in observed}
        plated = exchangeable_sites(model, observed, parameters, args, kwargs)
        return cls(shapes, is_set=bool(plated), common=set(shapes) - plated if plated else ())

    def of_training(self, missing: str | None, min_size: int | None) -> ObservationSpace:
        """Return the space of observations with missing entries, or of sets of several sizes.

        Raises
        ------
        ValueError
            If ``missing`` is no known word, or ``min_size`` does not fit the model.
        """
        if missing not in MISSING:
            raise ValueError(f"missing must be one of {MISSING}, got {missing!r}")
        if not self.is_set:
            if min_size is not None:
                raise ValueError(
                    "min_size needs observed sites in a plate of exchangeable elements, got a "
                    "model without one"
                )
            return ObservationSpace(self.shapes, missing=missing)
        largest = next(iter(self.shapes.values()))[0]
        smallest = largest if min_size is None else min_size
        if not 1 <= smallest <= largest:
            raise ValueError(
                f"min_size must be at least 1 and at most the size of the plate, {largest}, got "
                f"{min_size}"
            )
        return ObservationSpace(self.shapes, True, self.common, missing, (smallest, largest))

    @property
    def names(self) -> tuple[str, ...]:
        """Return the names of the sites."""
        return tuple(self.shapes)

    @property
    def size(self) -> int:
        """Return the number of entries of a vector, or of an element of a set."""
        return sum(self._event_shape(name).numel() for name in self.shapes)

    @property
    def common_size(self) -> int:
        """Return the number of entries, the last ones, that all elements of a set share."""
        return sum(self.shapes[name].numel() for name in self.common)

    @property
    def event_dim(self) -> int:
        """Return the number of dimensions of one observation as a tensor."""
        return 2 if self.is_set else 1

    def tensor(self, values: Any) -> Tensor:
        """Return observations ``(*batch, V)``, or sets of them ``(*batch, n, V)``.

        Parameters
        ----------
        values
            From sites to tensors or arrays ``(*batch, *shape)``; for one site, these themselves.

        Raises
        ------
        ValueError
            If a site is missing or has the wrong shape, or a number is not finite; sites differ in
            their batch or number of elements; or a set is empty.
        TypeError
            If a value is not made of numbers.
        """
        if not isinstance(values, Mapping):
            if len(self.shapes) > 1:
                kind = type(values).__name__
                raise ValueError(f"x must be a dict with the sites {self.names}, got a {kind}")
            values = {self.names[0]: values}
        parts = {name: self._part(name, values) for name in self.shapes}
        if self.is_set:
            parts = self._in_rows(parts)
        if len({part.shape[:-1] for part in parts.values()}) > 1:
            shapes = {name: tuple(torch.as_tensor(values[name]).shape) for name in parts}
            raise ValueError(f"observed sites must have the same batch shape, got x of {shapes}")
        return torch.cat([*parts.values()], -1)

    def _event_shape(self, name: str) -> torch.Size:
        """Return the shape of a site, less the plate."""
        return self.shapes[name][1:] if self._in_plate(name) else self.shapes[name]

    def _in_plate(self, name: str) -> bool:
        return self.is_set and name not in self.common

    def _part(self, name: str, values: Mapping[str, Any]) -> Tensor:
        if name not in values:
            raise ValueError(f"x must hold the observed site {name!r}, got {sorted(values)}")
        value, shape = _numbers(name, values[name]), self.shapes[name]
        batch_dim = value.dim() - len(shape)
        fixed = 1 if self._in_plate(name) else 0  # the number of elements of a set may vary
        if batch_dim < 0 or value.shape[batch_dim + fixed :] != shape[fixed:]:
            raise ValueError(
                f"observed site {name!r} has shape {tuple(shape)}, got x of shape "
                f"{tuple(value.shape)}"
            )
        if not bool((value.isfinite() | value.isnan() if self.missing else value.isfinite()).all()):
            what = "finite or NaN, got inf" if self.missing else "finite, got NaN or inf"
            remedy = "" if self.missing else "; where entries may be missing, train with missing="
            raise ValueError(f"observed site {name!r} must be {what} in x{remedy}")
        size = shape[fixed:].numel()
        kept = value.shape[: batch_dim + fixed]
        return value.reshape((*kept, size)).to(torch.get_default_dtype())

    def _in_rows(self, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Give each element of a set what is common to all."""
        numbers = {name: parts[name].shape[-2] for name in parts if name not in self.common}
        if len(set(numbers.values())) > 1:
            raise ValueError(
                f"observed sites in one plate must have the same number of elements, got {numbers}"
            )
        number = next(iter(numbers.values()))
        self._check_number(number)
        return {
            name: part.unsqueeze(-2).expand(*part.shape[:-1], number, -1)
            if name in self.common
            else part
            for name, part in parts.items()
        }

    def _check_number(self, number: int) -> None:
        if number < 1:
            raise ValueError("x must hold at least one element of the plate, got none")
        if self.sizes is not None and not self.sizes[0] <= number <= self.sizes[1]:
            trained = " to ".join(str(size) for size in dict.fromkeys(self.sizes))
            warnings.warn(
                f"x holds {number} elements of the plate, trained was on {trained}: the posterior "
                "is a guess; simulate as many elements, and train with min_size=",
                stacklevel=5,
            )


def _numbers(name: str, value: Any) -> Tensor:
    try:
        return torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError) as error:
        kind = type(value).__name__
        raise TypeError(f"observed site {name!r} must be a tensor or array, got {kind}") from error


class Standardizer(nn.Module):
    r"""Bring observations to scale: :math:`(x - m) / s`, compressed where tails are heavy.

    Entries with standardised values beyond 10 in the simulations go through
    :math:`\mathrm{arsinh}(x - m') / s'` in units of their median and interquartile range first.

    Parameters
    ----------
    size
        Number of entries of a vector, or of an element of a set.

    Examples
    --------
    >>> standard = Standardizer(1).fit(torch.tensor([[1.0], [3.0]]))
    >>> standard(torch.tensor([2.0]))
    tensor([0.])
    """

    median: Tensor
    spread: Tensor
    compressed: Tensor
    loc: Tensor
    scale: Tensor

    def __init__(self, size: int) -> None:
        super().__init__()
        self.register_buffer("median", torch.zeros(size))
        self.register_buffer("spread", torch.ones(size))
        self.register_buffer("compressed", torch.zeros(size))
        self.register_buffer("loc", torch.zeros(size))
        self.register_buffer("scale", torch.ones(size))

    @torch.no_grad()
    def fit(self, x: Tensor) -> Standardizer:
        """Read the scales from simulated observations, shape ``(N, ..., V)``, all but NaN."""
        rows = x.reshape(-1, x.shape[-1]).double()
        levels = torch.tensor([0.25, 0.5, 0.75], dtype=rows.dtype, device=rows.device)
        some = rows[: max(1, MAX_QUANTILE_ENTRIES // rows.shape[1])]
        low, median, high = torch.nanquantile(some, levels, dim=0).nan_to_num()
        self.median.copy_(median)
        self.spread.copy_(_positive((high - low) / 1.349))
        mean, deviation = _moments(rows)
        self.compressed.copy_((rows - mean).abs().nan_to_num().amax(0) > 10 * deviation)
        mean, deviation = _moments(self._compress(rows))
        self.loc.copy_(mean)
        self.scale.copy_(_positive(deviation))
        return self

    def forward(self, x: Tensor) -> Tensor:
        """Return observations in units of the simulations."""
        return (self._compress(x) - self.loc) / self.scale

    def _compress(self, x: Tensor) -> Tensor:
        inner = (x - self.median) / self.spread
        return torch.where(self.compressed > 0, inner.arcsinh(), inner)


def _moments(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and deviation of what is there, 0 where nothing is."""
    mean = rows.nanmean(0).nan_to_num()
    return mean, (rows - mean).square().nanmean(0).nan_to_num().sqrt()


def _positive(scale: Tensor) -> Tensor:
    return torch.where(scale > 0, scale, 1.0)
