"""Autoregression: each entry moves as the entries before it say."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..nn import MaskedMLP
from .base import FlowTransform
from .layout import batch_first, check_order, entries_first, parameter_planes, sum_entries
from .scalar import Affine, ScalarBijection
from .spline import Spline
from .substitution import image_and_score


class Autoregressive(FlowTransform):
    r"""Map each entry by a scalar bijection whose parameters depend on the entries before it.

    .. math:: y_d = g(x_d; \theta_d(x_{<d}, c)), \qquad
        \log|\det J| = \textstyle\sum_d \log g'(x_d; \theta_d) .

    The forward map takes one pass of the network. The inverse goes through the entries one by one,
    but evaluates each hidden unit only once, so that its arithmetic is that of one pass too,
    spread over ``D`` steps. Gradients of the inverse are those of the implicit function.

    ``Autoregressive(Affine(), D)`` is the layer of inverse autoregressive flow [1]; its inverse,
    ``Autoregressive(Affine(), D).inv``, that of masked autoregressive flow [2].

    Parameters
    ----------
    bijection
        What to do to each entry.
    input_dim
        Number of entries ``D``, at least 2 unless there is a context.
    context_dim
        Size of the context :math:`c`, 0 for none.
    hidden_dims
        Sizes of the hidden layers of the masked network.
    order
        Entries in the order in which they depend on each other. Default: as they are.
    activation
        A class of activation modules for the network.

    Raises
    ------
    ValueError
        If ``order`` is no permutation, ``input_dim`` is 1 without a context, or ``bijection`` acts
        on angles.

    References
    ----------
    [1] D. P. Kingma, T. Salimans, R. Jozefowicz, X. Chen, I. Sutskever, M. Welling. Improving
        variational inference with inverse autoregressive flow.
        `arXiv:1606.04934 <https://arxiv.org/abs/1606.04934>`_, 2016.
    [2] G. Papamakarios, T. Pavlakou, I. Murray. Masked autoregressive flow for density estimation.
        `arXiv:1705.07057 <https://arxiv.org/abs/1705.07057>`_, 2017.

    Examples
    --------
    >>> from pyroflows.transforms import Affine
    >>> flow = Autoregressive(Affine(), 10)
    >>> x = torch.randn(100, 10)
    >>> bool(torch.allclose(flow.inv(flow(x)), x, atol=1e-6))
    True
    """

    def __init__(
        self,
        bijection: ScalarBijection,
        input_dim: int,
        context_dim: int = 0,
        hidden_dims: Sequence[int] = (64, 64),
        order: Sequence[int] | None = None,
        activation: type[nn.Module] = nn.ReLU,
    ) -> None:
        super().__init__(input_dim, context_dim)
        if bijection.num_features != 1:
            raise ValueError(
                f"bijection must act on ordinary numbers, got {bijection}: its networks read "
                f"{bijection.num_features} features of each; use Coupling or Elementwise"
            )
        self.bijection = bijection
        order = check_order(order, input_dim)
        self.network = MaskedMLP(
            input_dim, bijection.num_parameters, hidden_dims, context_dim, order, activation
        )

    def forward_and_log_det(
        self, x: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        batch_shape = x.shape[:-1]
        rows = entries_first(x)
        y, log_derivative = self.bijection.forward(
            rows, self._parameters_of(rows, context, batch_shape)
        )
        return batch_first(y, batch_shape), sum_entries(log_derivative, batch_shape)

    def inverse_and_log_det(
        self, y: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        if torch.jit.is_tracing():
            x = self._sweep(y, context)
        else:
            x, log_det = self._fill_in(y, context)
            if not self._needs_gradient(y, context):
                return x, log_det
            x = self._attach_gradient(x, y, context)
        return x, -self.forward_and_log_det(x, context)[1]

    @torch.no_grad()
    def forward_and_score(
        self, x: Tensor, score: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        r"""Map ``x`` to ``y``, and the score of the density of ``x`` to that of ``y``.

        The score :math:`s = \partial_x \log q(x)` becomes the solution of
        :math:`J^T u = s - \partial_x \log|\det J|`. Takes a forward pass of the network, and a
        backward pass spread over ``D`` steps. Records no gradients.

        Parameters
        ----------
        x, score
            Shape ``(*batch, D)``.
        context
            Shape ``(*batch, context_dim)``.
        """
        x = self._check(x, context)
        batch_shape = x.shape[:-1]
        y, score = image_and_score(
            self.network,
            self.bijection,
            self._by_rank(x),
            self._by_rank(score.expand(x.shape)),
            context,
            batch_shape,
        )
        return self._by_entry(y, batch_shape), self._by_entry(score, batch_shape)

    def _by_rank(self, x: Tensor) -> Tensor:
        return entries_first(x).index_select(0, self.network.order)

    def _by_entry(self, rows: Tensor, batch_shape: torch.Size) -> Tensor:
        return batch_first(rows.index_select(0, self.network.rank), batch_shape)

    def _needs_gradient(self, y: Tensor, context: Tensor | None) -> bool:
        sources = (y, *self.parameters(), *(() if context is None else (context,)))
        return torch.is_grad_enabled() and any(source.requires_grad for source in sources)

    def _parameters_of(
        self, rows: Tensor, context: Tensor | None, batch_shape: Sequence[int]
    ) -> Tensor:
        parameters = self.network.rows(rows, context, batch_shape)
        return parameter_planes(parameters, self.bijection.num_parameters)

    def _fill_in(self, y: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        batch_shape = y.shape[:-1]
        if context is not None:
            context = context.expand(*batch_shape, self.context_dim)
            context = context.reshape(batch_shape.numel(), self.context_dim)
        x, log_det = self.network.fill_in(self.bijection.inverse, entries_first(y), context)
        return batch_first(x, batch_shape), log_det.reshape(batch_shape)

    def _sweep(self, y: Tensor, context: Tensor | None) -> Tensor:
        """Invert by ``D`` passes of plain operations, each of which settles one more entry.

        A traced program can record these; it cannot record the custom gradient.
        """
        batch_shape, target = y.shape[:-1], entries_first(y)
        rows = target
        for _ in range(self.event_shape[0]):
            parameters = self._parameters_of(rows, context, batch_shape)
            rows, _ = self.bijection.inverse(target, parameters)
        return batch_first(rows, batch_shape)

    def _attach_gradient(self, x: Tensor, y: Tensor, context: Tensor | None) -> Tensor:
        r"""Give the solution of :math:`f_\theta(x) = y` its gradient by implicit differentiation.

        To first order :math:`x = x_0 + J^{-1} (y - f_\theta(x_0))`: the bracket's value is zero,
        its gradients with respect to :math:`y`, :math:`\theta` and the context are not.
        """
        batch_shape = y.shape[:-1]
        leaf = x.detach().requires_grad_()
        parameters = self._parameters_of(entries_first(leaf), context, batch_shape)
        rows, log_derivative = self.bijection.forward(entries_first(x), parameters)
        image = batch_first(rows, batch_shape)
        slope = batch_first(log_derivative.detach().exp(), batch_shape)
        return _ImplicitSolution.apply(y - image, x, leaf, image, slope)

    def extra_repr(self) -> str:
        return f"{self.bijection}, {super().extra_repr()}"


class _ImplicitSolution(torch.autograd.Function):
    r"""Return ``x`` with the gradient :math:`J^{-1}` with respect to the residual ``y - f(x)``.

    :math:`J = S + L`: the slopes on the diagonal and, below it in the order of the entries, the
    derivative through the network alone. ``image`` depends on ``leaf`` through the network only,
    so that its vector-Jacobian product is that of ``L``.
    """

    @staticmethod
    def forward(
        ctx: Any, residual: Tensor, x: Tensor, leaf: Tensor, image: Tensor, slope: Tensor
    ) -> Tensor:
        ctx.leaf, ctx.image, ctx.slope = leaf, image, slope
        return x.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        # u (S + L) = gradient. L is nilpotent: D sweeps are exact, and few are usually enough.
        solution = gradient / ctx.slope
        for _ in range(gradient.shape[-1] - 1):
            (through_network,) = torch.autograd.grad(
                ctx.image, ctx.leaf, solution, retain_graph=True
            )
            previous, solution = solution, (gradient - through_network) / ctx.slope
            if torch.equal(previous, solution):
                break
        return solution, None, None, None, None


def affine_autoregressive(
    input_dim: int, hidden_dims: Sequence[int] | None = None, **options: Any
) -> Autoregressive:
    """Build an affine autoregressive flow, with Pyro's signature.

    Examples
    --------
    >>> affine_autoregressive(10)(torch.zeros(10)).shape
    torch.Size([10])
    """
    return conditional_affine_autoregressive(input_dim, 0, hidden_dims, **options)


def conditional_affine_autoregressive(
    input_dim: int, context_dim: int, hidden_dims: Sequence[int] | None = None, **options: Any
) -> Autoregressive:
    """Build an affine autoregressive flow with a context, with Pyro's signature.

    Examples
    --------
    >>> conditional_affine_autoregressive(10, 3).condition(torch.ones(3))(torch.zeros(10)).shape
    torch.Size([10])
    """
    hidden_dims = (3 * input_dim + 1,) if hidden_dims is None else hidden_dims
    return Autoregressive(Affine(), input_dim, context_dim, hidden_dims, **options)


def spline_autoregressive(
    input_dim: int,
    hidden_dims: Sequence[int] | None = None,
    count_bins: int = 8,
    bound: float = 3.0,
    **options: Any,
) -> Autoregressive:
    """Build a rational-quadratic spline autoregressive flow, with Pyro's signature.

    Examples
    --------
    >>> spline_autoregressive(10)(torch.zeros(10)).shape
    torch.Size([10])
    """
    return conditional_spline_autoregressive(
        input_dim, 0, hidden_dims, count_bins, bound, **options
    )


def conditional_spline_autoregressive(
    input_dim: int,
    context_dim: int,
    hidden_dims: Sequence[int] | None = None,
    count_bins: int = 8,
    bound: float = 3.0,
    **options: Any,
) -> Autoregressive:
    """Build a rational-quadratic spline autoregressive flow with a context, with Pyro's signature.

    Examples
    --------
    >>> conditional_spline_autoregressive(10, 3).condition(torch.ones(3))(torch.zeros(10)).shape
    torch.Size([10])
    """
    hidden_dims = (input_dim * 10, input_dim * 10) if hidden_dims is None else hidden_dims
    return Autoregressive(Spline(count_bins, bound), input_dim, context_dim, hidden_dims, **options)
