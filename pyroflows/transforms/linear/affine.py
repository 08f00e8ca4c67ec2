"""Affine maps of the whole vector, full-rank and diagonal."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..base import FlowTransform


class TriangularAffine(FlowTransform):
    r"""Map the vector by a full-rank affine map: :math:`y = \mu + L x`, ``L`` lower triangular.

    On a standard normal vector it gives any normal distribution, with covariance
    :math:`L L^\top`. What is learned is the map relative to a fixed frame :math:`(\mu_0, L_0)`,

    .. math:: y = \mu_0 + L_0 (m + M x), \qquad
        \log|\det J| = \textstyle\sum_d \log (L_0)_{dd} + \log M_{dd} ,

    so that steps of equal size mean the same whatever the units of :math:`y`: see
    :meth:`set_frame`. Costs ``O(D^2)`` in both directions.

    Parameters
    ----------
    loc
        The initial :math:`\mu`, shape ``(D,)``.
    scale_tril
        The initial :math:`L`, shape ``(D, D)``, with a positive diagonal; entries above the
        diagonal are ignored.

    Raises
    ------
    ValueError
        If the shapes disagree or the diagonal is not positive.

    Examples
    --------
    >>> flow = TriangularAffine(torch.zeros(2), torch.tensor([[2.0, 0.0], [1.0, 1.0]]))
    >>> flow(torch.ones(2)).detach()
    tensor([2., 2.])
    """

    frame_loc: Tensor
    frame_scale_tril: Tensor

    def __init__(self, loc: Tensor, scale_tril: Tensor) -> None:
        _check_loc_scale(loc, scale_tril, "scale_tril", (loc.shape[0],) * 2)
        smallest = scale_tril.diagonal().min().item()
        if not smallest > 0:
            raise ValueError(f"scale_tril must have a positive diagonal, got {smallest}")
        super().__init__(loc.shape[0])
        scale_tril = scale_tril.detach()
        self.loc = nn.Parameter(torch.zeros_like(loc))
        self.log_diagonal = nn.Parameter(scale_tril.diagonal().log())
        self.below_diagonal = nn.Parameter(scale_tril.tril(-1))
        self.register_buffer("frame_loc", loc.detach().clone())
        self.register_buffer("frame_scale_tril", torch.eye(loc.shape[0]).to(scale_tril))

    @torch.no_grad()
    def set_frame(self, loc: Tensor, scale_tril: Tensor) -> None:
        """Make the map ``loc + scale_tril @ x`` and learn on from there, relative to it."""
        self.frame_loc.copy_(loc)
        self.frame_scale_tril.copy_(scale_tril)
        for parameter in self.parameters():
            parameter.zero_()

    def affine(self) -> tuple[Tensor, Tensor]:
        """Return the shift ``(D,)`` and the lower triangular matrix ``(D, D)``."""
        relative = self.below_diagonal.tril(-1) + self.log_diagonal.exp().diag()
        loc = self.frame_loc + self.frame_scale_tril @ self.loc
        return loc, self.frame_scale_tril @ relative

    def forward_and_log_det(self, x: Tensor) -> tuple[Tensor, Tensor]:
        loc, scale_tril = self.affine()
        return loc + x @ scale_tril.T, self._log_det().expand(x.shape[:-1])

    def inverse_and_log_det(self, y: Tensor) -> tuple[Tensor, Tensor]:
        loc, scale_tril = self.affine()
        rows = (y - loc).reshape(y.shape[:-1].numel(), y.shape[-1]).T
        x = torch.linalg.solve_triangular(scale_tril, rows, upper=False)
        return x.T.reshape(y.shape), -self._log_det().expand(y.shape[:-1])

    def _log_det(self) -> Tensor:
        return (self.log_diagonal + self.frame_scale_tril.diagonal().log()).sum()


class DiagonalAffine(FlowTransform):
    r"""Scale and shift each entry: :math:`y = \mu + \sigma x` with :math:`\sigma` unbounded.

    What is learned is the map relative to a fixed frame, as in :class:`TriangularAffine`. Costs
    ``O(D)`` in both directions.

    Parameters
    ----------
    loc
        The initial shift :math:`\mu`, shape ``(D,)``.
    scale
        The initial scale :math:`\sigma`, shape ``(D,)``, positive.

    Raises
    ------
    ValueError
        If the shapes disagree or the scale is not positive.

    Examples
    --------
    >>> flow = DiagonalAffine(torch.zeros(2), torch.tensor([2.0, 1.0]))
    >>> flow(torch.ones(2)).detach()
    tensor([2., 1.])
    """

    frame_loc: Tensor
    frame_scale: Tensor

    def __init__(self, loc: Tensor, scale: Tensor) -> None:
        _check_loc_scale(loc, scale, "scale", loc.shape)
        smallest = scale.min().item()
        if not smallest > 0:
            raise ValueError(f"scale must be positive, got {smallest}")
        super().__init__(loc.shape[0])
        self.loc = nn.Parameter(torch.zeros_like(loc))
        self.log_scale = nn.Parameter(scale.detach().log())
        self.register_buffer("frame_loc", loc.detach().clone())
        self.register_buffer("frame_scale", torch.ones_like(loc))

    @torch.no_grad()
    def set_frame(self, loc: Tensor, scale: Tensor) -> None:
        """Make the map ``loc + scale * x`` and learn on from there, relative to it."""
        self.frame_loc.copy_(loc)
        self.frame_scale.copy_(scale)
        for parameter in self.parameters():
            parameter.zero_()

    def affine(self) -> tuple[Tensor, Tensor]:
        """Return the shift and the scale, both of shape ``(D,)``."""
        loc = self.frame_loc + self.frame_scale * self.loc
        return loc, self.frame_scale * self.log_scale.exp()

    def forward_and_log_det(self, x: Tensor) -> tuple[Tensor, Tensor]:
        loc, scale = self.affine()
        return loc + scale * x, scale.log().sum().expand(x.shape[:-1])

    def inverse_and_log_det(self, y: Tensor) -> tuple[Tensor, Tensor]:
        loc, scale = self.affine()
        return (y - loc) / scale, -scale.log().sum().expand(y.shape[:-1])


def _check_loc_scale(loc: Tensor, scale: Tensor, name: str, shape: Sequence[int]) -> None:
    if loc.dim() != 1 or scale.shape != torch.Size(shape):
        raise ValueError(
            f"loc must have shape (D,) and {name} {'(D, D)' if len(shape) > 1 else '(D,)'}, got "
            f"{tuple(loc.shape)} and {tuple(scale.shape)}"
        )
