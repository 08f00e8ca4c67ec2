"""Equations of increasing functions: how flows without a closed form invert."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

MAX_ITERATIONS = 200
_TRACED_ITERATIONS = 40  # where nothing can be tested: bisection alone would gain 12 digits


class ConvergenceError(RuntimeError):
    """Say that an iterative solve has not reached its tolerance; no result is returned.

    Examples
    --------
    >>> from pyroflows.transforms import planar
    >>> try:
    ...     x = planar(2).inv(torch.tensor([float("inf"), 0.0]))
    ... except ConvergenceError:
    ...     print("no result")
    no result
    """


@torch.no_grad()
def solve_increasing(
    function: Callable[[Tensor], tuple[Tensor, Tensor]],
    target: Tensor,
    lower: Tensor,
    upper: Tensor,
) -> Tensor:
    r"""Solve :math:`f(x) = y` for each entry, :math:`f` increasing, within a bracket.

    Newton's method, safeguarded: a step that would leave the bracket, or that follows one which
    has not halved the step before it, becomes a bisection [1]. Ends when no entry moves by more
    than a few units in the last place. Records no gradients: see :func:`with_implicit_gradient`.

    Parameters
    ----------
    function
        Maps ``x`` to :math:`f(x)` and :math:`f'(x) > 0`, entry by entry, all of the shape of
        ``target``.
    target
        The right-hand sides :math:`y`. Where one is NaN the solution is NaN.
    lower, upper
        A bracket: :math:`f(lower) \le y \le f(upper)`, up to rounding.

    Raises
    ------
    ConvergenceError
        If an entry has not converged in 200 iterations, as when :math:`f` is not finite.

    References
    ----------
    [1] W. H. Press et al. Numerical recipes, section 9.4. Cambridge University Press, 2007.

    Examples
    --------
    >>> cube = lambda x: (x**3, 3 * x**2)
    >>> solve_increasing(cube, torch.tensor([8.0, 27.0]), torch.zeros(2), torch.full((2,), 9.0))
    tensor([2., 3.])
    """
    eps = torch.finfo(target.dtype).eps
    solved = target.isnan()
    x = torch.where(solved, target, (lower + upper) / 2)
    previous_step = upper - lower
    untested = cannot_test(target)
    for _ in range(num_iterations(target)):
        value, slope = function(x)
        residual = value - target
        lower = torch.where(residual <= 0, x, lower)
        upper = torch.where(residual >= 0, x, upper)
        newton = x - residual / slope
        unit, size = eps * (1 + x.abs()), (newton - x).abs()
        inside = (newton >= lower) & (newton <= upper)
        halves = size <= previous_step.abs() / 2
        # Near a solution steps halve until they are rounding; a bisection then would throw the
        # entry far away again, and a solved one must not move while others go on.
        solved = solved | (inside & ~halves & (size <= 100 * unit))
        step = torch.where(inside & halves, newton, (lower + upper) / 2) - x
        previous_step = torch.where(solved, 0.0, step)
        x = x + previous_step
        solved = solved | ((previous_step.abs() <= 4 * unit) & residual.isfinite())
        if not untested and bool(solved.all()):
            return x
    if untested:
        return x
    raise ConvergenceError(
        f"{int((~solved).sum())} of {x.numel()} equations are not solved after {MAX_ITERATIONS} "
        "iterations; the parameters or inputs may be too large for their dtype: try float64"
    )


def cannot_test(x: Tensor) -> bool:
    """Tell whether convergence cannot be tested: there are no numbers, or a program is traced."""
    return x.is_meta or torch.jit.is_tracing()


def num_iterations(x: Tensor, most: int = MAX_ITERATIONS) -> int:
    """Return how many iterations a solve may take, or takes where convergence cannot be tested."""
    if x.is_meta:
        return 1
    return _TRACED_ITERATIONS if torch.jit.is_tracing() else most


def with_implicit_gradient(
    solution: Tensor, value: Tensor, slope: Tensor, target: Tensor
) -> Tensor:
    r"""Give the solution of scalar equations :math:`f_\theta(x) = y` its gradient.

    To first order :math:`x = x_0 - (f_\theta(x_0) - y) / f_\theta'(x_0)`: the step is zero up to
    rounding, its gradients with respect to :math:`\theta` and :math:`y` are not. Gradients of
    gradients are not available.

    Parameters
    ----------
    solution
        The solution :math:`x_0`, without gradient.
    value, slope
        :math:`f_\theta(x_0)`, with the gradient of :math:`\theta`, and :math:`f_\theta'(x_0)`.
    target
        The right-hand sides :math:`y`.

    Examples
    --------
    >>> y = torch.tensor(9.0, requires_grad=True)
    >>> x = torch.tensor(3.0)
    >>> root = with_implicit_gradient(x, x**2, 2 * x, y)
    >>> torch.autograd.grad(root, y)[0]
    tensor(0.1667)
    """
    return solution - (value - target) / slope.detach()
