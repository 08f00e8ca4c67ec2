"""The flow of all latent variables of a plate, those shared by its data first."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..transforms import Compose, FlowTransform

MAX_ROWS = 200_000  # that the conditional flow maps at once

Direction = Callable[..., tuple[Tensor, Tensor]]


class PlateTransform(FlowTransform):
    r"""Map noise to the latent variables that data share and to those that each has of its own.

    .. math:: \theta = g(u_0) , \qquad z_i = f(u_i; c_i, \theta) , \qquad i = 1 \dots N

    The Jacobian is block triangular, so that log-determinants add. Vectors hold :math:`\theta`
    first, then the variables of each site, for all data in turn.

    Parameters
    ----------
    shared
        The flow ``g``, which ends with the affine map that sets the units of its variables; in
        these :math:`f` reads them. ``None`` where data share nothing.
    local
        The conditional flow ``f``.
    embedding
        What is known of each datum, shape ``(N, E)``.
    sizes
        Numbers of variables of a datum, site by site.
    """

    def __init__(
        self,
        shared: Compose | None,
        local: FlowTransform,
        embedding: Tensor,
        sizes: Sequence[int],
    ) -> None:
        global_dim = 0 if shared is None else shared.event_shape[0]
        super().__init__(global_dim + len(embedding) * sum(sizes))
        self._global_dim = global_dim
        self.shared = shared
        self.local = local
        self.embedding = embedding
        self._sizes = list(sizes)

    def forward_and_log_det(  # type: ignore[override]  # there is no context to give
        self, x: Tensor
    ) -> tuple[Tensor, Tensor]:
        shared, rows = self._split(x)
        log_det = x.new_zeros(x.shape[:-1])
        if self.shared is not None:
            shared, log_det = self.shared.forward_and_log_det(shared)
        rows, local_log_det = self._along_plate(self.local.forward_and_log_det, rows, shared)
        return self._join(shared, rows), log_det + local_log_det

    def inverse_and_log_det(  # type: ignore[override]
        self, y: Tensor
    ) -> tuple[Tensor, Tensor]:
        shared, rows = self._split(y)
        rows, local_log_det = self._along_plate(self.local.inverse_and_log_det, rows, shared)
        if self.shared is None:
            return self._join(shared, rows), local_log_det
        noise, log_det = self.shared.inverse_and_log_det(shared)
        return self._join(noise, rows), log_det + local_log_det

    def _along_plate(
        self, direction: Direction, rows: Tensor, shared: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Map the rows ``(*batch, N, D)`` of all data, some at a time."""
        units = self._in_units(shared).unsqueeze(-2)
        step = max(1, MAX_ROWS // max(1, rows.shape[:-2].numel()))
        mapped, log_dets = [], []
        for part, embedding in zip(rows.split(step, -2), self.embedding.split(step)):
            context = torch.cat(
                [v.expand(*part.shape[:-1], -1) for v in (embedding, units)], dim=-1
            )
            y, log_det = direction(part, context)
            mapped.append(y)
            log_dets.append(log_det.sum(-1))
        return torch.cat(mapped, -2), torch.stack(log_dets).sum(0)

    def _in_units(self, shared: Tensor) -> Tensor:
        if self.shared is None:
            return shared
        return self.shared[-1].inverse_and_log_det(shared)[0]

    def _split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        number = len(self.embedding)
        shared, *sites = x.split([self._global_dim, *(number * size for size in self._sizes)], -1)
        rows = [
            site.unflatten(-1, (number, size))
            for site, size in zip(sites, self._sizes, strict=True)
        ]
        return shared, torch.cat(rows, -1)

    def _join(self, shared: Tensor, rows: Tensor) -> Tensor:
        return torch.cat([shared, *(part.flatten(-2) for part in rows.split(self._sizes, -1))], -1)
