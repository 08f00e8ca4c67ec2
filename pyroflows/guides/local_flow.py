"""The networks that give each datum the distribution of its own latent variables."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .. import flows
from ..nn.residual_mlp import ResidualMLP
from ..transforms import Affine, Compose, DiagonalAffine, Elementwise, FlowTransform
from .auto_flow import check_flow_support

ENCODER_WIDTH = 64


class LocalFlow(nn.Module):
    """Hold an encoder of data and a flow that is conditioned on what it returns.

    It is built once the sizes of data and latent variables are known.

    Parameters
    ----------
    flow, options, encoder, embedding_dim, init_scale
        As in :class:`AmortizedFlow`.

    Raises
    ------
    TypeError, ValueError
        If one of them is not what it should be.
    """

    feature_loc: Tensor
    feature_scale: Tensor

    def __init__(
        self,
        flow: str | Callable[[int, int], FlowTransform],
        options: Mapping[str, Any],
        encoder: nn.Module | None,
        embedding_dim: int,
        init_scale: float,
    ) -> None:
        super().__init__()
        if isinstance(flow, str):
            check_flow_support(flow)
        elif not callable(flow):
            raise TypeError(f"flow must be a name or a callable, got {type(flow).__name__}")
        if encoder is not None and not isinstance(encoder, nn.Module):
            raise TypeError(f"encoder must be a torch module, got {type(encoder).__name__}")
        if embedding_dim < 1:
            raise ValueError(f"embedding_dim must be at least 1, got {embedding_dim}")
        self.encoder: Any = encoder
        self.transform: Any = None
        self.global_dim = 0
        self._flow = flow
        self._options = dict(options)
        self._embedding_dim = embedding_dim
        self._init_scale = init_scale

    def build(
        self, loc: Tensor, feature_loc: Tensor, feature_scale: Tensor, global_dim: int
    ) -> None:
        """Make the networks, for features and ``global_dim`` variables shared by all data.

        The flow starts at a location, shape ``(D,)``, for all data alike.
        """
        dim = loc.shape[0]
        self.global_dim = global_dim
        self.register_buffer("feature_loc", feature_loc)
        self.register_buffer("feature_scale", feature_scale)
        if self.encoder is None:
            self.encoder = ResidualMLP(len(feature_loc), self._embedding_dim, ENCODER_WIDTH)
        self.encoder.to(loc)
        with torch.no_grad():
            context_dim = self.encode(feature_loc.unsqueeze(0)).shape[-1] + global_dim
        if isinstance(self._flow, str):
            inner = flows.flow(self._flow, dim, context_dim, **self._options)
        else:
            inner = self._flow(dim, context_dim)
        # The posteriors of the data lie apart, by far more than one of them is wide: they are
        # shifted in units of one, whatever their initial scale.
        narrow = DiagonalAffine(torch.zeros_like(loc), torch.full_like(loc, self._init_scale))
        shift = Elementwise(Affine(), dim, context_dim, activation=nn.SiLU)
        parts = [inner, narrow, shift, DiagonalAffine(loc, torch.ones_like(loc))]
        self.transform = Compose(part.to(loc) for part in parts)

    def encode(self, features: Tensor) -> Tensor:
        """Return encodings ``(B, E)`` of features ``(B, F)``."""
        if features.shape[-1:] != self.feature_loc.shape:
            raise ValueError(
                f"the encoder reads {len(self.feature_loc)} features of each datum, got "
                f"{features.shape[-1]}"
            )
        return self.encoder((features.to(self.feature_loc) - self.feature_loc) / self.feature_scale)
