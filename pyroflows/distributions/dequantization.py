"""Discrete data made continuous."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.distributions import constraints

from ..transforms import FlowTransform, Logit
from .flow import NUM_INITIAL_ROWS, Flow
from .learned import LearnedDensity
from .maximum_likelihood import Rows, as_rows, with_context


def dequantize(data: Tensor, num_levels: int = 256, seed: int | None = None) -> Tensor:
    r"""Spread discrete levels evenly over the unit interval: :math:`x = (v + u) / K`.

    With ``u`` uniform on [0, 1), the probability of a level is the integral of a density over its
    cell, of width :math:`1 / K`: :meth:`LearnedDensity.bits_per_dim` bounds its code length [1].

    Parameters
    ----------
    data
        Levels :math:`v` in ``0 .. K - 1``, of any shape and dtype.
    num_levels
        Number of levels ``K``.
    seed
        Determines the noise. Default: the global random state does.

    Returns
    -------
    Tensor
        Numbers in [0, 1), in the dtype of ``data`` if that is a floating one, else in the default
        dtype.

    Raises
    ------
    ValueError
        If ``num_levels`` is below 2, or ``data`` holds anything but levels.

    References
    ----------
    [1] L. Theis, A. van den Oord, M. Bethge. A note on the evaluation of generative models.
        `arXiv:1511.01844 <https://arxiv.org/abs/1511.01844>`_, 2015.

    Examples
    --------
    >>> x = dequantize(torch.tensor([0, 128, 255]), 256, seed=0)
    >>> (256 * x).floor()
    tensor([  0., 128., 255.])
    """
    check_levels(data, num_levels)
    levels = data if data.is_floating_point() else data.to(torch.get_default_dtype())
    generator = None
    if seed is not None:
        generator = torch.Generator(levels.device).manual_seed(seed)
    noise = torch.rand(levels.shape, generator=generator, dtype=levels.dtype, device=levels.device)
    return _spread(levels, noise, num_levels)


def check_levels(data: Tensor, num_levels: int) -> None:
    """Raise ``ValueError`` unless all numbers are integers from 0 to ``num_levels - 1``."""
    if num_levels < 2:
        raise ValueError(f"num_levels must be at least 2, got {num_levels}")
    valid = (data >= 0) & (data <= num_levels - 1)
    if data.is_floating_point():
        valid &= data == data.floor()
    if not bool(valid.all()):
        raise ValueError(
            f"data must hold integers from 0 to {num_levels - 1}, got "
            f"{data[~valid].flatten()[0].item()}"
        )


def level_dtype(num_levels: int) -> torch.dtype:
    """Return the smallest integer dtype that holds so many levels."""
    return torch.uint8 if num_levels <= 256 else torch.int32


def _spread(levels: Tensor, noise: Tensor, num_levels: int) -> Tensor:
    # The sum may round up to the next level; none may reach the upper end of the interval.
    below_next = torch.nextafter(levels + 1, torch.zeros_like(levels))
    return torch.minimum(levels + noise, below_next) / num_levels


class Dequantized(LearnedDensity, dist.TorchDistribution):
    r"""Give discrete levels, such as those of pixels, the probability that a density gives them.

    Noise ``u`` in the unit interval, fresh at each use, makes numbers
    :math:`y = \mathrm{logit}(a + (1 - 2 a)(v + u) / K)` of levels :math:`v` [1, 2]. With
    :math:`r(y | v)` their density,

    .. math:: \log P(v) \ge \mathbb{E}_{r(y | v)} \big[ \log p(y) - \log r(y | v) \big] .

    :meth:`log_prob` gives one draw of what is in brackets, a bound on average; :meth:`fit` takes a
    new one at each step, so that the density cannot learn the noise, and learns in the units of
    the logits. Draws are levels.

    Even noise asks the flow for a density that is flat in each cell. Noise that is learned along
    with it goes where the flow has its mass, and the bound gets tighter [3]:

    .. math:: u = \mathrm{sigmoid}\big( g(\mathrm{logit}(w); v) \big) , \qquad
        w \sim \mathcal{U}(0, 1)^D ,

    which is even where the flow :math:`g` is the identity, as it nearly is at the start.

    Parameters
    ----------
    flow
        The density :math:`p` of the logits, on all real numbers.
    num_levels
        Number of levels ``K``.
    margin
        The number :math:`a`, in [0, 0.5): see :class:`pyroflows.transforms.Logit`.
    noise
        The flow :math:`g`, of the same event shape; its context are the levels in a row, scaled
        to [-1, 1], ``context_dim = D``. A score takes one forward pass of it: it should be fast.
        Default: even noise.

    Raises
    ------
    TypeError
        If ``flow`` is not a :class:`Flow`, or ``noise`` not a ``FlowTransform``.
    ValueError
        If ``num_levels`` is below 2 or ``margin`` out of range, or the noise has another event
        shape than the flow, or a context of another size.

    References
    ----------
    [1] L. Theis, A. van den Oord, M. Bethge. A note on the evaluation of generative models.
        `arXiv:1511.01844 <https://arxiv.org/abs/1511.01844>`_, 2015.
    [2] L. Dinh, J. Sohl-Dickstein, S. Bengio. Density estimation using Real NVP.
        `arXiv:1605.08803 <https://arxiv.org/abs/1605.08803>`_, 2016.
    [3] J. Ho, X. Chen, A. Srinivas, Y. Duan, P. Abbeel. Flow++: Improving flow-based generative
        models with variational dequantization and architecture design.
        `arXiv:1902.00275 <https://arxiv.org/abs/1902.00275>`_, 2019.

    Examples
    --------
    >>> import pyroflows as pf
    >>> flow = pf.Flow(None, pf.flow("glow", (1, 4, 4), num_layers=1, width=8))
    >>> noise = pf.flow("realnvp", (1, 4, 4), context_dim=16, num_layers=2)
    >>> density = Dequantized(flow, num_levels=16, noise=noise)
    >>> levels = torch.randint(0, 16, (100, 1, 4, 4))
    >>> fit = density.fit(levels, num_steps=20, progress=False)
    >>> density.bits_per_dim(levels).shape, density.sample((7,)).shape
    (torch.Size([100]), torch.Size([7, 1, 4, 4]))
    """

    arg_constraints: ClassVar[dict] = {}

    def __init__(
        self,
        flow: Flow,
        num_levels: int = 256,
        margin: float = 0.05,
        noise: FlowTransform | None = None,
        validate_args: bool | None = None,
    ) -> None:
        if not isinstance(flow, Flow):
            raise TypeError(f"flow must be a Flow, got {type(flow).__name__}")
        if num_levels < 2:
            raise ValueError(f"num_levels must be at least 2, got {num_levels}")
        if noise is not None:
            _check_noise(noise, flow.event_shape)
        self.flow = flow
        self.noise = noise
        self.num_levels = num_levels
        self.logit = Logit(flow.event_shape, margin)
        self.module = flow.module
        if noise is not None:
            self.module = nn.ModuleDict({"flow": flow.module, "noise": noise})
        super().__init__(flow.batch_shape, flow.event_shape, validate_args)

    @property
    def support(self) -> constraints.Constraint:
        """Return the levels, for each entry."""
        return constraints.independent(
            constraints.integer_interval(0, self.num_levels - 1), len(self.event_shape)
        )

    @property
    def context_dim(self) -> int:
        """Return the size of the context that is not bound yet, 0 for none."""
        return self.flow.context_dim

    def condition(self, context: Tensor) -> Dequantized:
        """Bind a context of shape ``(*batch, context_dim)``; its batch becomes the batch shape."""
        return self._alike(self.flow.condition(context))

    def temper(self, temperature: float) -> Dequantized:
        """Multiply the scale of the base by a temperature: see :meth:`Flow.temper`."""
        return self._alike(self.flow.temper(temperature))

    def expand(self, batch_shape: Sequence[int], _instance: Any = None) -> Dequantized:
        return self._alike(self.flow.expand(batch_shape))

    def _alike(self, flow: Flow) -> Dequantized:
        return Dequantized(
            flow, self.num_levels, self.logit.margin, self.noise, self._validate_args
        )

    def log_prob(self, value: Tensor) -> Tensor:
        """Return a bound on the log-probability of levels, random: right on average."""
        if self._validate_args and value.numel():
            self._validate_sample(value)
        return self.score(value)

    def score(self, value: Tensor, context: Tensor | None = None) -> Tensor:
        y, log_density = self.logits(value)
        return self.flow.score(y, context) - log_density

    def logits(self, levels: Tensor) -> tuple[Tensor, Tensor]:
        """Draw logits of levels; return them and their log-density given the levels."""
        levels = levels.to(next(self.parameters()).dtype)
        noise, log_density = self._draw_noise(levels)
        y, log_det = self.logit.forward_and_log_det(_spread(levels, noise, self.num_levels))
        cells = self.event_shape.numel() * math.log(self.num_levels)
        return y, log_density + cells - log_det

    def _draw_noise(self, levels: Tensor) -> tuple[Tensor, Tensor]:
        """Draw noise in the unit interval, and its log-density given the levels."""
        # Zero, which is drawn now and then, has no logit.
        even = torch.rand_like(levels).clamp_min(torch.finfo(levels.dtype).eps)
        if self.noise is None:
            return even, levels.new_zeros(())
        unit = Logit(self.event_shape, margin=0.0)
        context = (2 * levels / (self.num_levels - 1) - 1).flatten(-len(self.event_shape))
        start, log_slope = unit.forward_and_log_det(even)
        end, log_det = self.noise.forward_and_log_det(start, context)
        noise, log_squash = unit.inverse_and_log_det(end)
        return noise, -(log_slope + log_det + log_squash)

    @torch.no_grad()
    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Draw levels, in the dtype of the flow."""
        x, _ = self.logit.inverse_and_log_det(self.flow.sample(torch.Size(sample_shape)))
        return (self.num_levels * x).floor().clamp(0, self.num_levels - 1)

    def bits_per_dim(
        self,
        data: Tensor,
        num_levels: int | None = None,
        context: Tensor | None = None,
        num_draws: int = 1,
    ) -> Tensor:
        r"""Return the bits that levels take per entry, :math:`-\frac1D \log_2 P(v)`, or more.

        Parameters
        ----------
        data
            Levels, shape ``(*batch, *event_shape)``.
        num_levels
            That of this density; it need not be given.
        context
            What to condition on, shape ``(*batch, context_dim)``.
        num_draws
            Number of draws of the noise. With more of them the bound is tighter and varies less:
            their mean density, not log-density, bounds the probability [1].

        Returns
        -------
        Tensor
            Shape ``(*batch,)``.

        Raises
        ------
        ValueError
            If ``data`` holds anything but levels.

        References
        ----------
        [1] Y. Burda, R. Grosse, R. Salakhutdinov. Importance weighted autoencoders.
            `arXiv:1509.00519 <https://arxiv.org/abs/1509.00519>`_, 2015.
        """
        if num_levels not in (None, self.num_levels):
            raise ValueError(f"num_levels must be {self.num_levels} or None, got {num_levels}")
        check_levels(data, self.num_levels)
        scores = torch.stack([self.score(data, context) for _ in range(num_draws)])
        nats = math.log(num_draws) - scores.logsumexp(0)
        return nats / (self.event_shape.numel() * math.log(2))

    def rows(
        self, data: Tensor | np.ndarray, context: Tensor | np.ndarray | None, like: Tensor
    ) -> Rows:
        # Rows stay as small as they came: only a batch becomes numbers of the flow's dtype.
        kind = level_dtype(self.num_levels)
        levels = as_rows("data", data, self.event_shape, like.new_empty(0, dtype=kind))
        check_levels(torch.as_tensor(data), self.num_levels)
        return with_context(levels, context, self.context_dim, like)

    @torch.no_grad()
    def prepare(self, data: Tensor, context: Tensor | None, standardize: bool) -> None:
        y, _ = self.logits(data[:NUM_INITIAL_ROWS])
        self.flow.prepare(y, None if context is None else context[:NUM_INITIAL_ROWS], standardize)


def _check_noise(noise: FlowTransform, event_shape: torch.Size) -> None:
    if not isinstance(noise, FlowTransform):
        raise TypeError(f"noise must be a FlowTransform or None, got {type(noise).__name__}")
    if noise.event_shape != event_shape:
        raise ValueError(
            f"noise must have the event shape of the flow, {tuple(event_shape)}, got "
            f"{tuple(noise.event_shape)}"
        )
    if noise.context_dim != event_shape.numel():
        raise ValueError(
            f"noise must have a context of as many entries as the levels, {event_shape.numel()}, "
            f"got context_dim={noise.context_dim}"
        )
