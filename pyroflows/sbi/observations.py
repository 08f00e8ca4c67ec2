"""The observations of a simulator as tensors that networks can read."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from pyro import poutine
from torch import Tensor, nn


class ObservationSpace:
    """Turn the values of observed sites into one tensor, and tell whether it is a set.

    Sites in a plate are exchangeable: they become a set, a row for each element of the plate. All
    others become one vector.

    Parameters
    ----------
    shapes
        From observed sites to their shapes.
    is_set
        Whether the first dimension of each site runs over exchangeable elements.

    Examples
    --------
    >>> space = ObservationSpace({"x": torch.Size([4, 2])}, is_set=True)
    >>> space.tensor({"x": torch.zeros(10, 4, 2)}).shape
    torch.Size([10, 4, 2])
    """

    def __init__(self, shapes: Mapping[str, torch.Size], is_set: bool = False) -> None:
        self.shapes = dict(shapes)
        self.is_set = is_set

    @classmethod
    def of_model(
        cls,
        model: Callable,
        observed: Collection[str],
        args: tuple = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> ObservationSpace:
        """Read the shapes of the observed sites, and their plates, from a trace of a model."""
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            trace = poutine.block(poutine.trace(model).get_trace)(*args, **(kwargs or {}))
        sites = {name: trace.nodes[name] for name in observed}
        plates = {
            tuple(frame.name for frame in site["cond_indep_stack"] if frame.dim is not None)
            for site in sites.values()
        }
        shapes = {name: torch.as_tensor(site["value"]).shape for name, site in sites.items()}
        return cls(shapes, is_set=len(plates) == 1 and len(plates.pop()) == 1)

    @property
    def names(self) -> tuple[str, ...]:
        """Return the names of the sites."""
        return tuple(self.shapes)

    @property
    def size(self) -> int:
        """Return the number of entries of a vector, or of an element of a set."""
        return sum(shape[1 if self.is_set else 0 :].numel() for shape in self.shapes.values())

    @property
    def event_dim(self) -> int:
        """Return the number of dimensions of one observation as a tensor."""
        return 2 if self.is_set else 1

    def tensor(self, values: Tensor | Mapping[str, Tensor]) -> Tensor:
        """Return observations ``(*batch, V)``, or sets of them ``(*batch, n, V)``.

        Raises
        ------
        ValueError
            If a site is missing or has the wrong shape, or a number is not finite.
        """
        if isinstance(values, Tensor):
            if len(self.shapes) > 1:
                raise ValueError(f"x must be a dict with the sites {self.names}, got a tensor")
            values = {self.names[0]: values}
        return torch.cat([self._part(name, values) for name in self.shapes], -1)

    def _part(self, name: str, values: Mapping[str, Tensor]) -> Tensor:
        if name not in values:
            raise ValueError(f"x must hold the observed site {name!r}, got {sorted(values)}")
        value, shape = torch.as_tensor(values[name]), self.shapes[name]
        batch_dim = value.dim() - len(shape)
        fixed = 1 if self.is_set else 0  # the number of elements of a set may vary
        if batch_dim < 0 or value.shape[batch_dim + fixed :] != shape[fixed:]:
            raise ValueError(
                f"observed site {name!r} has shape {tuple(shape)}, got x of shape "
                f"{tuple(value.shape)}"
            )
        if not bool(value.isfinite().all()):
            raise ValueError(f"observed site {name!r} must be finite, got NaN or inf in x")
        size = shape[fixed:].numel()
        kept = value.shape[: batch_dim + fixed]
        return value.reshape((*kept, size)).to(torch.get_default_dtype())


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
        """Read the scales from simulated observations, shape ``(N, ..., V)``."""
        rows = x.reshape(-1, x.shape[-1]).double()
        levels = torch.tensor([0.25, 0.5, 0.75], dtype=rows.dtype, device=rows.device)
        low, median, high = torch.quantile(rows[:100_000], levels, dim=0)
        self.median.copy_(median)
        self.spread.copy_(_positive((high - low) / 1.349))
        self.compressed.copy_((rows - rows.mean(0)).abs().amax(0) > 10 * rows.std(0))
        deviation, mean = torch.std_mean(self._compress(rows), dim=0)
        self.loc.copy_(mean)
        self.scale.copy_(_positive(deviation))
        return self

    def forward(self, x: Tensor) -> Tensor:
        """Return observations in units of the simulations."""
        return (self._compress(x) - self.loc) / self.scale

    def _compress(self, x: Tensor) -> Tensor:
        inner = (x - self.median) / self.spread
        return torch.where(self.compressed > 0, inner.arcsinh(), inner)


def _positive(scale: Tensor) -> Tensor:
    return torch.where(scale > 0, scale, 1.0)
