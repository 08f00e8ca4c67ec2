"""The log-density of a model with latent variables for each datum of a plate, over all data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.distributions import Unit
from torch import Tensor

from ..guides import AmortizedFlow
from ..guides.minibatch import Consecutive, frame_of
from .checks import check_shapes, check_sites
from .density import ModelDensity, is_deterministic, structure


class PlateDensity(ModelDensity):
    r"""Evaluate a model's joint log-density at latent variables of all data of a plate.

    As :class:`ModelDensity`, in the coordinates of :meth:`AmortizedFlow.get_posterior`. Where the
    plate is subsampled the model runs for one minibatch after the other until all data had their
    turn: the answer is that for the whole plate, whatever the minibatches.

    Parameters
    ----------
    model
        A Pyro model.
    guide
        An amortized guide; it is set up if need be.
    args, kwargs
        Arguments of the model.

    Raises
    ------
    TypeError
        If the guide is not an ``AmortizedFlow``.
    ValueError
        As :class:`ModelDensity`; if discrete sites are to be summed out, another plate is
        subsampled, or the model fixes the indices of a minibatch.
    """

    guide: AmortizedFlow
    min_weighted_draws = 1000
    remedies = (
        "The weights feel the errors of all data at once. Try more steps, a larger encoder "
        "(embedding_dim, encoder) or flow (num_layers, hidden_dims), or a reparametrised model."
    )

    @staticmethod
    def _check_guide(guide: Any) -> None:
        if not isinstance(guide, AmortizedFlow):
            raise TypeError(f"guide must be an AmortizedFlow, got {type(guide).__name__}")

    @torch.no_grad()
    def _set_up(self) -> None:
        with pyro.validation_enabled(False), poutine.block():
            if self.guide.prototype_trace is None:
                self.guide._setup_prototype(*self.args, **self.kwargs)
            trace = poutine.trace(self.model).get_trace(*self.args, **self.kwargs)
            check_shapes(trace, self._global_sites)
            self.plate_nesting, self.has_enumeration = structure(trace)
            self._check_structure(trace)
            transform = self.guide.get_posterior(*self.args, **self.kwargs).transform
            start = transform(transform.embedding.new_zeros(transform.event_shape))
            self.num_data = len(transform.embedding)
            pieces = self._pieces(start.unsqueeze(0), vectorized=False)
        for piece in pieces:
            data = {name: site for name, site in piece.nodes.items() if self.is_data(site)}
            check_sites(piece, self.sites, data)
        self.prototype = self._whole(pieces)
        self.vectorized = self._can_vectorize(start)

    def _check_structure(self, trace: poutine.Trace) -> None:
        if self.has_enumeration:
            raise ValueError(
                "the model marks discrete sites for enumeration, which pf.fit cannot sum out with "
                "an AmortizedFlow: use Pyro's SVI with TraceEnum_ELBO"
            )
        frames = {f.name: f for s in trace.nodes.values() for f in s.get("cond_indep_stack", ())}
        for name, frame in frames.items():
            if name != self.guide.plate and frame.size != frame.full_size:
                raise ValueError(
                    f"plate {name!r} is subsampled, {frame.size} of {frame.full_size}: pf.fit with "
                    f"an AmortizedFlow takes minibatches of its plate {self.guide.plate!r} alone"
                )
        self.minibatch_size = frames[self.guide.plate].size

    @property
    def is_subsampled(self) -> bool:
        """Tell whether the model sees a part of the data at each run."""
        return self.minibatch_size < self.num_data

    @property
    def _global_sites(self) -> dict[str, dict]:
        trace = self.guide.global_guide.prototype_trace
        return {} if trace is None else dict(trace.iter_stochastic_nodes())

    @property
    def sites(self) -> dict[str, dict]:
        """Return the latent sites by name, those of all data first."""
        sites = self._global_sites
        for local in self.guide.local_sites:
            event_shape = self.guide.prototype_trace.nodes[local.name]["fn"].event_shape
            shape = torch.Size((self.num_data, *(1,) * (-local.dim - 1), *event_shape))
            value = self.guide.local.feature_loc.new_empty(()).expand(shape)
            fn = _Whole(shape, local.event_dim, local.support)
            sites[local.name] = {"name": local.name, "value": value, "fn": fn}
        return sites

    @property
    def unconstrained_shapes(self) -> dict[str, torch.Size]:
        """Return the shapes of the sites' parts of an unconstrained vector, in their order."""
        shapes = dict(self.guide.global_guide._unconstrained_shapes or {})
        for site in self.guide.local_sites:
            trailing = (1,) * (-site.dim - 1)
            shapes[site.name] = torch.Size((self.num_data, *trailing, *site.shape))
        return shapes

    @torch.no_grad()
    def draw_prior(self, num_draws: int) -> list[poutine.Trace]:
        """Draw all sites from the prior, data too; return a trace of all draws, or one of each."""
        if self.vectorized:
            return [self._draw_prior(num_draws)]
        return [self._draw_prior(None) for _ in range(num_draws)]

    def _draw_prior(self, num_particles: int | None) -> poutine.Trace:
        """Draw what all data share with the first minibatch; all others are drawn given that."""
        shared: dict[str, Tensor] = {}
        pieces: list[poutine.Trace] = []
        for start in range(0, self.num_data, self.minibatch_size):
            program = Consecutive(self.guide.plate, start)(self.without_data())
            pieces.append(self._run(program, shared, num_particles, False))
            if not shared:
                shared = {
                    name: site["value"]
                    for name, site in pieces[0].nodes.items()
                    if site["type"] == "sample" and not frame_of(site, self.guide.plate)
                }
        return self._whole(pieces)

    def trace(
        self,
        z: Tensor,
        vectorized: bool = True,
        model: Any = None,
        sum_out: bool = True,
    ) -> poutine.Trace:
        """Run the model at vectors ``(S, D)`` for all data; return one trace of the whole plate."""
        return self._whole(self._pieces(z, vectorized, model))

    def _pieces(self, z: Tensor, vectorized: bool, model: Any = None) -> list[poutine.Trace]:
        """Run the model for one minibatch after the other; the last goes on with the first data."""
        values = self._latent_values(z, vectorized)
        axes = {site.name: site.dim - site.event_dim for site in self.guide.local_sites}
        traces = []
        for start in range(0, self.num_data, self.minibatch_size):
            index = torch.arange(start, start + self.minibatch_size, device=z.device)
            rows = {
                name: value.index_select(axes[name], index % self.num_data)
                if name in axes
                else value
                for name, value in values.items()
            }
            program = Consecutive(self.guide.plate, start)(model or self.model)
            traces.append(self._run(program, rows, len(z) if vectorized else None, False))
        return traces

    def _whole(self, pieces: Sequence[poutine.Trace]) -> poutine.Trace:
        """Join traces of minibatches to that of the whole plate, which is not scaled."""
        if len(pieces) == 1:
            return pieces[0]
        trace = poutine.Trace()
        for name, site in pieces[0].nodes.items():
            if site["type"] == "sample" and frame_of(site, self.guide.plate):
                site = self._joined([piece.nodes[name] for piece in pieces])
            trace.add_node(name, **site)
        return trace

    def _joined(self, parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Join what minibatches say of a site."""
        site = dict(parts[0])
        frame, event_dim = frame_of(site, self.guide.plate), _event_dim(site)
        share = frame.size / frame.full_size
        values = [_along(part, frame, event_dim) for part in parts]
        site["value"] = self._rows(values, frame.dim - event_dim)
        site["log_prob"] = share * self._rows([part["log_prob"] for part in parts], frame.dim)
        site["scale"] = share * site["scale"]
        if not isinstance(site["fn"], Unit):
            site["fn"] = _Whole(site["value"].shape, site["fn"].event_dim)
        return site

    def _rows(self, values: Sequence[Tensor], axis: int) -> Tensor:
        return torch.cat(list(values), axis).narrow(axis, 0, self.num_data)

    def _unpack(self, z: Tensor, nesting: int) -> Any:
        global_dim = z.shape[-1] - self.num_data * sum(
            site.shape.numel() for site in self.guide.local_sites
        )
        if global_dim:
            shared = z[..., :global_dim].reshape(*z.shape[:-1], *(1,) * nesting, global_dim)
            yield from self.guide.global_guide._unpack_latent(shared)
        sizes = [self.num_data * site.shape.numel() for site in self.guide.local_sites]
        parts = z[..., global_dim:].split(sizes, -1)
        for local, part in zip(self.guide.local_sites, parts, strict=True):
            outer, trailing = (1,) * max(0, nesting + local.dim), (1,) * (-local.dim - 1)
            shape = (*z.shape[:-1], *outer, self.num_data, *trailing, *local.shape)
            yield self.sites[local.name], part.reshape(shape)


@dataclass(frozen=True)
class _Whole:
    """Stand for the distributions of a site in all minibatches of a plate."""

    whole_shape: torch.Size
    event_dim: int
    support: Any = None

    def shape(self) -> torch.Size:
        return self.whole_shape


def _event_dim(site: dict[str, Any]) -> int:
    """Return how many trailing dimensions of a site's value are not those of plates."""
    # Unless told, Pyro takes all of a deterministic value for an event, inside plates too.
    event_dim = site["fn"].event_dim
    return 0 if is_deterministic(site) and event_dim == site["value"].dim() else event_dim


def _along(site: dict[str, Any], frame: Any, event_dim: int) -> Tensor:
    """Return a site's value, repeated along a plate if it is the same for all its data."""
    value, axis = site["value"], frame.dim - event_dim
    if value.dim() >= -axis and value.shape[axis] not in (1, frame.size):
        raise ValueError(
            f"site {site['name']!r} has a value of shape {tuple(value.shape)}, in which no "
            f"dimension is plate {frame.name!r} of size {frame.size}: for pyro.deterministic, "
            "give event_dim=..., the number of its trailing dimensions inside the plate"
        )
    along_plate = (frame.size, *(1,) * (-axis - 1))
    return value.expand(torch.broadcast_shapes(value.shape, along_plate))
