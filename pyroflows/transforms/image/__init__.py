"""Flows of images, events of shape (C, H, W)."""

from .convolution import InvertibleConvolution
from .coupling import ImageCoupling
from .factor_out import FactorOut
from .flattened import Flattened
from .logit import Logit
from .masks import ChannelMask, CheckerboardMask
from .squeeze import Squeezed

__all__ = [
    "ChannelMask",
    "CheckerboardMask",
    "FactorOut",
    "Flattened",
    "ImageCoupling",
    "InvertibleConvolution",
    "Logit",
    "Squeezed",
]
