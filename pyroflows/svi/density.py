"""The log-density of a Pyro model as a plain function of the unconstrained latent vector."""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.distributions import Unit
from pyro.infer.autoguide import AutoContinuous
from pyro.ops.contract import contract_to_tensor
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import prune_subsample_sites
from torch import Tensor
from torch.distributions import biject_to
from torch.utils import _pytree as pytree

from ..random_state import preserved
from .checks import check_shapes, check_sites, check_values

PARTICLES = "_pyroflows_particles"
CHUNK = 2000  # vectors evaluated at once where there are many


class ModelDensity:
    r"""Evaluate a model's joint log-density at many unconstrained latent vectors at once.

    Calling it with ``z`` of shape ``(S, D)`` returns

    .. math:: \log p(\theta(z), y) + \log|\det \partial\theta / \partial z|

    of shape ``(S,)``, differentiable, in the coordinates ``z`` of a guide. The model runs once,
    inside a plate of ``S`` particles. A model that cannot (because its answers then differ from
    those for single vectors) runs ``S`` times instead, with a warning. Discrete sites marked for
    parallel enumeration are summed out.

    Parameters
    ----------
    model
        A Pyro model.
    guide
        An autoguide over the unconstrained latent vector; it is set up if need be.
    args, kwargs
        Arguments of the model.

    Raises
    ------
    TypeError
        If the guide is not an ``AutoContinuous``.
    ValueError
        If the log-density is not finite at the guide's initial location, for instance because the
        data hold NaN or infinities; the message names the site.
    """

    min_weighted_draws = 0  # fewer are not weighted
    remedies = (
        "Try more steps, a more flexible flow (pf.AutoSpline, num_layers, hidden_dims), "
        "pf.cover_mass(result), or a reparametrised model."
    )

    def __init__(
        self,
        model: Callable,
        guide: AutoContinuous,
        args: tuple = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        self._check_guide(guide)
        self.model = model
        self.guide = guide
        self.args = tuple(args)
        self.kwargs = dict(kwargs or {})
        self._set_up()

    @staticmethod
    def _check_guide(guide: Any) -> None:
        if not isinstance(guide, AutoContinuous):
            raise TypeError(
                "guide must be an AutoContinuous, such as pf.AutoRealNVP(model) or Pyro's "
                f"AutoMultivariateNormal(model), or a pf.AmortizedFlow, got {type(guide).__name__}"
            )

    @torch.no_grad()
    def _set_up(self) -> None:
        # Pyro's own checks come without the name of the site; ours follow below.
        with pyro.validation_enabled(False), poutine.block():
            if self.guide.prototype_trace is None:
                self.guide._setup_prototype(*self.args, **self.kwargs)
            start = self.guide._init_loc()
            trace = poutine.trace(self.model).get_trace(*self.args, **self.kwargs)
            check_shapes(trace, self.sites)
            self.plate_nesting, self.has_enumeration = structure(trace)
            self.prototype = self.trace(start.unsqueeze(0), vectorized=False, sum_out=False)
        check_sites(self.prototype, self.sites, self.data_sites)
        self.vectorized = self._can_vectorize(start)

    @property
    def sites(self) -> dict[str, dict]:
        """Return the latent sites by name."""
        return dict(self.guide.prototype_trace.iter_stochastic_nodes())

    @property
    def data_sites(self) -> dict[str, dict]:
        """Return the sites that hold data, by name."""
        return {name: site for name, site in self.prototype.nodes.items() if self.is_data(site)}

    def is_data(self, site: dict) -> bool:
        """Tell whether a site holds data: observed, and not latent, deterministic or a factor."""
        return (
            site["type"] == "sample"
            and site["is_observed"]
            and site["name"] not in self.sites
            and not is_deterministic(site)
            and not isinstance(site["fn"], Unit)
        )

    def without_data(self) -> Callable:
        """Return the model with its data left open."""
        return _Unobserve(set(self.data_sites))(self.model)

    def parameters(self) -> list[Tensor]:
        """Return the unconstrained values of the model's own learnable parameters."""
        sites = self.prototype.nodes.values()
        return [site["value"].unconstrained() for site in sites if site["type"] == "param"]

    def __call__(self, z: Tensor) -> Tensor:
        if self.vectorized and self.has_enumeration and len(z) == 1:
            return self(z.expand(2, -1))[:1]  # Pyro's sum-product has no plates of size one
        if self.vectorized:
            return self._log_density(z, vectorized=True)
        return torch.cat([self._log_density(row, vectorized=False) for row in z.split(1)])

    def constrain(self, z: Tensor) -> dict[str, Tensor]:
        """Map unconstrained vectors ``(S, D)`` to site values ``(S, *site_shape)``."""
        return {
            site["name"]: biject_to(site["fn"].support)(value).reshape(-1, *site["value"].shape)
            for site, value in self._unpack(z, self.plate_nesting)
        }

    def unconstrain(self, values: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        r"""Map site values ``(S, *site_shape)`` to unconstrained vectors ``(S, D)``.

        Returns the vectors and :math:`\log|\det \partial z / \partial\theta|` of shape ``(S,)``.

        Raises
        ------
        ValueError
            If a site is missing, or its values have the wrong shape or leave its support.
        """
        parts, log_dets = [], []
        for name, site in self.sites.items():
            value = check_values(name, site, values)
            z = biject_to(site["fn"].support).inv(value)
            log_dets.append(-self._log_det(site, z, value))
            parts.append(z.reshape(value.shape[0], -1))
        if len({len(part) for part in parts}) > 1:
            raise ValueError(
                "values must hold equally many draws of each site, got "
                f"{dict(zip(self.sites, map(len, parts), strict=True))}"
            )
        return torch.cat(parts, -1), torch.stack(log_dets).sum(0)

    @property
    def unconstrained_shapes(self) -> dict[str, torch.Size]:
        """Return the shapes of the sites' parts of an unconstrained vector, in their order."""
        return self.guide._unconstrained_shapes

    @torch.no_grad()
    def draw_prior(self, num_draws: int) -> list[poutine.Trace]:
        """Draw all sites from the prior, data too; return a trace of all draws, or one of each."""
        if self.vectorized:
            return [self._run(self.without_data(), {}, num_draws, False)]
        return [self._run(self.without_data(), {}, None, False) for _ in range(num_draws)]

    def deterministic(self, z: Tensor) -> dict[str, Tensor]:
        """Return the values ``(S, *site_shape)`` of deterministic sites at vectors ``(S, D)``."""
        if not any(map(is_deterministic, self.prototype.nodes.values())):
            return {}
        return self.collect(z, "value", is_deterministic)

    def collect(
        self,
        z: Tensor,
        key: str,
        select: Callable[[dict], bool],
        model: Callable | None = None,
    ) -> dict[str, Tensor]:
        """Run the model at vectors ``(S, D)`` and collect an entry of the selected sites.

        Parameters
        ----------
        z
            Unconstrained vectors.
        key
            Which entry of a site: ``"value"`` or ``"log_prob"``.
        select
            Tells which sites.
        model
            A variant of the model, for instance one without data. Default: the model.

        Returns
        -------
        dict
            From site names to tensors ``(S, *shape)``.
        """
        rows = [z] if self.vectorized else z.split(1)
        traces = [self.trace(row, self.vectorized, model, sum_out=False) for row in rows]
        return {
            name: torch.cat(
                [
                    per_particle(trace.nodes[name][key], len(row), site_shape(site, key))
                    for trace, row in zip(traces, rows, strict=True)
                ]
            )
            for name, site in self.prototype.nodes.items()
            if site["type"] == "sample" and select(site)
        }

    def to(self, device: torch.device | str) -> ModelDensity:
        """Move the guide and the arguments to a device and return the density there."""
        guide = self.guide.to(device)
        guide.prototype_trace = None
        args, kwargs = pytree.tree_map_only(
            Tensor, lambda t: t.to(device), (self.args, self.kwargs)
        )
        return type(self)(self.model, guide, args, kwargs)

    def trace(
        self,
        z: Tensor,
        vectorized: bool = True,
        model: Callable | None = None,
        sum_out: bool = True,
    ) -> poutine.Trace:
        """Run the model at vectors ``(S, D)``; return its trace with log-probabilities.

        Parameters
        ----------
        z
            Unconstrained vectors.
        vectorized
            Run inside a plate of ``S`` particles; otherwise ``S`` must be 1.
        model
            A variant of the model, for instance one without data. Default: the model.
        sum_out
            Whether sites marked for enumeration take all their values, or are drawn.
        """
        values = self._latent_values(z, vectorized)
        num_particles = len(z) if vectorized else None
        return self._run(model or self.model, values, num_particles, sum_out)

    def _latent_values(self, z: Tensor, vectorized: bool) -> dict[str, Tensor]:
        """Return the values of latent sites, with room for the model's plates if vectorized."""
        nesting = self.plate_nesting if vectorized else 0
        return {
            site["name"]: biject_to(site["fn"].support)(value)
            for site, value in self._unpack(z if vectorized else z[0], nesting)
        }

    def _run(
        self,
        model: Callable,
        values: Mapping[str, Tensor],
        num_particles: int | None,
        sum_out: bool,
    ) -> poutine.Trace:
        """Run a model at values of its latent sites, in a plate of particles unless ``None``."""
        program = poutine.condition(model, values)
        if self.has_enumeration and sum_out:
            program = poutine.enum(program, first_available_dim=-2 - self.plate_nesting)
        # Far from the posterior a density may be NaN, which our callers handle; Pyro would raise
        # or warn.
        with poutine.block(), pyro.validation_enabled(False), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Encountered ", UserWarning)
            if num_particles is not None:
                particles = pyro.plate(PARTICLES, num_particles, dim=-1 - self.plate_nesting)
                program = particles(program)
            trace = poutine.trace(program).get_trace(*self.args, **self.kwargs)
            trace = prune_subsample_sites(trace)
            trace.compute_log_prob()
        return trace

    def _unpack(self, z: Tensor, nesting: int) -> Any:
        # Room for the model's plates between the particles and the latent vector.
        return self.guide._unpack_latent(z.reshape(*z.shape[:-1], *(1,) * nesting, z.shape[-1]))

    def _log_density(self, z: Tensor, vectorized: bool) -> Tensor:
        trace = self.trace(z, vectorized)
        total = _summed_out(trace) if self.has_enumeration else _summed(trace, z.shape[0])
        for site, value in self._unpack(z, self.plate_nesting):
            constrained = biject_to(site["fn"].support)(value)
            total = total + self._log_det(site, value, constrained)
        return total

    @staticmethod
    def _log_det(site: dict, z: Tensor, value: Tensor) -> Tensor:
        log_det = biject_to(site["fn"].support).log_abs_det_jacobian(z, value)
        return log_det.reshape(value.shape[0], -1).sum(-1)

    def _can_vectorize(self, start: Tensor) -> bool:
        generator = torch.Generator().manual_seed(0)
        noise = torch.randn(3, start.shape[0], generator=generator).to(start)
        z = start + 0.01 * noise
        with preserved():
            one_by_one = torch.cat([_seeded(self._log_density, row, False) for row in z.split(1)])
            try:
                together = _seeded(self._log_density, z, True)
                agree = torch.allclose(together, one_by_one, rtol=1e-3, equal_nan=True)
                reason = f"vectorized {together.tolist()}, one by one {one_by_one.tolist()}"
            except (RuntimeError, ValueError, IndexError) as error:
                agree, reason = False, str(error)
        if not agree:
            warnings.warn(
                "the model cannot run for many latent vectors at once, so it runs for one at a "
                "time, which is slow. Declare independence with pyro.plate and index latent "
                f"variables from the right ([..., i]). Log-densities: {reason}",
                stacklevel=2,
            )
        return agree


def is_deterministic(site: dict) -> bool:
    """Tell whether a site of a trace is a ``pyro.deterministic``."""
    return site["type"] == "sample" and bool(site["infer"].get("_deterministic"))


def structure(trace: poutine.Trace) -> tuple[int, bool]:
    """Return how deep plates nest in a model and whether it has sites to enumerate."""
    sites = [site for site in trace.nodes.values() if site["type"] == "sample"]
    frames = [frame for site in sites for frame in site["cond_indep_stack"] if frame.vectorized]
    enumerated = any(
        site["infer"].get("enumerate") == "parallel" and not site["is_observed"] for site in sites
    )
    return max((-frame.dim for frame in frames), default=0), enumerated


def site_shape(site: dict, key: str = "value") -> torch.Size:
    """Return the shape of a site's value, repeated along its plates, or of another entry."""
    if key == "value" and not is_deterministic(site):
        return torch.broadcast_shapes(site["value"].shape, site["fn"].shape())
    return site[key].shape


def per_particle(value: Tensor, num_particles: int, shape: torch.Size) -> Tensor:
    """Drop the padding between particles and a site's own shape; repeat what is common to all."""
    if value.numel() == num_particles * shape.numel():
        return value.reshape(num_particles, *shape)
    return value.expand(shape).expand(num_particles, *shape)


class _Unobserve(Messenger):
    """Leave the values of the named observed sites open."""

    def __init__(self, names: set[str]) -> None:
        super().__init__()
        self.names = names

    def _pyro_sample(self, msg: dict) -> None:
        if msg["name"] in self.names:
            msg["is_observed"], msg["value"], msg["done"] = False, None, False


def _summed(trace: poutine.Trace, num_particles: int) -> Tensor:
    """Sum all log-probabilities of each particle."""
    terms = [
        site["log_prob"].reshape(num_particles, -1).sum(-1)
        for site in trace.nodes.values()
        if site["type"] == "sample" and isinstance(site["log_prob"], Tensor)
    ]
    return torch.stack(terms).sum(0)


def _summed_out(trace: poutine.Trace) -> Tensor:
    """Sum all log-probabilities of each particle, discrete sites summed out."""
    trace.pack_tensors()
    plates = trace.plate_to_symbol
    terms: OrderedDict[frozenset, list[Tensor]] = OrderedDict()
    for site in trace.nodes.values():
        if site["type"] == "sample" and "log_prob" in site["packed"]:
            frames = frozenset(plates[f.name] for f in site["cond_indep_stack"] if f.vectorized)
            terms.setdefault(frames, []).append(site["packed"]["log_prob"])
    discrete = set(trace.symbol_to_dim) - set(plates.values())
    particles = frozenset({plates[PARTICLES]} if PARTICLES in plates else ())
    return contract_to_tensor(terms, discrete, target_ordinal=particles).reshape(-1)


def _seeded(function: Callable, *args: Any) -> Tensor:
    torch.manual_seed(0)  # a model may subsample its data
    return function(*args)
