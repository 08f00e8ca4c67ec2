"""Coupling of images: some entries move, the others say how through a convolutional network."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from torch import Tensor, nn
from torch.distributions import constraints

from ...nn import ConvolutionalNetwork
from ...nn.layout import fold_batch
from ..base import FlowTransform
from ..scalar import ScalarBijection
from .layout import fold_images, image_shape, spread_context
from .masks import ChannelMask, CheckerboardMask, Mask, MaskName

_MASKS: dict[str, Callable[..., Mask]] = {"channel": ChannelMask, "checkerboard": CheckerboardMask}


class ImageCoupling(FlowTransform):
    r"""Map some entries of an image by a scalar bijection whose parameters depend on the others.

    .. math:: y_A = x_A, \qquad y_B = g(x_B; \theta(x_A, c)), \qquad
        \log|\det J| = \textstyle\sum_{d \in B} \log g'(x_d; \theta_d) ,

    with a :class:`pyroflows.nn.ConvolutionalNetwork` :math:`\theta`. One pass in both directions.

    Parameters
    ----------
    bijection
        What to do to each moved entry: ``Affine()`` for RealNVP [1] and Glow [2].
    event_shape
        Shape ``(C, H, W)`` of an image.
    context_dim
        Size of the context :math:`c`, 0 for none.
    mask
        Which entries move: ``"channel"`` for the last half of the channels, ``"checkerboard"`` for
        every other pixel.
    swap
        Move what would be kept, and keep what would be moved.
    width
        Number of channels inside the network.
    num_blocks
        Number of residual convolutions of the network.
    kernel_size
        Size of their kernels, odd.
    activation
        A class of activation modules for the network.

    Raises
    ------
    ValueError
        If the mask is unknown or leaves nothing to move or to depend on, or a size is impossible.

    References
    ----------
    [1] L. Dinh, J. Sohl-Dickstein, S. Bengio. Density estimation using Real NVP.
        `arXiv:1605.08803 <https://arxiv.org/abs/1605.08803>`_, 2016.
    [2] D. P. Kingma, P. Dhariwal. Glow: Generative flow with invertible 1x1 convolutions.
        `arXiv:1807.03039 <https://arxiv.org/abs/1807.03039>`_, 2018.

    Examples
    --------
    >>> import torch
    >>> from pyroflows.transforms import Spline
    >>> flow = ImageCoupling(Spline(bins=8), (1, 8, 8), mask="checkerboard", width=16)
    >>> x = torch.randn(100, 1, 8, 8)
    >>> bool(torch.allclose(flow.inv(flow(x)), x, atol=1e-5))
    True
    """

    def __init__(
        self,
        bijection: ScalarBijection,
        event_shape: Iterable[int],
        context_dim: int = 0,
        mask: MaskName = "channel",
        swap: bool = False,
        width: int = 64,
        num_blocks: int = 1,
        kernel_size: int = 1,
        activation: type[nn.Module] = nn.ReLU,
    ) -> None:
        shape = image_shape(event_shape)
        super().__init__(shape, context_dim)
        if mask not in _MASKS:
            raise ValueError(f"mask must be one of {', '.join(map(repr, _MASKS))}, got {mask!r}")
        self.bijection = bijection
        self.mask = _MASKS[mask](shape, swap)
        self.network = ConvolutionalNetwork(
            bijection.num_features * self.mask.kept_channels,
            bijection.num_parameters * self.mask.moved_channels,
            width,
            num_blocks,
            kernel_size,
            context_dim,
            activation,
        )

    @property
    def domain(self) -> constraints.Constraint:
        return constraints.independent(self.bijection.domain, 3)

    def forward_and_log_det(
        self, x: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        return self._apply_bijection(self.bijection.forward, x, context)

    def inverse_and_log_det(
        self, y: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        return self._apply_bijection(self.bijection.inverse, y, context)

    def _apply_bijection(
        self, direction: Callable, x: Tensor, context: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        batch_shape, images = x.shape[:-3], fold_images(x)
        kept, moved = self.mask.split(images)
        features = self.bijection.features(kept.transpose(0, 1)).transpose(0, 1)
        parameters = self.network(features, spread_context(context, batch_shape))
        planes = parameters.unflatten(
            1, (self.bijection.num_parameters, self.mask.moved_channels)
        ).movedim(1, 0)
        y, log_det = self.mask.merge(images, *direction(moved, planes))
        return fold_batch(y, (*batch_shape, *self.event_shape)), fold_batch(log_det, batch_shape)

    def extra_repr(self) -> str:
        return f"{self.bijection}, {super().extra_repr()}"
