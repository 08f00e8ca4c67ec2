"""The data of a plate, as a guide reads them through its model: a minibatch, or all in turn."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.poutine.indep_messenger import CondIndepStackFrame
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor

NUM_FIRST_DATA = 1000  # that features are standardised by


@dataclass(frozen=True)
class Minibatch:
    """Hold the place of some data in their plate, and their features, shape ``(B, F)``."""

    frame: CondIndepStackFrame
    index: Tensor
    features: Tensor

    def plate(self) -> pyro.plate:
        """Return the plate of these data; their indices are on record already."""
        frame = self.frame
        with poutine.block():
            return pyro.plate(frame.name, frame.full_size, subsample=self.index, dim=frame.dim)


class PlateReader:
    """Read the features of the data in a plate by running the model, without gradients.

    Parameters
    ----------
    model
        A Pyro model.
    plate
        Name of the plate.
    features
        Returns the features ``(B, F)`` for the indices of ``B`` data and the arguments of the
        model. Default: what the model observes of each datum.
    """

    def __init__(self, model: Callable, plate: str, features: Callable[..., Tensor] | None) -> None:
        if not isinstance(plate, str):
            raise TypeError(f"plate must be the name of a plate, got {type(plate).__name__}")
        if features is not None and not callable(features):
            raise TypeError(f"features must be a callable, got {type(features).__name__}")
        self.model = model
        self.plate = plate
        self.features = features

    @torch.no_grad()
    def read(self, args: tuple, kwargs: Mapping[str, Any]) -> Minibatch:
        """Run the model for the data of a minibatch; handlers outside see nothing but its indices.

        They record these for the model, or bring them back in a replay.
        """
        run = poutine.block(poutine.trace(self.model).get_trace, expose_fn=self._is_index)
        trace = run(*args, **kwargs)
        sites = [site for site in trace.nodes.values() if site["type"] == "sample"]
        inside = [site for site in sites if frame_of(site, self.plate)]
        if not inside:
            plates = [site["name"] for site in sites if site_is_subsample(site)]
            raise ValueError(
                f"plate must name one that holds sites of the model, got {self.plate!r}; the "
                f"model's plates: {plates}"
            )
        frame, index = frame_of(inside[0], self.plate), trace.nodes[self.plate]["value"]
        if not frame.vectorized:
            raise ValueError(
                f"plate {self.plate!r} is sequential: write 'with pyro.plate({self.plate!r}, ...)'"
            )
        if self.features is None:
            return Minibatch(frame, index, _observed_features(inside, frame))
        features = self.features(index, *args, **kwargs)
        if features.dim() != 2 or len(features) != frame.size:
            raise ValueError(
                f"features must return a tensor of shape ({frame.size}, F), a row for each index, "
                f"got one of shape {tuple(features.shape)}"
            )
        return Minibatch(frame, index, features)

    def sweep(self, args: tuple, kwargs: Mapping[str, Any]) -> Iterator[Minibatch]:
        """Yield all data of the plate, in pieces of the size of the model's minibatch."""
        start, size = 0, 1
        while start < size:
            with poutine.block(), Consecutive(self.plate, start) as consecutive:
                minibatch = self.read(args, kwargs)
            frame = minibatch.frame
            yield replace(minibatch, features=minibatch.features[: frame.full_size - start])
            start += frame.size
            size = frame.full_size if consecutive.has_chosen else 0

    def read_all(self, args: tuple, kwargs: Mapping[str, Any]) -> Tensor:
        """Return the features ``(N, F)`` of all data of the plate."""
        minibatches = list(self.sweep(args, kwargs))
        features = torch.cat([minibatch.features for minibatch in minibatches])
        full_size = minibatches[0].frame.full_size
        if len(features) != full_size:
            raise ValueError(
                f"the model fixes {len(features)} of the {full_size} indices of plate "
                f"{self.plate!r}: leave the choice to pyro.plate(..., subsample_size=...)"
            )
        return features

    def moments(
        self, minibatch: Minibatch, args: tuple, kwargs: Mapping[str, Any]
    ) -> tuple[Tensor, Tensor]:
        """Return the mean and the standard deviation of the features of about 1000 data."""
        frame, rows = minibatch.frame, [minibatch.features]
        with poutine.block():
            while frame.size < frame.full_size and len(rows) * frame.size < NUM_FIRST_DATA:
                rows.append(self.read(args, kwargs).features)
        features = torch.cat(rows).double()
        if not bool(features.isfinite().all()):
            raise ValueError(
                f"the data of plate {self.plate!r} hold NaN or infinities, which the encoder "
                "cannot read: give features=..., a function that returns finite ones"
            )
        deviation, mean = torch.std_mean(features, dim=0, correction=0)
        # What does not vary is only shifted.
        return mean, torch.where(deviation > 0, deviation, 1.0)

    def _is_index(self, msg: dict) -> bool:
        return msg["name"] == self.plate and site_is_subsample(msg)


class Consecutive(Messenger):
    """Choose consecutive data of a plate, from a given one on, where the model leaves the choice.

    The last minibatch goes on with the first data.
    """

    def __init__(self, plate: str, start: int) -> None:
        super().__init__()
        self.plate = plate
        self.start = start
        self.has_chosen = False

    def _pyro_sample(self, msg: dict) -> None:
        if msg["name"] == self.plate and site_is_subsample(msg) and msg["value"] is None:
            size, step = msg["fn"].size, msg["fn"].subsample_size
            stop = self.start + (size if step is None else step)
            msg["value"] = torch.arange(self.start, stop, device=msg["fn"].device) % size
            self.has_chosen = True


def frame_of(msg: Mapping[str, Any], plate: str) -> Any:
    """Return the frame of a plate around a site, if it lies in it."""
    return next((frame for frame in msg["cond_indep_stack"] if frame.name == plate), None)


def _observed_features(sites: list[dict], frame: CondIndepStackFrame) -> Tensor:
    """Return what sites in a plate observe of each of its ``B`` data, of shape ``(B, F)``."""
    columns = []
    for site in sites:
        if not site["is_observed"] or site["infer"].get("_deterministic"):
            continue
        for other in site["cond_indep_stack"]:
            if other.name != frame.name and other.size != other.full_size:
                raise ValueError(
                    f"site {site['name']!r} is observed in plate {other.name!r} too, which is "
                    f"subsampled, {other.size} of {other.full_size}: the encoder needs all that "
                    "is observed of a datum; drop the subsampling, or give features=..."
                )
        value = site["value"].expand(site["fn"].shape())
        value = value.movedim(frame.dim - site["fn"].event_dim, 0)
        columns.append(value.reshape(frame.size, value[:1].numel()))
    if not any(column.shape[1] for column in columns):
        raise ValueError(
            f"the model observes nothing in plate {frame.name!r} that an encoder could read: give "
            "features=..., a function that returns what is known of each datum"
        )
    return torch.cat(columns, -1)
