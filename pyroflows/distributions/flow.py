"""The distribution a flow makes of a base."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.distributions import Distribution, constraints

from ..transforms import ActNorm, FlowTransform
from ..transforms.linear.actnorm import initialize_from_data
from .bases import DefaultBase, Fixed, innermost
from .learned import LearnedDensity
from .standardized import Standardized, standardized
from .tempering import Tempered

NUM_INITIAL_ROWS = 10_000  # of data, that layers take their first weights from


class Flow(LearnedDensity, dist.TransformedDistribution):
    r"""Push a base distribution forward through a flow.

    With :math:`x = f(z)` and :math:`z \sim p_Z`,

    .. math:: \log p_X(x) = \log p_Z(f^{-1}(x)) + \log|\det J_{f^{-1}}(x)| .

    All that is learned of it lives in one module, :attr:`module`; :meth:`fit` learns it from data.

    Parameters
    ----------
    base
        The distribution of ``z``, of the flow's event shape; univariate distributions of batch
        shape ``(D,)`` are read as one event. A module that gives a distribution when called, such
        as :class:`StudentT`, is called at each use, and learned with the flow. ``None`` stands for
        the standard normal (the uniform distribution where the flow maps angles), in the dtype
        and on the device of the flow.
    transform
        The flow ``f``. Conditional flows need :meth:`condition` before use.

    Raises
    ------
    TypeError
        If ``transform`` is not a ``FlowTransform``, or ``base`` none of the above.
    ValueError
        If the shapes of ``base`` and ``transform`` disagree.

    Examples
    --------
    >>> import pyroflows as pf
    >>> flow = Flow(None, pf.flow("realnvp", 2, context_dim=3))
    >>> conditioned = flow.condition(torch.randn(5, 3))
    >>> conditioned.batch_shape, conditioned.event_shape
    (torch.Size([5]), torch.Size([2]))
    >>> x, log_prob = conditioned.rsample_and_log_prob((100,))
    >>> x.shape, log_prob.shape
    (torch.Size([100, 5, 2]), torch.Size([100, 5]))
    """

    module: FlowModule

    def __init__(
        self,
        base: Distribution | nn.Module | None,
        transform: FlowTransform,
        validate_args: bool | None = None,
    ) -> None:
        if not isinstance(transform, FlowTransform):
            raise TypeError(f"transform must be a FlowTransform, got {type(transform).__name__}")
        self.module = FlowModule(_as_module(base, transform), transform)
        shape = _check_shapes(self.module.base(), transform)
        batch_shape = shape[: len(shape) - len(transform.event_shape)]
        # What torch's own constructor would set, base and transforms, are properties here.
        Distribution.__init__(self, batch_shape, transform.event_shape, validate_args)

    @property
    def base(self) -> nn.Module:
        """Return the module that gives the distribution of ``z``."""
        return self.module.base

    @property
    def base_dist(self) -> Distribution:
        """Return the distribution of ``z``, from the parameters as they are now."""
        base = self.module.base_distribution()
        return base if base.batch_shape == self.batch_shape else base.expand(self.batch_shape)

    @property
    def transform(self) -> FlowTransform:
        """Return the flow that maps base samples to samples."""
        return self.module.transform

    @property
    def transforms(self) -> list[FlowTransform]:
        """Return the flow, as the one entry of a list."""
        return [self.module.transform]

    @property
    def context_dim(self) -> int:
        """Return the size of the context that is not bound yet, 0 for none."""
        return self.transform.context_dim

    def condition(self, context: Tensor) -> Flow:
        """Bind a context of shape ``(*batch, context_dim)``; its batch becomes the batch shape."""
        return self._alike(self.base, self.transform.condition(context))

    def temper(self, temperature: float) -> Flow:
        r"""Multiply the scale of the base by a temperature :math:`T`; parameters stay shared.

        Low temperatures give samples closer to the modes [1]. Where the base is normal and
        :math:`\log|\det J|` does not depend on :math:`x`, as in NICE and linear flows, the result
        is exactly the density proportional to :math:`p(x)^{1/T^2}`. Elsewhere it is a heuristic:
        a normalised density with an exact :meth:`log_prob`, but not that power of :math:`p`. At
        ``T = 0`` all samples are the image of the mode of the base.

        Parameters
        ----------
        temperature
            The temperature :math:`T`, not negative.

        Raises
        ------
        ValueError
            If ``temperature`` is negative or not finite.
        TypeError
            If the base has no location and scale.

        References
        ----------
        [1] D. P. Kingma, P. Dhariwal. Glow: generative flow with invertible 1x1 convolutions.
            `arXiv:1807.03039 <https://arxiv.org/abs/1807.03039>`_, 2018.

        Examples
        --------
        >>> from pyroflows.transforms import Permutation
        >>> flow = Flow(dist.Normal(torch.ones(2), 1.0), Permutation([1, 0]))
        >>> flow.temper(0.0).sample()
        tensor([1., 1.])
        """
        return self._alike(Tempered(self.base, temperature), self.transform)

    def _alike(self, base: nn.Module, transform: FlowTransform) -> Flow:
        flow = Flow(base, transform, self._validate_args)
        batch_shape = torch.broadcast_shapes(self.batch_shape, flow.batch_shape)
        return flow if batch_shape == flow.batch_shape else flow.expand(batch_shape)

    def expand(self, batch_shape: Sequence[int], _instance: Any = None) -> Flow:
        """Return the same distribution with a larger batch shape; parameters stay shared.

        Raises
        ------
        ValueError
            If the batch shape does not expand to the new one.
        """
        batch_shape = torch.Size(batch_shape)
        shape = batch_shape + self.event_shape
        if self.transform.forward_shape(shape) != shape:
            raise ValueError(
                f"batch shape {tuple(self.batch_shape)} does not expand to {tuple(batch_shape)}"
            )
        self.module.base_distribution().expand(batch_shape)  # raises where that is impossible
        expanded = copy.copy(self)
        expanded._batch_shape = batch_shape
        return expanded

    def log_prob(self, value: Tensor) -> Tensor:
        """Return the log-density, of shape ``(*sample_shape, *batch_shape)``.

        Takes one inverse pass, and none for the very tensor that was sampled last.
        """
        memory = self.transform.recall(y=value)
        if memory is None:
            log_prob = self.score(value)
        else:
            log_prob = self._base_log_prob(memory.x) - memory.log_det
        if self._validate_args and self._is_suspicious(log_prob):
            self._validate_sample(value)
        return log_prob

    def _is_suspicious(self, log_prob: Tensor) -> bool:
        """Tell whether values may lie outside the support, by a look at their log-density."""
        if not log_prob.numel():  # torch cannot check an empty batch
            return False
        # Of real vectors only those with NaN lie outside, and NaN stays NaN: that takes a look at
        # a number a vector, where torch's own check would take a tenth of the time of a flow.
        is_real = innermost(self.transform.codomain) is constraints.real
        return not is_real or bool(log_prob.isnan().any())

    def score(self, value: Tensor, context: Tensor | None = None) -> Tensor:
        x, log_det = self.transform.inverse_and_log_det(value, context)
        return self._base_log_prob(x) + log_det

    def rsample_and_log_prob(self, sample_shape: Sequence[int] = ()) -> tuple[Tensor, Tensor]:
        """Return samples and their log-density in one forward pass, both differentiable.

        Parameters
        ----------
        sample_shape
            Shape of the sample; the result has shapes ``(*sample_shape, *batch, *event)`` and
            ``(*sample_shape, *batch)``.
        """
        base = self.base_dist
        z = base.rsample(torch.Size(sample_shape))
        x, log_det = self.transform.forward_and_log_det(z)
        return x, self._base_log_prob(z, base) - log_det

    def _base_log_prob(self, z: Tensor, base: Distribution | None = None) -> Tensor:
        if not z.numel():  # torch cannot sum over the events of an empty batch
            return z.new_zeros(z.shape[: z.dim() - len(self.event_shape)])
        return (self.base_dist if base is None else base).log_prob(z)

    def prepare(self, data: Tensor, context: Tensor | None, standardize: bool) -> None:
        if standardize:
            self.module.transform = standardized(self.transform, data, context)
        layers = [part for part in self.transform.modules() if isinstance(part, ActNorm)]
        if not all(layer.initialized for layer in layers):
            context = None if context is None else context[:NUM_INITIAL_ROWS]
            initialize_from_data(self.transform, data[:NUM_INITIAL_ROWS], context, inverse=True)


class FlowModule(nn.Module):
    """Hold what a flow learns: the parameters of its base and its transform."""

    base: nn.Module
    transform: FlowTransform

    def __init__(self, base: nn.Module, transform: FlowTransform) -> None:
        super().__init__()
        self.base = base
        self.transform = transform

    def base_distribution(self) -> Distribution:
        """Return the distribution of ``z``, of the flow's event shape."""
        base = self.base()
        missing = len(self.transform.event_shape) - len(base.event_shape)
        return dist.Independent(base, missing) if missing else base

    def _load_from_state_dict(self, state: Mapping, prefix: str, *args: Any) -> None:
        # The state of a flow that was fitted goes into a fresh one too.
        is_standardized = isinstance(self.transform, Standardized)
        if not is_standardized and f"{prefix}transform.context_scale" in state:
            self.transform = Standardized(self.transform).train(self.training)
        super()._load_from_state_dict(state, prefix, *args)


def _as_module(base: Distribution | nn.Module | None, transform: FlowTransform) -> nn.Module:
    if base is None:
        return DefaultBase(transform)
    if isinstance(base, Distribution):
        return Fixed(base)
    if isinstance(base, nn.Module):
        return base
    raise TypeError(
        f"base must be a distribution, a module that gives one, or None, got {type(base).__name__}"
    )


def _check_shapes(base: Distribution, transform: FlowTransform) -> torch.Size:
    """Return the shape of a sample."""
    size = len(transform.event_shape)
    shape = base.batch_shape + base.event_shape
    if shape[-size:] != transform.event_shape or len(base.event_shape) > size:
        raise ValueError(
            f"base must have the transform's event shape {tuple(transform.event_shape)}, got "
            f"batch shape {tuple(base.batch_shape)} and event shape {tuple(base.event_shape)}"
        )
    return transform.forward_shape(shape)
