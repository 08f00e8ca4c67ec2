"""The divergence of a velocity field: the trace of its Jacobian, exact or probed."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ...nn.velocity import VelocityAndDivergence, VelocityField

# (t, x) -> velocity (N, D) at the points x (N, D).
Velocity = Callable[[Tensor, Tensor], Tensor]


def bind(field: nn.Module, context: Tensor | None) -> Velocity:
    """Return the field as a function of time and place."""
    return field if context is None else lambda t, x: field(t, x, context)


def exact(field: nn.Module, context: Tensor | None) -> VelocityAndDivergence:
    """Return the field with its divergence: in closed form, or by ``D`` forward-mode tangents."""
    closed_form = field.with_divergence(context) if isinstance(field, VelocityField) else None
    return by_tangents(bind(field, context)) if closed_form is None else closed_form


def by_tangents(velocity: Velocity) -> VelocityAndDivergence:
    r"""Return a velocity with its divergence :math:`\sum_d e_d^\top J e_d`, whatever it is."""

    def evaluate(t: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        def entry(direction: Tensor) -> tuple[Tensor, Tensor]:
            v, tangent = derivative_along(velocity, t, x, direction.expand_as(x))
            return v, (tangent * direction).sum(-1)

        basis = torch.eye(x.shape[-1], dtype=x.dtype, device=x.device)
        v, diagonal = torch.func.vmap(entry, out_dims=(None, 0))(basis)  # type: ignore[arg-type]
        return v, diagonal.sum(0)

    return evaluate


def derivative_along(
    velocity: Velocity, t: Tensor, x: Tensor, direction: Tensor
) -> tuple[Tensor, Tensor]:
    r"""Return the velocity and its derivative :math:`J \epsilon` along a direction."""
    v_and_tangent = torch.func.jvp(lambda x: velocity(t, x), (x,), (direction,))
    return v_and_tangent[0], v_and_tangent[1]


def rademacher(x: Tensor) -> Tensor:
    """Draw a probe of signs, the noise of least variance."""
    return torch.empty_like(x).bernoulli_(0.5).mul_(2).sub_(1)


# Laws of mean zero and unit covariance: the mean of e^T J e is the trace, that of |J e|^2 the
# squared Frobenius norm.
NOISES: dict[str, Callable[[Tensor], Tensor]] = {
    "rademacher": rademacher,
    "gaussian": torch.randn_like,
}
