"""Networks used inside flows."""

from .activation import GrowingTanh
from .block_linear import BlockLinear
from .convolution import ConvolutionalNetwork
from .hypernetwork import Hypernetwork
from .lipschitz import LipschitzMLP
from .masked_mlp import MaskedMLP
from .mlp import MLP
from .velocity import VelocityField

__all__ = [
    "MLP",
    "BlockLinear",
    "ConvolutionalNetwork",
    "GrowingTanh",
    "Hypernetwork",
    "LipschitzMLP",
    "MaskedMLP",
    "VelocityField",
]
