"""Networks used inside flows."""

from .masked_mlp import MaskedMLP
from .mlp import MLP

__all__ = ["MLP", "MaskedMLP"]
