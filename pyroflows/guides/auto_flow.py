"""The autoguide of any flow."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeAlias

import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.distributions.util import detach
from pyro.infer.autoguide import AutoContinuous, init_to_median
from pyro.infer.autoguide.guides import prototype_hide_fn
from pyro.nn import PyroModule
from torch import Tensor, nn
from torch.distributions import biject_to

from .. import flows
from ..distributions import Flow, standard_normal
from ..transforms import Compose, DiagonalAffine, FlowTransform, TriangularAffine

Distribution: TypeAlias = torch.distributions.Distribution
Base: TypeAlias = Distribution | nn.Module | Callable[[int], Distribution | nn.Module]

FULL_RANK_MAX_DIM = (
    128  # beyond it the outer affine map is diagonal: D (D + 1) / 2 numbers are many
)


class AutoFlow(AutoContinuous):
    r"""Approximate a posterior by a flow over all its continuous latent variables.

    The latent variables are moved to unconstrained space, concatenated to a vector of size ``D``
    and modelled as :math:`\mu + L f(z)`, with :math:`z` from the base distribution, :math:`f` a
    registered flow that starts near the identity, and an affine map that starts at ``init_loc_fn``
    with :math:`L` equal to ``init_scale`` times the identity. The affine map is full-rank up to
    ``D = 128`` and diagonal beyond.

    A plain Pyro autoguide: it works with ``SVI`` and every ELBO, vectorised particles,
    ``Predictive``, ``NeuTraReparam`` and the JIT. Discrete sites marked for parallel enumeration
    are left to the ELBO.

    Parameters
    ----------
    model
        A Pyro model.
    flow
        Name of a registered flow, see :func:`pyroflows.flows.names`, or a function of ``D`` that
        returns a ``FlowTransform``.
    init_loc_fn
        Pyro's per-site initialisation of the location.
    init_scale
        Initial standard deviation in unconstrained space, positive.
    base
        The distribution of ``z``: a distribution of event shape ``(D,)``, a module that gives one
        and is learned with the guide, or a function of ``D`` that returns either, such as
        :class:`pyroflows.distributions.StudentT`. Default: standard normal.
    **options
        Options of the flow, for instance ``num_layers`` and ``hidden_dims``.

    Raises
    ------
    ValueError
        If ``flow`` is unknown or maps angles, or ``init_scale`` is not positive; at the first call,
        if the model has no continuous latent variables, discrete ones that are not enumerated, or
        latent variables in a subsampled plate.

    References
    ----------
    [1] D. J. Rezende, S. Mohamed. Variational inference with normalizing flows.
        `arXiv:1505.05770 <https://arxiv.org/abs/1505.05770>`_, 2015.

    Examples
    --------
    >>> import pyro
    >>> from pyro.infer import SVI, Trace_ELBO
    >>> def model():
    ...     scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
    ...     pyro.sample("x", dist.Normal(0.0, scale))
    >>> guide = AutoFlow(model, flow="spline_coupling", num_layers=2)
    >>> svi = SVI(model, guide, pyro.optim.Adam({"lr": 1e-2}), Trace_ELBO())
    >>> loss = svi.step()
    >>> sorted(guide())
    ['scale', 'x']
    """

    num_quantile_draws = 10_000

    def __init__(
        self,
        model: Callable,
        flow: str | Callable[[int], FlowTransform] = "spline_coupling",
        *,
        init_loc_fn: Callable = init_to_median,
        init_scale: float = 0.1,
        base: Base | None = None,
        **options: Any,
    ) -> None:
        if not callable(model):
            raise TypeError(f"model must be a callable, got {type(model).__name__}")
        if not init_scale > 0:
            raise ValueError(f"init_scale must be positive, got {init_scale}")
        if isinstance(flow, str):
            check_flow_support(flow)
        elif not callable(flow):
            raise TypeError(f"flow must be a name or a callable, got {type(flow).__name__}")
        super().__init__(model, init_loc_fn=init_loc_fn)
        self._flow = flow
        self._options = options
        self._init_scale = init_scale
        self._base = base
        self.transform: Compose | None = None

    @property
    def flow(self) -> str | Callable[[int], FlowTransform]:
        """Return the name of the flow, or the function that builds it."""
        return self._flow

    @property
    def options(self) -> dict[str, Any]:
        """Return the options of the flow."""
        return dict(self._options)

    @property
    def base(self) -> Base | None:
        """Return the base that was given, or built if it is learned; ``None`` for the default."""
        return self._base

    @staticmethod
    def _prototype_hide_fn(msg: dict) -> bool:
        return prototype_hide_fn(msg) or _is_enumerated(msg)

    def _setup_prototype(self, *args: Any, **kwargs: Any) -> None:
        _check_latent_sites(poutine.block(self.model, self._prototype_hide_fn), args, kwargs)
        super()._setup_prototype(*args, **kwargs)
        for _, site in self.prototype_trace.iter_stochastic_nodes():
            # Only shapes and supports are needed; graphs and weak references cannot be pickled.
            site["fn"], site["value"] = detach(site["fn"]), site["value"].detach()
        if self.transform is None:
            self._build(self._init_loc())
        elif self.transform.event_shape != (self.latent_dim,):
            raise ValueError(
                f"the loaded state is that of a guide of {self.transform.event_shape[0]} latent "
                f"dimensions, but the model has {self.latent_dim}"
            )

    def _build(self, loc: Tensor) -> None:
        dim = loc.shape[0]
        if isinstance(self._flow, str):
            inner = flows.flow(self._flow, dim, **self._options)
        else:
            inner = self._flow(dim, **self._options)
        if dim <= FULL_RANK_MAX_DIM:
            eye = torch.eye(dim, dtype=loc.dtype, device=loc.device)
            affine: FlowTransform = TriangularAffine(loc, self._init_scale * eye)
        else:
            affine = DiagonalAffine(loc, torch.full_like(loc, self._init_scale))
        self.transform = Compose([inner.to(dtype=loc.dtype, device=loc.device), affine])
        self.register_buffer("_origin", torch.zeros_like(loc), persistent=False)
        base = self._base
        if callable(base) and not isinstance(base, Distribution | nn.Module):
            base = base(dim)
        if isinstance(base, nn.Module):
            self._base = base.to(loc)

    def _load_from_state_dict(self, state_dict: Mapping, prefix: str, *args: Any) -> None:
        # A fresh guide has no weights yet: it takes its size from the state that is being loaded.
        loc = state_dict.get(f"{prefix}transform.parts.1.loc")
        if self.transform is None and loc is not None:
            self._build(loc)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def get_base_dist(self) -> dist.Distribution:
        """Return the distribution of ``z``."""
        if self._base is None:
            return standard_normal(self._origin)
        if isinstance(self._base, Distribution):
            return self._base
        if isinstance(self._base, nn.Module):
            return self._base()
        return self._base(self.latent_dim)

    def get_transform(self, *args: Any, **kwargs: Any) -> Compose:
        """Return the map from ``z`` to the unconstrained latent vector.

        Raises
        ------
        RuntimeError
            Before the first call of the guide, when its size is not known yet.
        """
        if self.transform is None:
            raise RuntimeError("call the guide once before asking for its transform")
        return self.transform

    def get_posterior(self, *args: Any, **kwargs: Any) -> Flow:
        """Return the distribution of the unconstrained latent vector."""
        return Flow(self.get_base_dist(), self.get_transform(*args, **kwargs))

    @torch.no_grad()
    def median(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Return the posterior median of each site, estimated from 10 000 draws.

        Medians are taken in unconstrained space and mapped to the support of the site.
        """
        return {name: value[0] for name, value in self.quantiles([0.5], *args, **kwargs).items()}

    @torch.no_grad()
    def quantiles(
        self, quantiles: list[float] | Tensor, *args: Any, **kwargs: Any
    ) -> dict[str, Tensor]:
        """Return posterior quantiles of each site, estimated from 10 000 draws.

        Quantiles are taken in unconstrained space and mapped to the support of the site.

        Parameters
        ----------
        quantiles
            ``Q`` numbers in [0, 1].
        *args, **kwargs
            Arguments of the model.

        Returns
        -------
        dict
            From site names to tensors of shape ``(Q, *site_shape)``.
        """
        if self.prototype_trace is None:
            self._setup_prototype(*args, **kwargs)
        draws = self.get_posterior(*args, **kwargs).sample((self.num_quantile_draws,))
        levels = torch.as_tensor(quantiles, dtype=draws.dtype, device=draws.device)
        result: dict[str, list[Tensor]] = {}
        for latent in torch.quantile(draws, levels, dim=0):
            for name, value in self.constrain(latent):
                result.setdefault(name, []).append(value)
        return {name: torch.stack(values) for name, values in result.items()}

    def constrain(self, latent: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Yield the name and the value of each site for an unconstrained latent vector."""
        for site, value in self._unpack_latent(latent):
            yield site["name"], biject_to(site["fn"].support)(value)

    def __getstate__(self) -> dict[str, Any]:
        # Models are often closures, which cannot be pickled; a set-up guide works without.
        return {**PyroModule.__getstate__(self), "_model": None, "master": None}

    def __deepcopy__(self, memo: dict) -> AutoFlow:
        # Nothing changes the model and its trace: copies may share them.
        shared = {"_model", "master", "prototype_trace", "_cond_indep_stacks", "_prototype_frames"}
        other = type(self).__new__(type(self))
        memo[id(self)] = other
        state = {key: value for key, value in self.__dict__.items() if key not in shared}
        other.__dict__.update(copy.deepcopy(state, memo))
        other.__dict__.update({key: self.__dict__[key] for key in shared if key in self.__dict__})
        return other


def check_flow_support(flow: str) -> None:
    """Raise ``ValueError`` if a registered flow maps angles."""
    if flows.spec(flow).support != "real":
        raise ValueError(
            f"flow={flow!r} maps angles, but a guide needs a flow of vectors of real numbers"
        )


def _check_latent_sites(model: Callable, args: tuple, kwargs: Mapping) -> None:
    """Raise ``ValueError`` if a flow cannot model the latent sites of a model."""
    trace = poutine.block(poutine.trace(model).get_trace)(*args, **kwargs)
    sites = dict(trace.iter_stochastic_nodes())
    if not sites:
        raise ValueError("the model has no continuous latent variables: there is nothing to infer")
    for name, site in sites.items():
        if site["fn"].support.is_discrete:
            raise ValueError(
                f"site {name!r} is discrete ({type(site['fn']).__name__}): mark it for enumeration "
                "with infer={'enumerate': 'parallel'} and use TraceEnum_ELBO, or sum it out"
            )
        for frame in site["cond_indep_stack"]:
            if frame.full_size is not None and frame.full_size != frame.size:
                raise ValueError(
                    f"site {name!r} lies in plate {frame.name!r}, subsampled {frame.size} of "
                    f"{frame.full_size}: a flow over all latent variables needs the whole plate; "
                    f"drop the subsampling, or use pf.AmortizedFlow(model, plate={frame.name!r})"
                )


def _is_enumerated(msg: dict) -> bool:
    return msg["type"] == "sample" and msg["infer"].get("enumerate") == "parallel"
