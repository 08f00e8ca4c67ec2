"""Base distributions: what a flow pushes forward.

A base with parameters is a module that gives a distribution when it is called, made afresh from
what its parameters are by then.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.distributions import Distribution, constraints

from ..transforms import FlowTransform


def standard_normal(like: Tensor) -> dist.Distribution:
    """Return the standard normal of one vector, with the size, dtype and device of ``like``.

    Examples
    --------
    >>> standard_normal(torch.zeros(3)).event_shape
    torch.Size([3])
    """
    loc, scale = torch.zeros_like(like), torch.ones_like(like)
    return dist.Normal(loc, scale, validate_args=False).to_event(like.dim())


class StudentT(nn.Module):
    r"""Give independent Student's t distributions, one an entry, with learned tails.

    .. math:: p(z) = \textstyle\prod_d t_{\nu_d}(z_d)

    A flow whose layers are Lipschitz cannot make heavy tails of a normal distribution [1]; it can
    keep those of its base. Where to and how wide is left to the flow.

    Parameters
    ----------
    input_dim
        Number of entries ``D``.
    df
        The initial degrees of freedom :math:`\nu`, positive: one number, or one for each entry.
    trainable
        Whether :math:`\log \nu`, of shape ``(D,)``, is learned.

    Raises
    ------
    ValueError
        If ``input_dim`` or ``df`` is not positive, or ``df`` has another number of entries.

    References
    ----------
    [1] P. Jaini, I. Kobyzev, Y. Yu, M. Brubaker. Tails of Lipschitz triangular flows.
        `arXiv:1907.04481 <https://arxiv.org/abs/1907.04481>`_, 2019.

    Examples
    --------
    >>> base = StudentT(3, df=4.0)
    >>> base().sample((5,)).shape, base.df
    (torch.Size([5, 3]), tensor([4., 4., 4.], grad_fn=<ExpBackward0>))
    """

    log_df: Tensor

    def __init__(
        self, input_dim: int, df: float | Sequence[float] | Tensor = 5.0, trainable: bool = True
    ) -> None:
        super().__init__()
        _check_count("input_dim", input_dim)
        values = torch.as_tensor(df, dtype=torch.get_default_dtype())
        if values.shape not in ((), (input_dim,)):
            raise ValueError(
                f"df must be one number or {input_dim} of them, got shape {tuple(values.shape)}"
            )
        if not bool((values > 0).all()):
            raise ValueError(f"df must be positive, got {df}")
        _hold(self, "log_df", values.log().expand(input_dim), trainable)

    @property
    def df(self) -> Tensor:
        """Return the degrees of freedom, shape ``(D,)``."""
        return self.log_df.exp()

    def forward(self) -> dist.Distribution:
        """Return the distribution, of event shape ``(D,)``."""
        return dist.StudentT(self.df, validate_args=False).to_event(1)


class UniformBox(nn.Module):
    r"""Give the uniform distribution over a box, :math:`p(z) = \prod_d 1 / (h_d - l_d)`.

    The density is zero outside, with no slope to learn from: use it to sample through a flow, or
    under flows that keep the box.

    Parameters
    ----------
    low, high
        The corners :math:`l` and :math:`h`, shape ``(D,)``, kept as buffers.

    Raises
    ------
    ValueError
        If the shapes differ, or ``low`` is not below ``high``.

    Examples
    --------
    >>> base = UniformBox(torch.zeros(2), torch.tensor([2.0, 1.0]))
    >>> base().log_prob(torch.tensor([1.5, 0.5])).exp()
    tensor(0.5000)
    """

    low: Tensor
    high: Tensor

    def __init__(self, low: Tensor, high: Tensor) -> None:
        super().__init__()
        if low.shape != high.shape or not low.dim():
            raise ValueError(
                f"low and high must have the same shape (D,), got {tuple(low.shape)} and "
                f"{tuple(high.shape)}"
            )
        if not bool((low < high).all()):
            raise ValueError(f"low must be below high, got {low.tolist()} and {high.tolist()}")
        _hold(self, "low", low, trainable=False)
        _hold(self, "high", high, trainable=False)

    def forward(self) -> dist.Distribution:
        """Return the distribution, of event shape ``(D,)``."""
        return dist.Uniform(self.low, self.high, validate_args=False).to_event(self.low.dim())


class GaussianMixture(nn.Module):
    r"""Give a mixture of ``K`` normal distributions with diagonal covariances.

    .. math:: p(z) = \textstyle\sum_k w_k \, \mathcal{N}(z; \mu_k, \mathrm{diag}(\sigma_k^2))

    A flow is continuous: it stretches one mode into thin bridges between several, which a base
    with several modes spares it [1]. While its parameters are learned, a mixture cannot be sampled
    with gradients (``rsample``): it suits maximum likelihood. Costs ``O(K D)``.

    Parameters
    ----------
    input_dim
        Number of entries ``D``.
    num_components
        Number of components ``K``.
    seed
        Determines the initial means, and nothing else does.
    trainable
        Whether weights, means and scales are learned.
    spread
        Standard deviation of the initial means around zero.
    scale
        The initial :math:`\sigma`, positive.

    Raises
    ------
    ValueError
        If a size is below 1, ``spread`` is negative or ``scale`` not positive.

    References
    ----------
    [1] P. Izmailov, P. Kirichenko, M. Finzi, A. G. Wilson. Semi-supervised learning with
        normalizing flows. `arXiv:1912.13025 <https://arxiv.org/abs/1912.13025>`_, 2019.

    Examples
    --------
    >>> base = GaussianMixture(2, num_components=3)
    >>> base().sample((5,)).shape, base().log_prob(torch.zeros(7, 2)).shape
    (torch.Size([5, 2]), torch.Size([7]))
    """

    logits: Tensor
    locs: Tensor
    log_scales: Tensor

    def __init__(
        self,
        input_dim: int,
        num_components: int,
        seed: int = 0,
        trainable: bool = True,
        spread: float = 1.0,
        scale: float = 1.0,
    ) -> None:
        super().__init__()
        _check_count("input_dim", input_dim)
        _check_count("num_components", num_components)
        if not spread >= 0:
            raise ValueError(f"spread must not be negative, got {spread}")
        if not scale > 0:
            raise ValueError(f"scale must be positive, got {scale}")
        generator = torch.Generator().manual_seed(seed)
        shape = (num_components, input_dim)
        locs = torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu")
        weights = torch.zeros(num_components)
        _hold(self, "logits", weights, trainable)
        _hold(self, "locs", (spread * locs).to(weights), trainable)
        _hold(self, "log_scales", weights.new_full(shape, scale).log(), trainable)

    def forward(self) -> dist.Distribution:
        """Return the distribution, of event shape ``(D,)``."""
        components = dist.Normal(self.locs, self.log_scales.exp(), validate_args=False)
        weights = dist.Categorical(logits=self.logits, validate_args=False)
        return _NormalMixture(weights, components.to_event(1), validate_args=False)


class _NormalMixture(dist.MixtureSameFamily):
    @property
    def has_rsample(self) -> bool:
        """Tell whether draws depend on nothing that is learned."""
        parts = (self.component_distribution.mean, self.mixture_distribution.logits)
        return not any(part.requires_grad for part in parts)

    def rsample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        if not self.has_rsample:
            raise NotImplementedError(
                "draws of a mixture are not differentiable in its parameters: use sample(), or a "
                "GaussianMixture with trainable=False"
            )
        return self.sample(torch.Size(sample_shape))


class DefaultBase(nn.Module):
    """Give the distribution that goes with a flow: standard normal, or uniform over a box."""

    def __init__(self, transform: FlowTransform) -> None:
        super().__init__()
        self._transform = (transform,)  # in a tuple: its parameters are not this module's

    def forward(self) -> Distribution:
        (transform,) = self._transform
        like = floating_tensor_of(transform).new_zeros(transform.event_shape)
        space = innermost(transform.domain)
        if not isinstance(space, (constraints.interval, constraints.half_open_interval)):
            return standard_normal(like)
        low, high = like + space.lower_bound, like + space.upper_bound
        return dist.Uniform(low, high, validate_args=False).to_event(like.dim())


class Fixed(nn.Module):
    """Give a distribution made elsewhere; its tensors follow the module to dtypes and devices."""

    def __init__(self, distribution: Distribution) -> None:
        super().__init__()
        self.distribution = distribution

    def forward(self) -> Distribution:
        return self.distribution

    def _apply(self, fn: Callable, recurse: bool = True) -> Fixed:
        self.distribution = _map_tensors(fn, self.distribution)
        return super()._apply(fn, recurse)


def _map_tensors(function: Callable[[Tensor], Tensor], value: Any) -> Any:
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, Distribution):
        mapped = copy.copy(value)
        for name, attribute in vars(value).items():
            mapped.__dict__[name] = _map_tensors(function, attribute)
        return mapped
    return value


def _hold(module: nn.Module, name: str, value: Tensor, trainable: bool) -> None:
    value = value.detach().clone()
    if trainable:
        module.register_parameter(name, nn.Parameter(value))
    else:
        module.register_buffer(name, value)


def _check_count(name: str, value: int) -> None:
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")


def innermost(space: constraints.Constraint) -> constraints.Constraint:
    """Return the space of a single entry."""
    while isinstance(space, constraints.independent):
        space = space.base_constraint
    return space


def floating_tensor_of(flow: FlowTransform) -> Tensor:
    """Return a tensor with the dtype and the device of a flow."""
    tensors = itertools.chain(flow.parameters(), flow.buffers())
    return next((tensor for tensor in tensors if tensor.is_floating_point()), torch.zeros(()))
