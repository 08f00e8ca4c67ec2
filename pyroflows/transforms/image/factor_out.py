"""Factoring out: some channels are done, the others go through more of a flow."""

from __future__ import annotations

import torch
from torch import Tensor

from ..base import FlowTransform
from .layout import image_shape


class FactorOut(FlowTransform):
    r"""Map the first channels by a flow and leave the others as they are.

    .. math:: y = (f(x_A), x_B)

    Of a multi-scale architecture [1] this is what stands between two scales: data go from fine to
    coarse scales, and at each scale half of the channels come out as they are, factored out.

    Parameters
    ----------
    flow
        The flow :math:`f`, of event shape ``(K, H, W)``.
    num_channels
        Number of channels ``C`` of the whole image, at least ``K``.

    Raises
    ------
    ValueError
        If ``num_channels`` is smaller than the number of channels of ``flow``, or the event shape
        of ``flow`` is none of an image.

    References
    ----------
    [1] L. Dinh, J. Sohl-Dickstein, S. Bengio. Density estimation using Real NVP.
        `arXiv:1605.08803 <https://arxiv.org/abs/1605.08803>`_, 2016.

    Examples
    --------
    >>> from pyroflows.transforms import ActNorm
    >>> flow = FactorOut(ActNorm((2, 4, 4), initialized=True), num_channels=6)
    >>> flow(torch.zeros(7, 6, 4, 4)).shape
    torch.Size([7, 6, 4, 4])
    """

    def __init__(self, flow: FlowTransform, num_channels: int) -> None:
        channels, height, width = image_shape(flow.event_shape)
        if num_channels < channels:
            raise ValueError(
                f"num_channels must be at least the {channels} of the flow, got {num_channels}"
            )
        super().__init__((num_channels, height, width), flow.context_dim)
        self.flow = flow
        self.sizes = (channels, num_channels - channels)

    def forward_and_log_det(
        self, x: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        first, others = x.split(self.sizes, -3)
        first, log_det = self.flow.forward_and_log_det(first, context)
        return torch.cat([first, others], -3), log_det

    def inverse_and_log_det(
        self, y: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        first, others = y.split(self.sizes, -3)
        first, log_det = self.flow.inverse_and_log_det(first, context)
        return torch.cat([first, others], -3), log_det
