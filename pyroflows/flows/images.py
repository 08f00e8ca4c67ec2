"""Named multi-scale flows of images: RealNVP and Glow."""

from __future__ import annotations

import functools
from collections.abc import Sequence

from torch import nn

from ..transforms import (
    PLU,
    ActNorm,
    Affine,
    Compose,
    FactorOut,
    FlowTransform,
    ImageCoupling,
    InvertibleConvolution,
    ScalarBijection,
    Squeezed,
)
from ..transforms.image.layout import image_shape
from ..transforms.image.masks import MaskName
from .registry import FlowSpec, register_flow
from .stacks import check_num_layers

Shape = tuple[int, int, int]
# Scales from 1/7 to 7 a layer: many layers of larger ones would not invert in single precision.
AFFINE = Affine(log_scale_bound=2.0)


def realnvp_image(
    event_shape: Sequence[int],
    context_dim: int = 0,
    num_scales: int = 2,
    num_layers: int = 3,
    width: int = 64,
    num_blocks: int = 2,
    activation: type[nn.Module] = nn.ReLU,
    bijection: ScalarBijection = AFFINE,
) -> FlowTransform:
    r"""Couple the pixels of a checkerboard, then channels of the squeezed image, over scales.

    At each scale data go through ``num_layers`` couplings with checkerboard masks; the image is
    squeezed, from :math:`(C, H, W)` to :math:`(4 C, H/2, W/2)`; there follow ``num_layers``
    couplings with channel masks, after which half of the channels are factored out. The last scale
    has one more checkerboard and no squeezing. Learned rescalings of the channels stand where the
    paper normalises batches, so that the density of an image does not depend on others.

    References
    ----------
    [1] L. Dinh, J. Sohl-Dickstein, S. Bengio. Density estimation using Real NVP.
        `arXiv:1605.08803 <https://arxiv.org/abs/1605.08803>`_, 2016.

    Examples
    --------
    >>> import torch
    >>> realnvp_image((1, 8, 8), num_layers=1, width=8)(torch.zeros(1, 8, 8)).shape
    torch.Size([1, 8, 8])
    """
    check_num_layers(num_layers)
    shape = image_shape(event_shape)
    _check_scales(shape, num_scales, num_scales - 1)
    coupling = functools.partial(
        ImageCoupling,
        bijection,
        context_dim=context_dim,
        width=width,
        num_blocks=num_blocks,
        kernel_size=3,
        activation=activation,
    )

    def couplings(shape: Shape, mask: MaskName, number: int) -> list[FlowTransform]:
        return [
            layer
            for i in range(number)
            for layer in (
                coupling(shape, mask=mask, swap=i % 2 == 1),
                ActNorm(shape, initialized=True),
            )
        ]

    def scales(shape: Shape, number: int) -> Compose:
        if number == 1:
            return Compose(couplings(shape, "checkerboard", num_layers + 1))
        squeezed = _squeezed(shape)
        rest = FactorOut(scales(_half(squeezed), number - 1), squeezed[0])
        channels = Compose([rest, *couplings(squeezed, "channel", num_layers)])
        return Compose([Squeezed(channels), *couplings(shape, "checkerboard", num_layers)])

    return scales(shape, num_scales)


def glow(
    event_shape: Sequence[int],
    context_dim: int = 0,
    num_scales: int = 2,
    num_layers: int = 8,
    width: int = 64,
    num_blocks: int = 1,
    activation: type[nn.Module] = nn.ReLU,
    bijection: ScalarBijection = AFFINE,
) -> FlowTransform:
    r"""Mix channels by invertible 1x1 convolutions between couplings, over scales.

    At each scale the image is squeezed, from :math:`(C, H, W)` to :math:`(4 C, H/2, W/2)`, and goes
    through ``num_layers`` steps of a learned rescaling of the channels, an invertible 1x1
    convolution and a coupling, which moves either half of the channels in turn; then half of them
    are factored out. The convolutions start as the identity.

    References
    ----------
    [1] D. P. Kingma, P. Dhariwal. Glow: Generative flow with invertible 1x1 convolutions.
        `arXiv:1807.03039 <https://arxiv.org/abs/1807.03039>`_, 2018.

    Examples
    --------
    >>> import torch
    >>> glow((1, 8, 8), num_layers=1, width=8)(torch.zeros(1, 8, 8)).shape
    torch.Size([1, 8, 8])
    """
    check_num_layers(num_layers)
    shape = image_shape(event_shape)
    _check_scales(shape, num_scales, num_scales)
    coupling = functools.partial(
        ImageCoupling,
        bijection,
        context_dim=context_dim,
        width=width,
        num_blocks=num_blocks,
        activation=activation,
    )

    def step(shape: Shape, swap: bool) -> list[FlowTransform]:
        return [
            coupling(shape, swap=swap),
            InvertibleConvolution(PLU(shape[0]), shape[1:]),
            ActNorm(shape, initialized=True),
        ]

    def scales(shape: Shape, number: int) -> Squeezed:
        squeezed = _squeezed(shape)
        steps = [layer for i in range(num_layers) for layer in step(squeezed, i % 2 == 1)]
        if number == 1:
            return Squeezed(Compose(steps))
        rest = FactorOut(scales(_half(squeezed), number - 1), squeezed[0])
        return Squeezed(Compose([rest, *steps]))

    return scales(shape, num_scales)


def _squeezed(shape: Shape) -> Shape:
    channels, height, width = shape
    return 4 * channels, height // 2, width // 2


def _half(shape: Shape) -> Shape:
    channels, height, width = shape
    return channels // 2, height, width


def _check_scales(shape: Shape, num_scales: int, num_squeezes: int) -> None:
    if num_scales < 1:
        raise ValueError(f"num_scales must be at least 1, got {num_scales}")
    factor = 2**num_squeezes
    if shape[1] % factor or shape[2] % factor:
        raise ValueError(
            f"height and width must be multiples of {factor} for num_scales={num_scales}, got an "
            f"image of shape {shape}"
        )


register_flow(
    FlowSpec(
        "realnvp_image",
        realnvp_image,
        fast_forward=True,
        fast_inverse=True,
        paper="arXiv:1605.08803",
        event="image",
    )
)
register_flow(
    FlowSpec(
        "glow",
        glow,
        fast_forward=True,
        fast_inverse=True,
        paper="arXiv:1807.03039",
        event="image",
    )
)
