"""Mixtures of flows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.distributions import constraints

from .bases import floating_tensor_of
from .flow import Flow, FlowModule
from .learned import LearnedDensity


class FlowMixture(LearnedDensity, dist.TorchDistribution):
    r"""Mix several flows.

    .. math:: p(x) = \textstyle\sum_k w_k \, p_k(x), \qquad w = \mathrm{softmax}(a)

    Flows map connected sets to connected sets; a mixture has parts that are apart. Its density
    takes one inverse pass of each flow, and so does sampling forward passes. The choice of the
    flow is discrete, so that samples have no gradients.

    Parameters
    ----------
    flows
        The flows :math:`p_k`, of equal event shape and ``context_dim``.
    logits
        The initial :math:`a`, shape ``(K,)``; learned with the flows. Default: equal weights.

    Raises
    ------
    TypeError
        If ``flows`` holds anything but flows.
    ValueError
        If there are none, or they disagree in shape or context, or ``logits`` has another shape.

    Examples
    --------
    >>> import pyroflows as pf
    >>> mixture = FlowMixture([pf.Flow(None, pf.flow("realnvp", 2)) for _ in range(3)])
    >>> mixture.sample((5,)).shape, mixture.log_prob(torch.zeros(7, 2)).shape
    (torch.Size([5, 2]), torch.Size([7]))
    """

    module: _MixtureModule
    arg_constraints: ClassVar[dict] = {}

    def __init__(
        self,
        flows: Sequence[Flow],
        logits: Tensor | None = None,
        validate_args: bool | None = None,
    ) -> None:
        _check_flows(flows)
        batch_shape = torch.broadcast_shapes(*(flow.batch_shape for flow in flows))
        self.flows = [flow.expand(batch_shape) for flow in flows]
        self.module = _MixtureModule([flow.module for flow in flows], logits)
        super().__init__(batch_shape, flows[0].event_shape, validate_args)

    @property
    def logits(self) -> Tensor:
        """Return the unnormalised log-weights, shape ``(K,)``."""
        return self.module.logits

    @property
    def support(self) -> constraints.Constraint:
        """Return the space of the flows."""
        return self.flows[0].support

    @property
    def context_dim(self) -> int:
        """Return the size of the context that is not bound yet, 0 for none."""
        return self.flows[0].context_dim

    def condition(self, context: Tensor) -> FlowMixture:
        """Bind a context of shape ``(*batch, context_dim)``; its batch becomes the batch shape."""
        flows = [flow.condition(context) for flow in self.flows]
        return FlowMixture(flows, self.logits, self._validate_args)

    def expand(self, batch_shape: Sequence[int], _instance: Any = None) -> FlowMixture:
        """Return the same mixture with a larger batch shape; parameters stay shared."""
        flows = [flow.expand(batch_shape) for flow in self.flows]
        return FlowMixture(flows, self.logits, self._validate_args)

    def log_prob(self, value: Tensor) -> Tensor:
        """Return the log-density, of shape ``(*sample_shape, *batch_shape)``."""
        if self._validate_args and value.numel():  # torch cannot check an empty batch
            self._validate_sample(value)
        return self.score(value)

    def score(self, value: Tensor, context: Tensor | None = None) -> Tensor:
        log_weights = self.logits.log_softmax(0)
        terms = [flow.score(value, context) + w for flow, w in zip(self.flows, log_weights)]
        return torch.stack(terms).logsumexp(0)

    @torch.no_grad()
    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Draw from all flows and keep, of each set of draws, one by the weights."""
        draws = torch.stack([flow.sample(torch.Size(sample_shape)) for flow in self.flows])
        shape = torch.Size(sample_shape) + self.batch_shape
        chosen = dist.Categorical(logits=self.logits).sample(shape)
        chosen = chosen.view(1, *shape, *(1,) * len(self.event_shape))
        return draws.gather(0, chosen.expand(1, *shape, *self.event_shape)).squeeze(0)

    def rsample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Raise: which flow a draw comes from is discrete."""
        raise NotImplementedError(
            "draws of a mixture of flows are not differentiable in its weights: use sample()"
        )

    def prepare(self, data: Tensor, context: Tensor | None, standardize: bool) -> None:
        for flow in self.flows:
            flow.prepare(data, context, standardize)


class _MixtureModule(nn.Module):
    """Hold the flows and the weights; given a parameter as weights, it is shared."""

    logits: nn.Parameter

    def __init__(self, modules: Sequence[FlowModule], logits: Tensor | None) -> None:
        super().__init__()
        self.flows = nn.ModuleList(modules)
        if logits is None:
            logits = floating_tensor_of(modules[0].transform).new_zeros(len(modules))
        if logits.shape != (len(modules),):
            raise ValueError(
                f"logits must have shape ({len(modules)},), one for each flow, got "
                f"{tuple(logits.shape)}"
            )
        if not isinstance(logits, nn.Parameter):
            logits = nn.Parameter(logits.detach().clone())
        self.logits = logits


def _check_flows(flows: Sequence[Flow]) -> None:
    if not flows:
        raise ValueError("flows must hold at least one flow, got none")
    for flow in flows:
        if not isinstance(flow, Flow):
            raise TypeError(f"flows must hold flows, got {type(flow).__name__}")
    for name in ("event_shape", "context_dim"):
        values = sorted({getattr(flow, name) for flow in flows})
        if len(values) > 1:
            raise ValueError(f"flows must agree in {name}, got {values}")
