"""Networks used inside flows."""

from .block_linear import BlockLinear
from .hypernetwork import Hypernetwork
from .lipschitz import LipschitzMLP
from .masked_mlp import MaskedMLP
from .mlp import MLP
from .velocity import VelocityField

__all__ = ["MLP", "BlockLinear", "Hypernetwork", "LipschitzMLP", "MaskedMLP", "VelocityField"]
