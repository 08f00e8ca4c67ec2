"""Linear maps known by factors whose determinants and inverses cost nothing to find."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...nn import Hypernetwork
from ...nn.linalg import identity_like, solve_unit_triangular
from ..base import FlowTransform


class FactorizedLinear(FlowTransform):
    r"""Map the vector by :math:`y = A \, \mathrm{diag}(s) \, U x + t`.

    ``U`` is unit upper triangular, ``s`` positive, and ``A`` a factor with :math:`|\det A| = 1`
    that children define: its matrix, and how to solve it. :math:`\log|\det J| = \sum_d \log s_d`.
    With a context, ``t`` and ``s`` depend on it.
    """

    factors: Tensor

    def __init__(
        self,
        input_dim: int,
        context_dim: int,
        hidden_dims: Sequence[int],
        activation: type[nn.Module],
    ) -> None:
        super().__init__(input_dim, context_dim)
        factors = torch.zeros(input_dim, input_dim)
        if input_dim > 1:
            self.factors = nn.Parameter(factors)  # U above the diagonal; the rest is the children's
        else:
            self.register_buffer("factors", factors)  # one entry: nothing off the diagonal
        self.shift_and_log_scale = Hypernetwork(
            torch.zeros(2 * input_dim), context_dim, hidden_dims, activation
        )

    def matrix_of_left_factor(self) -> Tensor:
        """Return the matrix :math:`A`, shape ``(D, D)``."""
        raise NotImplementedError

    def solve_left_factor(self, y: Tensor) -> Tensor:
        """Return :math:`A^{-1} y` for each vector of ``y``, shape ``(*batch, D)``."""
        raise NotImplementedError

    def forward_and_log_det(
        self, x: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        shift, log_scale = self.shift_and_log_scale(context).chunk(2, -1)
        upper, left = self._upper_factor(), self.matrix_of_left_factor()
        if context is None:  # scales the matrix: it is the same for all vectors, and smaller
            y = F.linear(F.linear(x, log_scale.exp().unsqueeze(-1) * upper), left, shift)
        else:
            y = F.linear(F.linear(x, upper) * log_scale.exp(), left) + shift
        return y, log_scale.sum(-1).expand(x.shape[:-1])

    def inverse_and_log_det(
        self, y: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        shift, log_scale = self.shift_and_log_scale(context).chunk(2, -1)
        scaled = self.solve_left_factor(y - shift) * (-log_scale).exp()
        x = solve_unit_triangular(self.factors, scaled, upper=True)
        return x, -log_scale.sum(-1).expand(y.shape[:-1])

    def _upper_factor(self) -> Tensor:
        return self.factors.triu(1) + identity_like(self.factors)
