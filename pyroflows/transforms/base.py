"""The contract every flow obeys, and the flows it makes of any flow: inverse and conditioned."""

from __future__ import annotations

import copy
import functools
import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from pyro.distributions import TransformModule
from pyro.distributions.conditional import ConditionalTransform
from torch import Tensor, nn
from torch.distributions import constraints

from .memory import Memory, OptimizerSteps, tensors_of


def _checked(method: Callable) -> Callable:
    @functools.wraps(method)
    def checked(
        self: FlowTransform, x: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        x = self._check(x, context)
        return method(self, x) if context is None else method(self, x, context)

    return checked


def _check_context(flow: FlowTransform, context: Tensor) -> None:
    if not flow.context_dim:
        raise ValueError(
            f"{type(flow).__name__} takes no context (context_dim=0), got one of shape "
            f"{tuple(context.shape)}"
        )
    if context.shape[-1:] != (flow.context_dim,):
        raise ValueError(
            f"{type(flow).__name__} expects a context of trailing size {flow.context_dim}, "
            f"got a context of shape {tuple(context.shape)}"
        )


def _event_shape(event_shape: int | Iterable[int]) -> torch.Size:
    shape = torch.Size([event_shape] if isinstance(event_shape, int) else event_shape)
    if not shape or min(shape) < 1:
        raise ValueError(f"input_dim must be at least 1, got {event_shape}")
    return shape


class FlowTransform(TransformModule):
    r"""Map vectors to vectors by a learnable bijection with a tractable Jacobian determinant.

    This is the base class of all flows. An author of a new flow writes two methods::

        forward_and_log_det(x)  -> y, log|det dy/dx|
        inverse_and_log_det(y)  -> x, log|det dx/dy|

    with ``x`` and ``y`` of shape ``(*batch, *event_shape)`` and log-determinants of shape
    ``(*batch,)``; with ``context_dim > 0`` both take the context as a second argument. Everything
    else follows: Pyro's transform interface (``flow(x)``, ``flow.inv``,
    ``log_abs_det_jacobian``), checks of shapes, conditioning, caching, copying and pickling.

    Parameters
    ----------
    event_shape
        Shape of one event; an integer ``D`` stands for ``(D,)``.
    context_dim
        Size of the context vector the flow is conditioned on; 0 for an unconditional flow.
    cache_size
        With 1 (the default) the flow remembers its last pair ``(x, y)``, so that the
        log-determinant of a fresh sample costs nothing and its inverse is exact. A remembered pair
        is used only for the very same tensors, while no parameter has changed. 0 turns this off.

    Raises
    ------
    ValueError
        If an input's trailing sizes differ from ``event_shape``, or a context is missing,
        unexpected, or of the wrong size.

    Examples
    --------
    >>> class Double(FlowTransform):
    ...     def forward_and_log_det(self, x):
    ...         return 2 * x, x.new_full(x.shape[:-1], x.shape[-1]) * torch.tensor(2.0).log()
    ...     def inverse_and_log_det(self, y):
    ...         return y / 2, y.new_full(y.shape[:-1], -y.shape[-1]) * torch.tensor(2.0).log()
    >>> flow = Double(3)
    >>> x = torch.ones(3)
    >>> flow.inv(flow(x)), flow.log_abs_det_jacobian(x, flow(x))
    (tensor([1., 1., 1.]), tensor(2.0794))
    """

    bijective = True

    def __init__(
        self, event_shape: int | Iterable[int], context_dim: int = 0, cache_size: int = 1
    ) -> None:
        super().__init__(cache_size=cache_size)
        self.event_shape = _event_shape(event_shape)
        if context_dim < 0:
            raise ValueError(f"context_dim must be at least 0, got {context_dim}")
        self.context_dim = context_dim
        self._memory: Memory | None = None
        self._known_inverse: weakref.ref[Inverse] | None = None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        # Authors write the mathematics; every way into a flow is checked without their help.
        super().__init_subclass__(**kwargs)
        for name in ("forward_and_log_det", "inverse_and_log_det"):
            if name in cls.__dict__:
                setattr(cls, name, _checked(cls.__dict__[name]))

    def forward_and_log_det(
        self, x: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Map ``x`` to ``y``; return ``y`` and ``log|det dy/dx|``."""
        raise NotImplementedError(f"{type(self).__name__} does not define forward_and_log_det")

    def inverse_and_log_det(
        self, y: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Map ``y`` back to ``x``; return ``x`` and ``log|det dx/dy|``."""
        raise NotImplementedError(f"{type(self).__name__} does not define inverse_and_log_det")

    @property
    def domain(self) -> constraints.Constraint:
        """Return the space the flow maps from."""
        return constraints.independent(constraints.real, len(self.event_shape))

    @property
    def codomain(self) -> constraints.Constraint:
        """Return the space the flow maps onto."""
        return self.domain

    @property
    def inv(self) -> FlowTransform:
        """Return the inverse as a flow that shares this flow's parameters; ``inv.inv is self``."""
        known = self._known_inverse() if self._known_inverse is not None else None
        return Inverse(self) if known is None else known

    @property
    def sign(self) -> int:
        """Raise: the Jacobian's sign is known for univariate transforms only."""
        raise AttributeError(f"{type(self).__name__} has no sign")

    def condition(self, context: Tensor) -> Conditioned:
        """Bind a context of shape ``(*batch, context_dim)``; parameters stay shared."""
        return Conditioned(self, context)

    def __call__(self, x: Tensor) -> Tensor:
        """Map ``x`` to ``y``."""
        return self._call(x)

    def _inv_call(self, y: Tensor) -> Tensor:
        return self._inverse(y)

    def _call(self, x: Tensor) -> Tensor:
        memory = self.recall(x=x)
        if memory is None:
            y, log_det = self.forward_and_log_det(x)
            memory = self._remember(x, y, log_det, computed=y)
        return memory.y

    def _inverse(self, y: Tensor) -> Tensor:
        memory = self.recall(y=y)
        if memory is None:
            x, log_det = self.inverse_and_log_det(y)
            memory = self._remember(x, y, -log_det, computed=x)
        return memory.x

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        """Return ``log|det dy/dx|`` of shape ``(*batch,)`` for a pair with ``y = flow(x)``."""
        memory = self.recall(x=x, y=y)
        if memory is None:
            return self.forward_and_log_det(x)[1]
        return memory.log_det

    def recall(self, x: Tensor | None = None, y: Tensor | None = None) -> Memory | None:
        """Return the remembered pair if it answers for these very tensors, else ``None``."""
        memory = self._memory
        if memory is None:
            return None
        if (x is not None and x is not memory.x) or (y is not None and y is not memory.y):
            return None
        if memory.fingerprint != self._fingerprint(memory.x, memory.y):
            return None
        return memory

    def _remember(self, x: Tensor, y: Tensor, log_det: Tensor, computed: Tensor) -> Memory:
        fingerprint = self._fingerprint(x, y) if self._cache_size else None
        memory = Memory(x, y, log_det, fingerprint or (), ())
        if fingerprint is not None:
            storages = tuple(t.untyped_storage() for t in tensors_of(self))
            memory = memory._replace(storages=storages)
            self._memory = memory
            if not torch.jit.is_tracing():
                self._forget_after_backward(computed, log_det)
        return memory

    def _forget_after_backward(self, *tensors: Tensor) -> None:
        # backward() frees the graph behind the remembered tensors: they must not be used again.
        flow = weakref.ref(self)

        def forget(_: Tensor) -> None:
            if (alive := flow()) is not None:
                alive._memory = None

        for tensor in tensors:
            if tensor.requires_grad:
                tensor.register_hook(forget)

    def _fingerprint(self, x: Tensor, y: Tensor) -> tuple | None:
        """Identify all that an answer depends on; ``None`` where torch cannot tell."""
        try:
            stamps = tuple(
                (id(t), t._version, t.data_ptr(), t.requires_grad)
                for t in (x, y, *tensors_of(self))
            )
        except RuntimeError:  # inference tensors and torch.func wrappers have no version or storage
            return None
        return (self.training, torch.is_grad_enabled(), OptimizerSteps.count, stamps)

    def clear_cache(self) -> None:
        """Forget the remembered pair, here and in every part."""
        for module in self.modules():
            if isinstance(module, FlowTransform):
                module._memory = None

    def with_cache(self, cache_size: int = 1) -> FlowTransform:
        """Return this flow with the given ``cache_size``; parameters stay shared."""
        if cache_size not in (0, 1):
            raise ValueError(f"cache_size must be 0 or 1, got {cache_size}")
        if cache_size == self._cache_size:
            return self
        other = copy.copy(self)
        other._cache_size = cache_size
        return other

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_memory": None, "_known_inverse": None}

    def __repr__(self) -> str:
        return nn.Module.__repr__(self)

    def extra_repr(self) -> str:
        size = self.event_shape[0] if len(self.event_shape) == 1 else tuple(self.event_shape)
        return f"{size}, context_dim={self.context_dim}" if self.context_dim else f"{size}"

    def _check(self, x: Tensor, context: Tensor | None) -> Tensor:
        """Check shapes; return ``x`` broadcast against the batch shape of the context."""
        event_dim = len(self.event_shape)
        tracing = torch.jit.is_tracing()  # sizes are not numbers then
        if not tracing and x.shape[x.dim() - event_dim :] != self.event_shape:
            raise ValueError(
                f"{type(self).__name__} expects inputs of trailing shape "
                f"{tuple(self.event_shape)}, got an input of shape {tuple(x.shape)}"
            )
        if context is None:
            if self.context_dim:
                raise ValueError(
                    f"{type(self).__name__} needs a context of size {self.context_dim}, got none: "
                    "use flow.condition(context)"
                )
            return x
        if not tracing:
            _check_context(self, context)
        along_events = context[(..., slice(1), *(None,) * (event_dim - 1))]
        try:
            return torch.broadcast_tensors(x, along_events)[0]
        except RuntimeError as error:
            raise ValueError(
                f"batch shape {tuple(x.shape[: x.dim() - event_dim])} of the input does not "
                f"broadcast against batch shape {tuple(context.shape[:-1])} of the context"
            ) from error


# Pyro's ConditionalTransformedDistribution looks for this type before it calls `condition`.
ConditionalTransform.register(FlowTransform)


class Inverse(FlowTransform):
    """Swap the two directions of a flow; parameters and memory are the flow's own.

    Parameters
    ----------
    flow
        The flow to turn around. ``Inverse(flow).inv is flow``.

    Examples
    --------
    >>> from pyroflows.transforms import Permutation
    >>> flow = Permutation([2, 0, 1])
    >>> flow.inv(flow(torch.arange(3.0)))
    tensor([0., 1., 2.])
    """

    def __init__(self, flow: FlowTransform) -> None:
        super().__init__(flow.event_shape, flow.context_dim, flow._cache_size)
        self.flow = flow
        flow._known_inverse = weakref.ref(self)

    @property
    def domain(self) -> constraints.Constraint:
        return self.flow.codomain

    @property
    def codomain(self) -> constraints.Constraint:
        return self.flow.domain

    @property
    def inv(self) -> FlowTransform:
        self.flow._known_inverse = weakref.ref(self)  # forgotten by copies
        return self.flow

    def forward_and_log_det(
        self, x: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        return self.flow.inverse_and_log_det(x, context)

    def inverse_and_log_det(
        self, y: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        return self.flow.forward_and_log_det(y, context)

    def _call(self, x: Tensor) -> Tensor:
        return self.flow._inverse(x)

    def _inverse(self, y: Tensor) -> Tensor:
        return self.flow._call(y)

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        return -self.flow.log_abs_det_jacobian(y, x)

    def recall(self, x: Tensor | None = None, y: Tensor | None = None) -> Memory | None:
        memory = self.flow.recall(x=y, y=x)
        if memory is None:
            return None
        return memory._replace(x=memory.y, y=memory.x, log_det=-memory.log_det)

    def with_cache(self, cache_size: int = 1) -> FlowTransform:
        return self.flow.with_cache(cache_size).inv

    def forward_shape(self, shape: torch.Size) -> torch.Size:
        return self.flow.inverse_shape(shape)

    def inverse_shape(self, shape: torch.Size) -> torch.Size:
        return self.flow.forward_shape(shape)


class Conditioned(FlowTransform):
    """Bind a context to a conditional flow; parameters stay shared with it.

    Parameters
    ----------
    flow
        A flow with ``context_dim > 0``.
    context
        Shape ``(*batch, context_dim)``; its batch shape broadcasts against that of the inputs.

    Examples
    --------
    >>> from pyroflows.transforms import conditional_affine_coupling
    >>> flow = conditional_affine_coupling(2, context_dim=3).condition(torch.randn(5, 3))
    >>> flow(torch.randn(2)).shape
    torch.Size([5, 2])
    """

    def __init__(self, flow: FlowTransform, context: Tensor) -> None:
        _check_context(flow, context)
        super().__init__(flow.event_shape, cache_size=flow._cache_size)
        self.flow = flow
        self.register_buffer("context", context, persistent=False)

    @property
    def domain(self) -> constraints.Constraint:
        return self.flow.domain

    @property
    def codomain(self) -> constraints.Constraint:
        return self.flow.codomain

    def forward_and_log_det(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.flow.forward_and_log_det(x, self.context)

    def inverse_and_log_det(self, y: Tensor) -> tuple[Tensor, Tensor]:
        return self.flow.inverse_and_log_det(y, self.context)

    def forward_shape(self, shape: torch.Size) -> torch.Size:
        return self._with_context_batch(self.flow.forward_shape(shape))

    def inverse_shape(self, shape: torch.Size) -> torch.Size:
        return self._with_context_batch(self.flow.inverse_shape(shape))

    def _with_context_batch(self, shape: torch.Size) -> torch.Size:
        batch_dim = len(shape) - len(self.event_shape)
        batch_shape = torch.broadcast_shapes(shape[:batch_dim], self.context.shape[:-1])
        return batch_shape + shape[batch_dim:]
