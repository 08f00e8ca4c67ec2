"""What is learned of each parameter alone, before all of them together."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from ...distributions.maximum_likelihood import Rows, Settings, maximize_likelihood, split
from ...nn.entrywise import EntrywiseNetwork
from .matching import frozen_noise, squared_error, standard_rate

MIN_ROWS = 100  # fewer say too little
SMALLEST_SCALE = 1e-6  # predictions that vary less than this do not vary
SETTINGS = Settings(
    num_steps=1,
    batch_size=1024,
    learning_rate=1e-2,
    weight_decay=1e-2,
    validation_fraction=0.1,
    patience=None,
    standardize=False,
    seed=0,
)


class Marginals(nn.Module):
    r"""Carry noise to each entry of ``w`` by a field of its own, given what regression predicts.

    .. math:: v_i(t, w, m) = \frac{2 t - 1}{t^2 + (1 - t)^2} w_i + f_i(t, w_i, m_i) ,

    with :math:`m` the linear prediction in the units of ``w``. The first term is the exact field of
    a standard normal ``w``; :math:`f_i` are functions of three numbers, which are learned from few
    simulations, and far better than by a network that sees all entries. That is left with what is
    not marginal: dependence, and what no linear prediction tells.

    Parameters
    ----------
    dim
        Number of entries ``D``.

    Examples
    --------
    >>> prediction = torch.randn(1000, 2)
    >>> w = torch.randn(1000, 2) * prediction.sigmoid()
    >>> marginals = Marginals(2)
    >>> marginals.fit(w, prediction, num_steps=100)
    >>> marginals.velocity(torch.tensor(0.5), w, prediction).shape
    torch.Size([1000, 2])
    """

    loc: Tensor
    scale: Tensor

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.register_buffer("loc", torch.zeros(dim))
        self.register_buffer("scale", torch.ones(dim))
        self.network = EntrywiseNetwork(dim).requires_grad_(False)

    @property
    def module(self) -> Marginals:
        """Return what the training loop changes."""
        return self

    def velocity(self, time: Tensor, w: Tensor, prediction: Tensor) -> Tensor:
        """Return the velocity of ``w``; time and prediction broadcast to its batch."""
        standard = (prediction - self.loc) / self.scale
        return standard_rate(time).unsqueeze(-1) * w + self.network(w, time, standard)

    def divergence(self, time: Tensor, w: Tensor, prediction: Tensor) -> Tensor:
        """Return the trace of the Jacobian of the velocity in ``w``, ``(*batch,)``."""
        standard = (prediction - self.loc) / self.scale
        return w.shape[-1] * standard_rate(time) + self.network.divergence(w, time, standard)

    def score(self, w: Tensor, prediction: Tensor) -> Tensor:
        """Return minus the squared error of the velocity at random times, one number a row."""

        def error(time: Tensor, noise: Tensor) -> Tensor:
            return squared_error(lambda t, w: self.velocity(t, w, prediction), w, time, noise)

        if self.training:
            return -error(torch.rand_like(w[:, 0]), torch.randn_like(w))
        return -torch.stack([error(*noise) for noise in frozen_noise(w)]).mean(0)

    def fit(
        self, w: Tensor, prediction: Tensor, num_steps: int, seed: int = 0, progress: bool = False
    ) -> None:
        """Learn from rows ``(N, D)``; what does no better than a normal ``w`` on a tenth is undone.

        Raises
        ------
        KeyboardInterrupt
            If training is interrupted.
        """
        if len(w) < MIN_ROWS:
            return
        self.loc.copy_(prediction.mean(0))
        self.scale.copy_(prediction.std(0).clamp(min=SMALLEST_SCALE))
        settings = replace(SETTINGS, num_steps=num_steps, seed=seed)
        training, validation = split(Rows(w, prediction), settings.validation_fraction, seed)
        normal = self._loss(validation)
        self.network.requires_grad_(True)
        fit = maximize_likelihood(self, training, validation, settings, None, progress, None)
        self.network.requires_grad_(False)
        if fit.interrupted:
            raise KeyboardInterrupt
        if not fit.best_validation_loss < normal:
            self.network.clear()

    @torch.no_grad()
    def _loss(self, rows: Rows) -> float:
        self.eval()
        assert rows.context is not None
        return -self.score(rows.data, rows.context).mean().item()
