"""Networks used inside flows."""

from .hypernetwork import Hypernetwork
from .masked_mlp import MaskedMLP
from .mlp import MLP

__all__ = ["MLP", "Hypernetwork", "MaskedMLP"]
