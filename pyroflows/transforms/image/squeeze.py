"""Squeezing: blocks of pixels become channels."""

from __future__ import annotations

from torch import Tensor

from ..base import FlowTransform
from .layout import image_shape


class Squeezed(FlowTransform):
    r"""Map an image by a flow of its squeezed form, in which blocks of pixels are channels.

    :math:`f = S^{-1} \circ g \circ S`, where :math:`S` turns an image of shape
    :math:`(C, r h, r w)` into one of shape :math:`(r^2 C, h, w)` [1]: channel ``(i r + j) C + c``
    holds the pixels that lie ``i`` rows and ``j`` columns into their blocks. The log-determinant
    is that of :math:`g`.

    Parameters
    ----------
    flow
        The flow :math:`g`, of event shape :math:`(r^2 C, h, w)`.
    factor
        The size :math:`r` of the blocks.

    Raises
    ------
    ValueError
        If the event shape of ``flow`` is none of an image, or its channels are no multiple of
        :math:`r^2`.

    References
    ----------
    [1] L. Dinh, J. Sohl-Dickstein, S. Bengio. Density estimation using Real NVP.
        `arXiv:1605.08803 <https://arxiv.org/abs/1605.08803>`_, 2016.

    Examples
    --------
    >>> import torch
    >>> from pyroflows.transforms import ActNorm
    >>> flow = Squeezed(ActNorm((12, 4, 4), initialized=True))
    >>> flow.event_shape, flow(torch.zeros(7, 3, 8, 8)).shape
    (torch.Size([3, 8, 8]), torch.Size([7, 3, 8, 8]))
    """

    def __init__(self, flow: FlowTransform, factor: int = 2) -> None:
        channels, height, width = image_shape(flow.event_shape)
        if factor < 1 or channels % factor**2:
            raise ValueError(
                f"factor must be positive, and its square divide the {channels} channels of the "
                f"flow, got {factor}"
            )
        shape = (channels // factor**2, factor * height, factor * width)
        super().__init__(shape, flow.context_dim)
        self.flow = flow
        self.factor = factor

    def forward_and_log_det(
        self, x: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        y, log_det = self.flow.forward_and_log_det(squeeze(x, self.factor), context)
        return unsqueeze(y, self.factor), log_det

    def inverse_and_log_det(
        self, y: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        x, log_det = self.flow.inverse_and_log_det(squeeze(y, self.factor), context)
        return unsqueeze(x, self.factor), log_det

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, factor={self.factor}"


def squeeze(x: Tensor, factor: int) -> Tensor:
    """Turn ``(*batch, C, r h, r w)`` into ``(*batch, r^2 C, h, w)``."""
    blocks = x.unflatten(-1, (x.shape[-1] // factor, factor))
    blocks = blocks.unflatten(-3, (x.shape[-2] // factor, factor))
    return blocks.movedim((-3, -1), (-5, -4)).flatten(-5, -3)


def unsqueeze(x: Tensor, factor: int) -> Tensor:
    """Turn ``(*batch, r^2 C, h, w)`` back into ``(*batch, C, r h, r w)``."""
    blocks = x.unflatten(-3, (factor, factor, x.shape[-3] // factor**2))
    return blocks.movedim((-5, -4), (-3, -1)).flatten(-4, -3).flatten(-2, -1)
