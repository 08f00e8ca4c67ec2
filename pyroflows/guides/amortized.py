"""The guide of models with latent variables for each datum of a plate."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Mapping
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.distributions.util import detach
from pyro.infer.autoguide import AutoGuide, init_to_median
from pyro.infer.autoguide.initialization import InitMessenger
from torch import Tensor, nn

from ..distributions import Flow
from ..transforms import FlowTransform
from .auto_flow import AutoFlow
from .local_flow import LocalFlow
from .local_sites import LocalSite, constrain, initial_loc, local_site
from .minibatch import Minibatch, PlateReader, frame_of
from .plate_transform import PlateTransform


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

    :func:`pyroflows.fit` takes it. It works with ``SVI``, ``Trace_ELBO``, ``TraceEnum_ELBO``,
    :class:`pyroflows.PathwiseELBO`, vectorised particles, and, without subsampling,
    ``Predictive``. Sizes of the data and of the minibatch may change from call
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
    >>> def model(data):
    ...     loc = pyro.sample("loc", dist.Normal(0.0, 3.0))
    ...     with pyro.plate("data", len(data), subsample_size=20) as index:
    ...         z = pyro.sample("z", dist.Normal(loc, 1.0))
    ...         pyro.sample("x", dist.Normal(z, 0.1), obs=data[index])
    >>> guide = AmortizedFlow(model, plate="data", num_layers=2)
    >>> data = torch.randn(100)
    >>> result = pf.fit(model, guide, (data,), num_steps=5, num_draws=1000, progress=False)
    >>> draws = guide.sample(100, torch.randn(50))
    >>> draws["loc"].shape, draws["z"].shape
    (torch.Size([100]), torch.Size([100, 50]))
    """

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
        if not callable(model):
            raise TypeError(f"model must be a callable, got {type(model).__name__}")
        super().__init__(InitMessenger(init_loc_fn)(model))
        self.plate = plate
        self.reader = PlateReader(self.model, plate, features)
        self.local = LocalFlow(flow, options, encoder, embedding_dim, init_scale)
        self._local_sites: list[LocalSite] = []
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
            minibatch = self.reader.read(args, kwargs)
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
        if self.local.transform is None:
            mean, deviation = self.reader.moments(minibatch, args, kwargs)
            self.local.build(loc, mean.to(loc), deviation.to(loc), global_dim)
        elif (self.local.transform.event_shape, self.local.global_dim) != (loc.shape, global_dim):
            raise ValueError(
                f"the loaded state is that of a guide of {self.local.transform.event_shape[0]} "
                f"latent dimensions for each datum and {self.local.global_dim} for all, but the "
                f"model has {len(loc)} and {global_dim}"
            )
        # The plate of the data is declared at each call, with the indices of that call.
        self._prototype_frames = {f.name: f for site in shared for f in site["cond_indep_stack"]}
        self.prototype_trace = trace

    def _load_from_state_dict(self, state_dict: Mapping, prefix: str, *args: Any) -> None:
        # A fresh guide has no weights yet: it takes its sizes from the state that is being loaded.
        loc = state_dict.get(f"{prefix}local.transform.parts.3.loc")
        if self.local.transform is None and loc is not None:
            mean = state_dict[f"{prefix}local.feature_loc"].clone()
            shared = state_dict.get(f"{prefix}global_guide.transform.parts.1.loc", ())
            self.local.build(loc, mean, torch.ones_like(mean), len(shared))
        super()._load_from_state_dict(state_dict, prefix, *args)

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Draw all latent variables of the model, the local ones for the data of a minibatch.

        Takes the arguments of the model; returns a dictionary from names of sites to values.
        """
        if self.prototype_trace is None:
            self._setup_prototype(*args, **kwargs)
        self._create_plates(*args, **kwargs)
        values, shared = {}, self.local.feature_loc.new_empty(0)
        if self.local.global_dim:
            with poutine.trace() as recorder:
                values.update(self.global_guide(*args, **kwargs))
            latent_site = f"_{self.global_guide._pyro_name}_latent"
            shared = recorder.trace.nodes[latent_site]["value"]
        minibatch = self.reader.read(args, kwargs)
        posterior = self._local_posterior(minibatch, shared)
        with minibatch.plate():
            latent = pyro.sample(
                f"_{self._pyro_name}_local_latent", posterior, infer={"is_auxiliary": True}
            )
            for site, value, log_density in constrain(self._local_sites, latent):
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
        for minibatch in self.reader.sweep(args, kwargs):
            latent = self._local_posterior(minibatch, shared).sample()
            inner = (1,) * (-minibatch.frame.dim - 1)
            for site, value, _ in constrain(self._local_sites, latent):
                event_shape = value.shape[value.dim() - site.event_dim :]
                pieces[site.name].append(value.reshape(num_samples, -1, *inner, *event_shape))
        return {**draws, **{name: torch.cat(values, 1) for name, values in pieces.items()}}

    @property
    def local_sites(self) -> list[LocalSite]:
        """Return the latent sites of a datum, once the guide was called."""
        return list(self._local_sites)

    def get_posterior(self, *args: Any, **kwargs: Any) -> Flow:
        """Return the distribution of all unconstrained latent variables, of the whole plate.

        Its vectors hold the global variables first, then those of each local site, for all data in
        turn. Their number grows with the data: keep the draws of large plates few.

        Parameters
        ----------
        *args, **kwargs
            Arguments of the model, with any number of data.

        Raises
        ------
        ValueError
            If the model itself fixes the indices of a minibatch, so that it cannot be asked for
            all data.

        Examples
        --------
        >>> def model(data):
        ...     with pyro.plate("data", len(data), subsample_size=2) as index:
        ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...         pyro.sample("x", dist.Normal(z, 0.1), obs=data[index])
        >>> guide = AmortizedFlow(model, plate="data", num_layers=2)
        >>> guide.get_posterior(torch.randn(5)).event_shape
        torch.Size([5])
        """
        if self.prototype_trace is None:
            self._setup_prototype(*args, **kwargs)
        embedding = self.local.encode(self.reader.read_all(args, kwargs))
        sizes = [site.shape.numel() for site in self._local_sites]
        shared = self.global_guide.get_transform() if self.local.global_dim else None
        return Flow(None, PlateTransform(shared, self.local.transform, embedding, sizes))

    def _sample_globals(self, num_samples: int, draws: dict[str, Tensor]) -> Tensor:
        """Add draws of the global variables; return their vectors, on the left of all plates."""
        dims = [frame.dim for frame in self._prototype_frames.values()]
        depth = -min([*dims, *(site.dim for site in self._local_sites)])
        batch_shape = (num_samples, *(1,) * depth)
        if not self.local.global_dim:
            return self.local.feature_loc.new_empty(*batch_shape, 0)
        latent = self.global_guide.get_posterior().sample(batch_shape)
        sites = self.global_guide.prototype_trace.nodes
        for name, value in self.global_guide.constrain(latent):
            draws[name] = value.reshape(num_samples, *sites[name]["value"].shape)
        return latent

    def _local_posterior(self, minibatch: Minibatch, shared: Tensor) -> Flow:
        """Return the distribution of the local vectors given those of the global variables."""
        embedding = self.local.encode(minibatch.features)
        along_plate = (len(embedding), *(1,) * (-minibatch.frame.dim - 1), embedding.shape[-1])
        embedding = embedding.reshape(along_plate)
        if self.local.global_dim:
            # In units of the guide itself, whatever those of the model: a network reads them.
            shared, _ = self.global_guide.get_transform()[-1].inverse_and_log_det(shared)
        batch_shape = torch.broadcast_shapes(embedding.shape[:-1], shared.shape[:-1])
        context = torch.cat([v.expand(*batch_shape, -1) for v in (embedding, shared)], -1)
        return Flow(None, self.local.transform.condition(context))

    def __getstate__(self) -> dict[str, Any]:
        raise TypeError(
            "an AmortizedFlow reads data through its model, which a pickle cannot hold: save "
            "guide.state_dict() and load it into a new guide of the same model"
        )

    def __deepcopy__(self, memo: dict) -> AmortizedFlow:
        # Nothing changes the model and its trace: copies may share them.
        shared = {"_model", "reader", "master", "prototype_trace", "_prototype_frames", "plates"}
        other = type(self).__new__(type(self))
        memo[id(self)] = other
        state = {key: value for key, value in self.__dict__.items() if key not in shared}
        other.__dict__.update(copy.deepcopy(state, memo))
        other.__dict__.update({key: self.__dict__[key] for key in shared if key in self.__dict__})
        other.global_guide._update_master(weakref.ref(other))
        return other
