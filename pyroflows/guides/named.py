"""Autoguides of the registered flows, one a name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..nn import GrowingTanh
from .auto_flow import AutoFlow


class AutoNICE(AutoFlow):
    """Approximate a posterior by additive couplings, see :func:`pyroflows.flows.nice`.

    Sampling and log-density take one pass. Takes the arguments of :class:`AutoFlow` but ``flow``.

    Examples
    --------
    >>> import pyro, torch
    >>> import pyro.distributions as dist
    >>> def model():
    ...     pyro.sample("x", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    >>> AutoNICE(model, num_layers=4)()["x"].shape
    torch.Size([3])
    """

    def __init__(self, model: Callable, **options: Any) -> None:
        super().__init__(model, flow="nice", **options)


class AutoRealNVP(AutoFlow):
    """Approximate a posterior by affine couplings, see :func:`pyroflows.flows.realnvp`.

    Sampling and log-density take one pass. Takes the arguments of :class:`AutoFlow` but ``flow``.

    Examples
    --------
    >>> import pyro, torch
    >>> import pyro.distributions as dist
    >>> def model():
    ...     pyro.sample("x", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    >>> AutoRealNVP(model, num_layers=4)()["x"].shape
    torch.Size([3])
    """

    def __init__(self, model: Callable, **options: Any) -> None:
        super().__init__(model, flow="realnvp", **options)


class AutoSpline(AutoFlow):
    """Approximate a posterior by spline couplings, see :func:`pyroflows.flows.spline_coupling`.

    Sampling and log-density take one pass. Takes the arguments of :class:`AutoFlow` but ``flow``.
    The networks go on growing far out in the tails (``activation``, by default
    :class:`pyroflows.nn.GrowingTanh`), where scales of posteriors do.

    Examples
    --------
    >>> import pyro, torch
    >>> import pyro.distributions as dist
    >>> def model():
    ...     pyro.sample("x", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    >>> AutoSpline(model, num_layers=4, bins=6)()["x"].shape
    torch.Size([3])
    """

    def __init__(self, model: Callable, **options: Any) -> None:
        super().__init__(model, flow="spline_coupling", **{"activation": GrowingTanh, **options})


class AutoIAF(AutoFlow):
    """Approximate a posterior by inverse autoregressive flow, see :func:`pyroflows.flows.iaf`.

    Sampling takes one pass; the log-density of values that were not just sampled takes ``D`` steps.
    Takes the arguments of :class:`AutoFlow` but ``flow``.

    Examples
    --------
    >>> import pyro, torch
    >>> import pyro.distributions as dist
    >>> def model():
    ...     pyro.sample("x", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    >>> AutoIAF(model, num_layers=2)()["x"].shape
    torch.Size([3])
    """

    def __init__(self, model: Callable, **options: Any) -> None:
        super().__init__(model, flow="iaf", **options)


class AutoMAF(AutoFlow):
    """Approximate a posterior by masked autoregressive flow, see :func:`pyroflows.flows.maf`.

    The log-density takes one pass; sampling, and so each step of variational inference, takes
    ``D`` steps: prefer :class:`AutoIAF` unless the density at given values is what you need. Takes
    the arguments of :class:`AutoFlow` but ``flow``.

    Examples
    --------
    >>> import pyro, torch
    >>> import pyro.distributions as dist
    >>> def model():
    ...     pyro.sample("x", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    >>> AutoMAF(model, num_layers=2)()["x"].shape
    torch.Size([3])
    """

    def __init__(self, model: Callable, **options: Any) -> None:
        super().__init__(model, flow="maf", **options)


class AutoPlanar(AutoFlow):
    """Approximate a posterior by planar flows, see :func:`pyroflows.flows.planar`.

    Sampling takes one pass; the log-density of values that were not just sampled takes a scalar
    root-finding per layer. Takes the arguments of
    :class:`AutoFlow` but ``flow``.

    Examples
    --------
    >>> import pyro, torch
    >>> import pyro.distributions as dist
    >>> def model():
    ...     pyro.sample("x", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    >>> AutoPlanar(model, num_layers=2)()["x"].shape
    torch.Size([3])
    """

    def __init__(self, model: Callable, **options: Any) -> None:
        super().__init__(model, flow="planar", **options)


class AutoRadial(AutoFlow):
    """Approximate a posterior by radial flows, see :func:`pyroflows.flows.radial`.

    Sampling and log-density take one pass. Takes the arguments of
    :class:`AutoFlow` but ``flow``.

    Examples
    --------
    >>> import pyro, torch
    >>> import pyro.distributions as dist
    >>> def model():
    ...     pyro.sample("x", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    >>> AutoRadial(model, num_layers=2)()["x"].shape
    torch.Size([3])
    """

    def __init__(self, model: Callable, **options: Any) -> None:
        super().__init__(model, flow="radial", **options)


class AutoSylvester(AutoFlow):
    """Approximate a posterior by Sylvester flows, see :func:`pyroflows.flows.sylvester`.

    Sampling takes one pass; the log-density of values that were not just sampled takes a few scalar
    root-findings per layer. Takes the arguments of :class:`AutoFlow` but ``flow``.

    Examples
    --------
    >>> import pyro, torch
    >>> import pyro.distributions as dist
    >>> def model():
    ...     pyro.sample("x", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    >>> AutoSylvester(model, num_layers=2)()["x"].shape
    torch.Size([3])
    """

    def __init__(self, model: Callable, **options: Any) -> None:
        super().__init__(model, flow="sylvester", **options)


class AutoNeuralAutoregressive(AutoFlow):
    """Approximate a posterior by neural autoregressive flow.

    See :func:`pyroflows.flows.neural_autoregressive`.

    Sampling takes one pass; the log-density of values that were not just sampled takes ``D``
    root-findings. Takes the arguments of
    :class:`AutoFlow` but ``flow``.

    Examples
    --------
    >>> import pyro, torch
    >>> import pyro.distributions as dist
    >>> def model():
    ...     pyro.sample("x", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    >>> AutoNeuralAutoregressive(model, num_layers=2)()["x"].shape
    torch.Size([3])
    """

    def __init__(self, model: Callable, **options: Any) -> None:
        super().__init__(model, flow="neural_autoregressive", **options)


class AutoBlockAutoregressive(AutoFlow):
    """Approximate a posterior by block neural autoregressive flow.

    See :func:`pyroflows.flows.block_autoregressive`.

    Sampling takes one pass; the log-density of values that were not just sampled takes ``D``
    root-findings. Takes the arguments of
    :class:`AutoFlow` but ``flow``.

    Examples
    --------
    >>> import pyro, torch
    >>> import pyro.distributions as dist
    >>> def model():
    ...     pyro.sample("x", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    >>> AutoBlockAutoregressive(model, num_layers=2)()["x"].shape
    torch.Size([3])
    """

    def __init__(self, model: Callable, **options: Any) -> None:
        super().__init__(model, flow="block_autoregressive", **options)


class AutoResidual(AutoFlow):
    """Approximate a posterior by residual flow, see :func:`pyroflows.flows.residual`.

    Sampling takes one pass; the log-density of values that were not just sampled takes
    fixed-point iterations. Takes the arguments of :class:`AutoFlow` but ``flow``.

    Examples
    --------
    >>> import pyro, torch
    >>> import pyro.distributions as dist
    >>> def model():
    ...     pyro.sample("x", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    >>> AutoResidual(model, num_layers=2)()["x"].shape
    torch.Size([3])
    """

    def __init__(self, model: Callable, **options: Any) -> None:
        super().__init__(model, flow="residual", **options)


class AutoCNF(AutoFlow):
    """Approximate a posterior by continuous normalizing flow, see :func:`pyroflows.flows.cnf`.

    Sampling and log-density solve an ordinary differential equation each. Takes the arguments of
    :class:`AutoFlow` but ``flow``.

    Examples
    --------
    >>> import pyro, torch
    >>> import pyro.distributions as dist
    >>> def model():
    ...     pyro.sample("x", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    >>> AutoCNF(model, num_layers=2)()["x"].shape
    torch.Size([3])
    """

    def __init__(self, model: Callable, **options: Any) -> None:
        super().__init__(model, flow="cnf", **options)
