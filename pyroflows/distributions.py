"""Distributions made of flows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor

from .transforms import FlowTransform


class Flow(dist.TransformedDistribution):
    r"""Push a base distribution forward through a flow.

    With :math:`x = f(z)` and :math:`z \sim p_Z`,

    .. math:: \log p_X(x) = \log p_Z(f^{-1}(x)) + \log|\det J_{f^{-1}}(x)| .

    Parameters
    ----------
    base
        The distribution of ``z``, of the flow's event shape; univariate distributions of batch
        shape ``(D,)`` are read as one event.
    transform
        The flow ``f``. Conditional flows need :meth:`condition` before use.

    Raises
    ------
    TypeError
        If ``transform`` is not a ``FlowTransform``.
    ValueError
        If the shapes of ``base`` and ``transform`` disagree.

    Examples
    --------
    >>> import pyroflows as pf
    >>> base = dist.Normal(torch.zeros(2), 1.0).to_event(1)
    >>> flow = Flow(base, pf.flow("realnvp", 2, context_dim=3))
    >>> conditioned = flow.condition(torch.randn(5, 3))
    >>> conditioned.batch_shape, conditioned.event_shape
    (torch.Size([5]), torch.Size([2]))
    >>> x, log_prob = conditioned.rsample_and_log_prob((100,))
    >>> x.shape, log_prob.shape
    (torch.Size([100, 5, 2]), torch.Size([100, 5]))
    """

    def __init__(
        self, base: dist.Distribution, transform: FlowTransform, validate_args: bool | None = None
    ) -> None:
        if not isinstance(transform, FlowTransform):
            raise TypeError(f"transform must be a FlowTransform, got {type(transform).__name__}")
        size = len(transform.event_shape)
        shape = (base.batch_shape + base.event_shape)[-size:]
        if shape != transform.event_shape or len(base.event_shape) > size:
            raise ValueError(
                f"base must have the transform's event shape {tuple(transform.event_shape)}, got "
                f"batch shape {tuple(base.batch_shape)} and event shape {tuple(base.event_shape)}"
            )
        super().__init__(base, [transform], validate_args=validate_args)

    @property
    def transform(self) -> FlowTransform:
        """Return the flow that maps base samples to samples."""
        return self.transforms[0]

    def condition(self, context: Tensor) -> Flow:
        """Bind a context of shape ``(*batch, context_dim)``; its batch becomes the batch shape."""
        return Flow(self.base_dist, self.transform.condition(context), self._validate_args)

    def expand(self, batch_shape: Sequence[int], _instance: Any = None) -> Flow:
        batch_shape = torch.Size(batch_shape)
        return Flow(self.base_dist.expand(batch_shape), self.transform, self._validate_args)

    def log_prob(self, value: Tensor) -> Tensor:
        """Return the log-density, of shape ``(*sample_shape, *batch_shape)``.

        Takes one inverse pass, and none for the very tensor that was sampled last.
        """
        if self._validate_args and value.numel():  # torch cannot check an empty batch
            self._validate_sample(value)
        memory = self.transform.recall(y=value)
        if memory is None:
            x, log_det = self.transform.inverse_and_log_det(value)
        else:
            x, log_det = memory.x, -memory.log_det
        return self._base_log_prob(x) + log_det

    def rsample_and_log_prob(self, sample_shape: Sequence[int] = ()) -> tuple[Tensor, Tensor]:
        """Return samples and their log-density in one forward pass, both differentiable.

        Parameters
        ----------
        sample_shape
            Shape of the sample; the result has shapes ``(*sample_shape, *batch, *event)`` and
            ``(*sample_shape, *batch)``.
        """
        z = self.base_dist.rsample(torch.Size(sample_shape))
        x, log_det = self.transform.forward_and_log_det(z)
        return x, self._base_log_prob(z) - log_det

    def _base_log_prob(self, z: Tensor) -> Tensor:
        if not z.numel():  # torch cannot sum over the events of an empty batch
            return z.new_zeros(z.shape[: z.dim() - len(self.event_shape)])
        return self.base_dist.log_prob(z)


def standard_normal(like: Tensor) -> dist.Distribution:
    """Return the standard normal of one vector, with the size, dtype and device of ``like``.

    Examples
    --------
    >>> standard_normal(torch.zeros(3)).event_shape
    torch.Size([3])
    """
    loc, scale = torch.zeros_like(like), torch.ones_like(like)
    return dist.Normal(loc, scale, validate_args=False).to_event(1)
