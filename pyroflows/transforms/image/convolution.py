"""The invertible 1x1 convolution: one linear map of the channels at every pixel."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from ..base import FlowTransform
from ..linear import DiagonalAffine, Orthogonal, Permutation, TriangularAffine
from ..linear.factorized import FactorizedLinear
from .layout import image_shape

_LINEAR = (FactorizedLinear, Orthogonal, Permutation, DiagonalAffine, TriangularAffine)


class InvertibleConvolution(FlowTransform):
    r"""Map the channels of every pixel by one linear flow, the invertible 1x1 convolution [1].

    .. math:: y_{\cdot ij} = W x_{\cdot ij} + t, \qquad \log|\det J| = H W \log|\det W| .

    The flow is asked once a batch for :math:`W` and :math:`t`, or for its inverse; both directions
    are then one product. Costs ``O(H W C^2 + C^3)``.

    Parameters
    ----------
    linear
        A linear flow of vectors of ``C`` entries: ``PLU(C)`` as in Glow, ``QR(C)``,
        ``Orthogonal(C)``, or a permutation. With a context, the map depends on it.
    grid
        Height and width ``(H, W)`` of an image.

    Raises
    ------
    TypeError
        If ``linear`` is not a linear flow.
    ValueError
        If ``grid`` is not two positive numbers.

    References
    ----------
    [1] D. P. Kingma, P. Dhariwal. Glow: Generative flow with invertible 1x1 convolutions.
        `arXiv:1807.03039 <https://arxiv.org/abs/1807.03039>`_, 2018.

    Examples
    --------
    >>> from pyroflows.transforms import PLU
    >>> flow = InvertibleConvolution(PLU(3), (8, 8))
    >>> flow(torch.zeros(5, 3, 8, 8)).shape
    torch.Size([5, 3, 8, 8])
    """

    def __init__(self, linear: FlowTransform, grid: Iterable[int]) -> None:
        if not isinstance(linear, _LINEAR):
            raise TypeError(f"linear must be a linear flow, got {type(linear).__name__}")
        shape = image_shape((*linear.event_shape, *grid))
        super().__init__(shape, linear.context_dim)
        self.linear = linear

    def forward_and_log_det(
        self, x: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        return self._convolve(self.linear.forward_and_log_det, x, context)

    def inverse_and_log_det(
        self, y: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        return self._convolve(self.linear.inverse_and_log_det, y, context)

    def _convolve(
        self, direction: Callable, x: Tensor, context: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        weight, shift, log_det = self._affine(direction, x, context)
        batch_shape, (channels, *grid) = x.shape[:-3], self.event_shape
        size = batch_shape.numel()
        # A product for each image, unlike one for all pixels, leaves the memory as it lies.
        y = torch.baddbmm(
            shift.expand(*batch_shape, channels).reshape(size, channels, 1),
            weight.expand(*batch_shape, channels, channels).reshape(size, channels, channels),
            x.reshape(size, channels, math.prod(grid)),
        )
        return y.reshape(x.shape), (math.prod(grid) * log_det).expand(batch_shape)

    def _affine(
        self, direction: Callable, like: Tensor, context: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the matrix, the shift and the log-determinant of the map of one pixel."""
        channels = self.event_shape[0]
        # A linear map is known by where it takes the origin and the unit vectors.
        units = torch.eye(channels, dtype=like.dtype, device=like.device)
        points = torch.cat([torch.zeros_like(units[:1]), units])
        images, log_dets = direction(points, None if context is None else context.unsqueeze(-2))
        shift, columns = images.split([1, channels], -2)
        return (columns - shift).mT, shift.squeeze(-2), log_dets[..., 0]
