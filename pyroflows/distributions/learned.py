"""What distributions that are learned from data have in common."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor, nn

from ..random_state import preserved
from .export import density_to_arviz
from .maximum_likelihood import (
    DensityFit,
    Penalty,
    Rows,
    Settings,
    check_rows,
    maximize_likelihood,
    split,
)

NUM_STEPS = 5000
BATCH_SIZE = 512
LEARNING_RATE = 2e-3


class LearnedDensity:
    """Give a distribution the manners of the module it holds, and fit it to data.

    Attributes
    ----------
    module
        All that is learned.

    Examples
    --------
    >>> import pyroflows as pf
    >>> flow, other = (pf.Flow(None, pf.flow("realnvp", 2, num_layers=2)) for _ in range(2))
    >>> fit = flow.fit(torch.randn(500, 2), num_steps=20, progress=False)
    >>> other.eval().load_state_dict(flow.state_dict())
    <All keys matched successfully>
    >>> bool(other.log_prob(torch.zeros(2)) == flow.log_prob(torch.zeros(2)))
    True
    """

    module: nn.Module
    batch_shape: torch.Size
    event_shape: torch.Size

    @property
    def context_dim(self) -> int:
        """Return the size of the context that is not bound yet, 0 for none."""
        raise NotImplementedError

    def score(self, value: Tensor, context: Tensor | None = None) -> Tensor:
        """Return the log-density of values, each given its context, without checks or memory."""
        raise NotImplementedError

    def rows(
        self, data: Tensor | np.ndarray, context: Tensor | np.ndarray | None, like: Tensor
    ) -> Rows:
        """Return data and their contexts to learn from, checked, on the device of ``like``."""
        return check_rows(data, context, self.event_shape, self.context_dim, like)

    def prepare(self, data: Tensor, context: Tensor | None, standardize: bool) -> None:
        """Take units from rows of data, once, and initial weights for layers that wait for data."""
        raise NotImplementedError

    def parameters(self) -> Iterator[nn.Parameter]:
        """Yield all that is learned."""
        return self.module.parameters()

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield all that is learned, with names."""
        return self.module.named_parameters()

    def state_dict(self) -> dict[str, Any]:
        """Return parameters and buffers by name."""
        return self.module.state_dict()

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True) -> Any:
        """Take parameters and buffers from a state; that of a fitted density fits a fresh one."""
        return self.module.load_state_dict(state_dict, strict)

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """Move to a dtype or device, in place, as modules do."""
        self.module.to(*args, **kwargs)
        return self

    def train(self, mode: bool = True) -> Self:
        """Set layers to how they work in training."""
        self.module.train(mode)
        return self

    def eval(self) -> Self:
        """Set layers to how they work in use."""
        return self.train(False)

    def fit(
        self,
        data: Tensor | np.ndarray,
        context: Tensor | np.ndarray | None = None,
        *,
        num_steps: int = NUM_STEPS,
        batch_size: int = BATCH_SIZE,
        learning_rate: float = LEARNING_RATE,
        weight_decay: float = 0.0,
        validation_fraction: float = 0.1,
        patience: int | None = None,
        standardize: bool = True,
        penalty: Penalty | None = None,
        seed: int = 0,
        progress: bool = True,
        checkpoint: str | Path | None = None,
    ) -> DensityFit:
        r"""Fit to data by maximum likelihood, in place.

        Minimises :math:`-\frac1N \sum_n \log p(x_n)`, or :math:`\log p(x_n | c_n)` with a context,
        by AdamW on minibatches. The learning rate warms up and decays by a cosine; gradients are
        clipped relative to their usual norm; weights are averaged over the last steps. Rows held
        out for validation say which averaged weights were best, and those are kept. Where a
        number is not finite, training goes back to the last validation and halves the learning
        rate, with a warning. An interrupt (Ctrl-C) keeps the best so far, with a warning.

        The density ends in eval mode. Fitting it again goes on from where it is. What was derived
        from it before its first fit, by a context or a temperature, has no units of the data.

        Parameters
        ----------
        data
            Rows, shape ``(N, *event_shape)``; they take the density's dtype and device.
        context
            What each row is conditioned on, shape ``(N, context_dim)``. Only for densities with a
            context.
        num_steps
            Largest number of steps; the learning rate decays over them.
        batch_size
            Rows per step, ``N`` at most.
        learning_rate
            Peak learning rate of AdamW.
        weight_decay
            Weight decay of AdamW.
        validation_fraction
            Share of the rows held out, in [0, 1). With 0, the last weights are kept.
        patience
            Number of steps without a better validation loss after which training stops. Default:
            a fifth of ``num_steps``, and never without validation.
        standardize
            Whether the flow learns in units of the mean and the standard deviation of each entry
            of the data and the context. They become part of it, at its first fit; flows of angles
            have their own units.
        penalty
            A function of the rows and the contexts (or ``None``) of a step that returns a number
            to add to its loss, for instance a regularisation of the flow.
        seed
            Makes the result reproducible, given the initial weights; the global random state is
            left alone.
        progress
            Whether to show a progress bar.
        checkpoint
            A file to write the state of the training to, every half a minute and at the end. If it
            exists, training goes on from it, with the same result as without a pause.

        Returns
        -------
        DensityFit
            Losses and when the best weights were found.

        Raises
        ------
        TypeError
            If ``data`` or ``context`` is not an array, or a number is of the wrong type.
        ValueError
            If they have the wrong shape, numbers that are not finite, constant entries, or too few
            rows; if a context is missing or unexpected; if a number is out of range; if the
            checkpoint belongs to another training.
        FloatingPointError
            If losses keep being not finite.

        Examples
        --------
        >>> import pyroflows as pf
        >>> data = 5.0 + 2.0 * torch.randn(1000, 2)
        >>> flow = pf.Flow(None, pf.flow("realnvp", 2, num_layers=2))
        >>> fit = flow.fit(data, num_steps=200, progress=False)
        >>> [round(mean) for mean in flow.sample((1000,)).mean(0).tolist()]
        [5, 5]
        """
        if self.batch_shape:
            raise ValueError(
                f"a density of batch shape {tuple(self.batch_shape)} cannot be fitted: fit it "
                "before expanding it or binding a context"
            )
        settings = Settings(
            num_steps,
            batch_size,
            learning_rate,
            weight_decay,
            validation_fraction,
            patience,
            standardize,
            seed,
        )
        like = next((p for p in self.parameters() if p.requires_grad), None)
        if like is None:
            raise ValueError("the density has no parameters to learn")
        rows = self.rows(data, context, like)
        training, validation = split(rows, validation_fraction, seed)
        with preserved(), torch.enable_grad():
            return maximize_likelihood(
                self,
                training,
                validation,
                settings,
                penalty,
                progress,
                checkpoint,
                lambda: self.prepare(training.data, training.context, standardize),
            )

    def to_arviz(
        self, data: Tensor | np.ndarray, context: Tensor | np.ndarray | None = None, **options: Any
    ) -> Any:
        """Return data, and data sets drawn from the density, as ArviZ data.

        See :func:`pyroflows.distributions.export.density_to_arviz` for the options.
        """
        return density_to_arviz(self, data, context, **options)  # type: ignore[arg-type]

    def bits_per_dim(
        self, data: Tensor, num_levels: int = 256, context: Tensor | None = None
    ) -> Tensor:
        r"""Return the bits that discrete data take per entry, when coded by this density.

        For ``K`` levels, made continuous by :func:`dequantize` as :math:`x = (v + u) / K` in
        [0, 1), a level is a cell of width :math:`1 / K`, and

        .. math:: \mathrm{bits}(x) = \frac{-\log p(x) + D \log K}{D \log 2} ,

        whose mean over ``u`` bounds the code length :math:`-\frac1D \log_2 P(v)` from above.

        Parameters
        ----------
        data
            Numbers in [0, 1), shape ``(*batch, *event_shape)``: the space of this density.
        num_levels
            Number of levels ``K``.
        context
            What to condition on, shape ``(*batch, context_dim)``.

        Returns
        -------
        Tensor
            Shape ``(*batch,)``.

        Raises
        ------
        ValueError
            If ``num_levels`` is below 2 or ``data`` leaves [0, 1).

        Examples
        --------
        >>> from pyroflows.distributions import Flow, UniformBox
        >>> from pyroflows.transforms import Permutation
        >>> flow = Flow(UniformBox(torch.zeros(2), torch.ones(2)), Permutation([1, 0]))
        >>> flow.bits_per_dim(torch.rand(3, 2), num_levels=256)
        tensor([8., 8., 8.])
        """
        if num_levels < 2:
            raise ValueError(f"num_levels must be at least 2, got {num_levels}")
        if not bool(((data >= 0) & (data < 1)).all()):
            raise ValueError(
                "data must lie in [0, 1), as from dequantize, got values from "
                f"{data.min().item()} to {data.max().item()}"
            )
        nats_per_dim = -self.score(data, context) / self.event_shape.numel()
        return (nats_per_dim + math.log(num_levels)) / math.log(2)
