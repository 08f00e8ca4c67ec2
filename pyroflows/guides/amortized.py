"""The guide of models with latent variables for each datum of a plate."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.distributions.util import detach, sum_rightmost
from pyro.infer.autoguide import AutoGuide, init_to_median
from pyro.infer.autoguide.initialization import InitMessenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor, nn
from torch.distributions import biject_to

from .. import flows
from ..distributions import Flow
from ..nn.residual_mlp import ResidualMLP
from ..transforms import Affine, Compose, DiagonalAffine, Elementwise, FlowTransform
from .auto_flow import AutoFlow, check_flow_support
from .minibatch import (
    Consecutive,
    LocalSite,
    Minibatch,
    frame_of,
    initial_loc,
    local_site,
    observed_features,
)

NUM_FIRST_DATA = 1000  # that features are standardised by
ENCODER_WIDTH = 64


class AmortizedFlow(AutoGuide):
    r"""Approximate a posterior with latent variables for each datum, by one network for all data.

    Of a model with global latent variables :math:`\theta` and a plate of data :math:`x_i`, each
    with local latent variables :math:`z_i`, the posterior is approximated by

    .. math:: q(\theta) \prod_i q(z_i \mid e(x_i), \theta)

    with :math:`q(\theta)` an :class:`AutoFlow`, :math:`e` an encoder network and
    :math:`q(z \mid e, \theta)` a conditional flow, both shared by all data. The plate may be
    subsampled: a step then costs what its minibatch costs, whatever the number of data (but for
    the random choice of the minibatch, which is Pyro's). After the fit, :meth:`sample` draws from
    the posterior of data that were not seen.

    In unconstrained space the local variables of a datum are concatenated to a vector of size
    ``D`` and modelled as :math:`\mu + m(c) + e^{s(c)} f(u; c)` with :math:`u` standard normal,
    :math:`c` the encoding and the global variables, a registered flow :math:`f`, and networks
    :math:`m` and :math:`s`. It starts at ``init_loc_fn`` with standard deviation ``init_scale``.

    What the encoder reads of a datum are its features: what the model itself observes of it in the
    plate, flattened. To read them, the guide runs the model once more at each call, without
    gradients. Features are standardised by the mean and the standard deviation of about 1000 data,
    read at the first call.

    Works with ``SVI``, ``Trace_ELBO``, :class:`pyroflows.PathwiseELBO`, vectorised particles, and,
    without subsampling, ``Predictive``. Sizes of the data and of the minibatch may change from call
    to call. Discrete sites marked for parallel enumeration are left to the ELBO. The guide reads
    its data through the model, so it cannot be pickled: save ``guide.state_dict()``, and load it
    into a new guide of the same model.

    Parameters
    ----------
    model
        A Pyro model.
    plate
        Name of the plate of the data.
    flow
        Name of a registered flow, see :func:`pyroflows.flows.names`, or a function of ``D`` and
        the size of the context that returns a ``FlowTransform``, for the local variables.
    global_flow
        As ``flow`` in :class:`AutoFlow`, for the global variables. Very many data leave them a
        narrow, almost normal posterior, which steps of a large network throw about by many of its
        standard deviations: prefer a small flow then, and a small ``init_scale``.
    encoder
        A module from standardised features ``(B, F)`` to encodings ``(B, E)``. Default: a residual
        network with ``E = embedding_dim``.
    embedding_dim
        Size of the default encoder's output.
    features
        A function that is called as ``features(index, *args, **kwargs)`` with the indices of ``B``
        data and the arguments of the model, and returns their features ``(B, F)``, for instance
        with covariates. Default: the values of the observed sites.
    init_loc_fn
        Pyro's per-site initialisation of the location.
    init_scale
        Initial standard deviation in unconstrained space, positive.
    **options
        Options of the flow of the local variables, for instance ``num_layers``.

    Raises
    ------
    ValueError
        If a flow is unknown or maps angles, ``init_scale`` or ``embedding_dim`` is not positive;
        at a call, if the model has no such plate, no latent variables in it, or none that is
        observed there while ``features`` is not given; if a local variable is discrete, lies in
        further plates or has a support that differs between data; if features have the wrong shape
        or are not finite.

    References
    ----------
    [1] D. P. Kingma, M. Welling. Auto-encoding variational Bayes.
        `arXiv:1312.6114 <https://arxiv.org/abs/1312.6114>`_, 2013.
    [2] A. Agrawal, J. Domke. Amortized variational inference for simple hierarchical models.
        `arXiv:2111.03144 <https://arxiv.org/abs/2111.03144>`_, 2021.

    Examples
    --------
    >>> import pyroflows as pf
    >>> from pyro.infer import SVI
    >>> def model(data):
    ...     loc = pyro.sample("loc", dist.Normal(0.0, 3.0))
    ...     with pyro.plate("data", len(data), subsample_size=20) as index:
    ...         z = pyro.sample("z", dist.Normal(loc, 1.0))
    ...         pyro.sample("x", dist.Normal(z, 0.1), obs=data[index])
    >>> guide = AmortizedFlow(model, plate="data", num_layers=2)
    >>> elbo = pf.PathwiseELBO(num_particles=4, vectorize_particles=True)
    >>> svi = SVI(model, guide, pyro.optim.Adam({"lr": 1e-3}), elbo)
    >>> loss = svi.step(torch.randn(1000))
    >>> draws = guide.sample(100, torch.randn(50))
    >>> draws["loc"].shape, draws["z"].shape
    (torch.Size([100]), torch.Size([100, 50]))
    """

    feature_loc: Tensor
    feature_scale: Tensor

    def __init__(
        self,
        model: Callable,
        plate: str,
        flow: str | Callable[[int, int], FlowTransform] = "spline_coupling",
        *,
        global_flow: str | Callable[[int], FlowTransform] = "spline_coupling",
        encoder: nn.Module | None = None,
        embedding_dim: int = 32,
        features: Callable[..., Tensor] | None = None,
        init_loc_fn: Callable = init_to_median,
        init_scale: float = 0.1,
        **options: Any,
    ) -> None:
        _check_arguments(model, plate, flow, encoder, embedding_dim, features)
        super().__init__(InitMessenger(init_loc_fn)(model))
        self.plate = plate
        self._flow = flow
        self._options = options
        self._embedding_dim = embedding_dim
        self._features = features
        self._init_scale = init_scale
        self._global_dim = 0
        self._local_sites: list[LocalSite] = []
        self.encoder: Any = encoder
        self.local_transform: Any = None
        self.global_guide = AutoFlow(
            poutine.block(self.model, lambda msg: frame_of(msg, plate) is not None),
            global_flow,
            init_loc_fn=init_loc_fn,
            init_scale=init_scale,
        )

    _prototype_hide_fn = staticmethod(AutoFlow._prototype_hide_fn)

    def _check_prototype(self, part_trace: poutine.Trace) -> None:
        """Accept the prototype of the global variables, which comes from the same model."""

    def _setup_prototype(self, *args: Any, **kwargs: Any) -> None:
        model = poutine.block(self.model, self._prototype_hide_fn)
        trace = poutine.block(poutine.trace(model).get_trace)(*args, **kwargs)
        local: list[dict] = []
        shared: list[dict] = []
        for _, site in trace.iter_stochastic_nodes():
            # Only shapes and supports are needed, no graphs.
            site["fn"], site["value"] = detach(site["fn"]), site["value"].detach()
            (local if frame_of(site, self.plate) else shared).append(site)
        with poutine.block():
            minibatch = self._read(args, kwargs)
        if not local:
            raise ValueError(
                f"the model has no continuous latent variables in plate {self.plate!r}: use a "
                "guide of all latent variables, such as pf.AutoFlow(model)"
            )
        self._local_sites = [local_site(site, self.plate) for site in local]
        loc = torch.cat([initial_loc(site) for site in local])
        if shared:
            self.global_guide._setup_prototype(*args, **kwargs)
        global_dim = self.global_guide.latent_dim if shared else 0
        if self.local_transform is None:
            self._build(loc, *self._moments(minibatch, loc, args, kwargs), global_dim)
        elif (self.local_transform.event_shape, self._global_dim) != (loc.shape, global_dim):
            raise ValueError(
                f"the loaded state is that of a guide of {self.local_transform.event_shape[0]} "
                f"latent dimensions for each datum and {self._global_dim} for all, but the model "
                f"has {len(loc)} and {global_dim}"
            )
        # The plate of the data is declared at each call, with the indices of that call.
        self._prototype_frames = {f.name: f for site in shared for f in site["cond_indep_stack"]}
        self.prototype_trace = trace

    def _moments(
        self, minibatch: Minibatch, like: Tensor, args: tuple, kwargs: dict
    ) -> tuple[Tensor, Tensor]:
        """Return the mean and the standard deviation of the features of many data."""
        frame, rows = minibatch.frame, [minibatch.features]
        with poutine.block():
            while frame.size < frame.full_size and len(rows) * frame.size < NUM_FIRST_DATA:
                rows.append(self._read(args, kwargs).features)
        features = torch.cat(rows).double()
        if not bool(features.isfinite().all()):
            raise ValueError(
                f"the data of plate {self.plate!r} hold NaN or infinities, which the encoder "
                "cannot read: give features=..., a function that returns finite ones"
            )
        deviation, mean = torch.std_mean(features, dim=0, correction=0)
        # What does not vary is only shifted.
        return mean.to(like), torch.where(deviation > 0, deviation, 1.0).to(like)

    def _build(
        self, loc: Tensor, feature_loc: Tensor, feature_scale: Tensor, global_dim: int
    ) -> None:
        dim = loc.shape[0]
        self._global_dim = global_dim
        self.register_buffer("feature_loc", feature_loc)
        self.register_buffer("feature_scale", feature_scale)
        if self.encoder is None:
            self.encoder = ResidualMLP(len(feature_loc), self._embedding_dim, ENCODER_WIDTH)
        self.encoder.to(loc)
        with torch.no_grad():
            context_dim = self._encode(feature_loc.unsqueeze(0)).shape[-1] + global_dim
        if isinstance(self._flow, str):
            inner = flows.flow(self._flow, dim, context_dim, **self._options)
        else:
            inner = self._flow(dim, context_dim)
        # The posteriors of the data lie apart, by far more than one of them is wide: they are
        # shifted in units of one, whatever their initial scale.
        narrow = DiagonalAffine(torch.zeros_like(loc), torch.full_like(loc, self._init_scale))
        shift = Elementwise(Affine(), dim, context_dim, activation=nn.SiLU)
        parts = [inner, narrow, shift, DiagonalAffine(loc, torch.ones_like(loc))]
        self.local_transform = Compose(part.to(loc) for part in parts)

    def _load_from_state_dict(self, state_dict: Mapping, prefix: str, *args: Any) -> None:
        # A fresh guide has no weights yet: it takes its sizes from the state that is being loaded.
        loc = state_dict.get(f"{prefix}local_transform.parts.3.loc")
        if self.local_transform is None and loc is not None:
            mean = state_dict[f"{prefix}feature_loc"].clone()
            shared = state_dict.get(f"{prefix}global_guide.transform.parts.1.loc", ())
            self._build(loc, mean, torch.ones_like(mean), len(shared))
        super()._load_from_state_dict(state_dict, prefix, *args)

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Draw all latent variables of the model, the local ones for the data of a minibatch.

        Takes the arguments of the model; returns a dictionary from names of sites to values.
        """
        if self.prototype_trace is None:
            self._setup_prototype(*args, **kwargs)
        self._create_plates(*args, **kwargs)
        values, shared = {}, self.feature_loc.new_empty(0)
        if self._global_dim:
            with poutine.trace() as recorder:
                values.update(self.global_guide(*args, **kwargs))
            latent_site = f"_{self.global_guide._pyro_name}_latent"
            shared = recorder.trace.nodes[latent_site]["value"]
        minibatch = self._read(args, kwargs)
        posterior = self._local_posterior(minibatch, shared)
        with minibatch.plate():
            latent = pyro.sample(
                f"_{self._pyro_name}_local_latent", posterior, infer={"is_auxiliary": True}
            )
            for site, value, log_density in self._unpack_local(latent):
                delta = dist.Delta(value, log_density=log_density, event_dim=site.event_dim)
                values[site.name] = pyro.sample(site.name, delta)
        return values

    @torch.no_grad()
    def sample(self, num_samples: int, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Draw from the approximate posterior of all data that the model is given, seen or new.

        The global variables keep the posterior that was fitted; new data do not change it. The
        whole plate is visited, in pieces of the size of the model's minibatch. A model that fixes
        the indices of its minibatch itself (``pyro.plate(..., subsample=index)``) gets draws for
        these; one that is handed minibatches has to be told here that they are all there is, or
        they are taken for every piece of the plate.

        Parameters
        ----------
        num_samples
            Number ``S`` of draws.
        *args, **kwargs
            Arguments of the model, with any number of data.

        Returns
        -------
        dict
            From site names to tensors of shape ``(S, *site_shape)``.

        Raises
        ------
        ValueError
            If ``num_samples`` is not positive.
        """
        if num_samples < 1:
            raise ValueError(f"num_samples must be at least 1, got {num_samples}")
        if self.prototype_trace is None:
            self._setup_prototype(*args, **kwargs)
        draws: dict[str, Tensor] = {}
        pieces: dict[str, list[Tensor]] = {site.name: [] for site in self._local_sites}
        shared = self._sample_globals(num_samples, draws)
        for minibatch in self._sweep(args, kwargs):
            latent = self._local_posterior(minibatch, shared).sample()
            inner = (1,) * (-minibatch.frame.dim - 1)
            for site, value, _ in self._unpack_local(latent):
                event_shape = value.shape[value.dim() - site.event_dim :]
                pieces[site.name].append(value.reshape(num_samples, -1, *inner, *event_shape))
        return {**draws, **{name: torch.cat(values, 1) for name, values in pieces.items()}}

    def _sample_globals(self, num_samples: int, draws: dict[str, Tensor]) -> Tensor:
        """Add draws of the global variables; return their vectors, on the left of all plates."""
        dims = [frame.dim for frame in self._prototype_frames.values()]
        depth = -min([*dims, *(site.dim for site in self._local_sites)])
        batch_shape = (num_samples, *(1,) * depth)
        if not self._global_dim:
            return self.feature_loc.new_empty(*batch_shape, 0)
        latent = self.global_guide.get_posterior().sample(batch_shape)
        sites = self.global_guide.prototype_trace.nodes
        for name, value in self.global_guide.constrain(latent):
            draws[name] = value.reshape(num_samples, *sites[name]["value"].shape)
        return latent

    @torch.no_grad()
    def _read(self, args: tuple, kwargs: Mapping[str, Any]) -> Minibatch:
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
        if self._features is None:
            return Minibatch(frame, index, observed_features(inside, frame))
        features = self._features(index, *args, **kwargs)
        if features.dim() != 2 or len(features) != frame.size:
            raise ValueError(
                f"features must return a tensor of shape ({frame.size}, F), a row for each index, "
                f"got one of shape {tuple(features.shape)}"
            )
        return Minibatch(frame, index, features)

    def _is_index(self, msg: dict) -> bool:
        return msg["name"] == self.plate and site_is_subsample(msg)

    def _sweep(self, args: tuple, kwargs: Mapping[str, Any]) -> Iterator[Minibatch]:
        """Yield all data of the plate, in pieces of the size of the model's minibatch."""
        start, size = 0, 1
        while start < size:
            with poutine.block(), Consecutive(self.plate, start) as consecutive:
                minibatch = self._read(args, kwargs)
            frame = minibatch.frame
            yield replace(minibatch, features=minibatch.features[: frame.full_size - start])
            start += frame.size
            size = frame.full_size if consecutive.has_chosen else 0

    def _encode(self, features: Tensor) -> Tensor:
        """Return encodings ``(B, E)`` of features ``(B, F)``."""
        if features.shape[-1:] != self.feature_loc.shape:
            raise ValueError(
                f"the encoder reads {len(self.feature_loc)} features of each datum of plate "
                f"{self.plate!r}, got {features.shape[-1]}"
            )
        return self.encoder((features.to(self.feature_loc) - self.feature_loc) / self.feature_scale)

    def _local_posterior(self, minibatch: Minibatch, shared: Tensor) -> Flow:
        """Return the distribution of the local vectors given those of the global variables."""
        embedding = self._encode(minibatch.features)
        along_plate = (len(embedding), *(1,) * (-minibatch.frame.dim - 1), embedding.shape[-1])
        embedding = embedding.reshape(along_plate)
        if self._global_dim:
            # In units of the guide itself, whatever those of the model: a network reads them.
            shared, _ = self.global_guide.get_transform()[-1].inverse_and_log_det(shared)
        batch_shape = torch.broadcast_shapes(embedding.shape[:-1], shared.shape[:-1])
        context = torch.cat([v.expand(*batch_shape, -1) for v in (embedding, shared)], -1)
        return Flow(None, self.local_transform.condition(context))

    def _unpack_local(self, latent: Tensor) -> Iterator[tuple[LocalSite, Tensor, Tensor]]:
        """Yield each local site with its value and the log-density that its support adds."""
        parts = latent.split([site.shape.numel() for site in self._local_sites], -1)
        for site, part in zip(self._local_sites, parts, strict=True):
            unconstrained = part.reshape(latent.shape[:-1] + site.shape)
            transform = biject_to(site.support)
            value = transform(unconstrained)
            log_density = transform.inv.log_abs_det_jacobian(value, unconstrained)
            extra = log_density.dim() - value.dim() + site.event_dim
            yield site, value, sum_rightmost(log_density, extra)

    def __getstate__(self) -> dict[str, Any]:
        raise TypeError(
            "an AmortizedFlow reads data through its model, which a pickle cannot hold: save "
            "guide.state_dict() and load it into a new guide of the same model"
        )

    def __deepcopy__(self, memo: dict) -> AmortizedFlow:
        # Nothing changes the model and its trace: copies may share them.
        shared = {"_model", "master", "prototype_trace", "_prototype_frames", "plates"}
        other = type(self).__new__(type(self))
        memo[id(self)] = other
        state = {key: value for key, value in self.__dict__.items() if key not in shared}
        other.__dict__.update(copy.deepcopy(state, memo))
        other.__dict__.update({key: self.__dict__[key] for key in shared if key in self.__dict__})
        other.global_guide._update_master(weakref.ref(other))
        return other


def _check_arguments(
    model: Any, plate: Any, flow: Any, encoder: Any, embedding_dim: int, features: Any
) -> None:
    if not callable(model):
        raise TypeError(f"model must be a callable, got {type(model).__name__}")
    if not isinstance(plate, str):
        raise TypeError(f"plate must be the name of a plate, got {type(plate).__name__}")
    if isinstance(flow, str):
        check_flow_support(flow)
    elif not callable(flow):
        raise TypeError(f"flow must be a name or a callable, got {type(flow).__name__}")
    if encoder is not None and not isinstance(encoder, nn.Module):
        raise TypeError(f"encoder must be a torch module, got {type(encoder).__name__}")
    if embedding_dim < 1:
        raise ValueError(f"embedding_dim must be at least 1, got {embedding_dim}")
    if features is not None and not callable(features):
        raise TypeError(f"features must be a callable, got {type(features).__name__}")
