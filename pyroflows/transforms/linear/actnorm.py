"""ActNorm: an affine map of each entry that starts from the statistics of data."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from ..base import FlowTransform


class ActNorm(FlowTransform):
    r"""Shift and scale each entry so that data arrive standardised.

    .. math:: y = (x + t) e^s, \qquad \log|\det J| = \textstyle\sum_d s_d .

    ``t`` and ``s`` are learned, and start from the mean and the standard deviation of data [1].
    That start is an explicit call, :meth:`initialize` or, for a flow that holds such layers,
    :func:`initialize_from_data`, because a first batch may be a single draw. Costs ``O(D)``.

    Parameters
    ----------
    event_shape
        Shape of one event; an integer ``D`` stands for ``(D,)``. The first of several dimensions
        are the channels, as in ``(C, H, W)``: there is one shift and one scale per channel.
    initialized
        Whether to start as the identity, without data.

    References
    ----------
    [1] D. P. Kingma, P. Dhariwal. Glow: Generative flow with invertible 1x1 convolutions.
        `arXiv:1807.03039 <https://arxiv.org/abs/1807.03039>`_, 2018.

    Examples
    --------
    >>> flow = ActNorm(2)
    >>> flow.initialize(torch.tensor([[0.0, 1.0], [4.0, 2.0], [2.0, 3.0]]))
    >>> flow(torch.tensor([2.0, 4.0])).detach()
    tensor([0., 2.])
    """

    def __init__(self, event_shape: int | Iterable[int], initialized: bool = False) -> None:
        super().__init__(event_shape)
        shape = (self.event_shape[0], *(1 for _ in self.event_shape[1:]))
        self.shift = nn.Parameter(torch.zeros(shape))
        self.log_scale = nn.Parameter(torch.zeros(shape))
        self.initialized = initialized
        self._awaits_data = False

    @torch.no_grad()
    def initialize(self, x: Tensor, inverse: bool = False) -> None:
        """Set shift and scale so that these data map to mean 0 and standard deviation 1.

        Parameters
        ----------
        x
            Data, ``(*batch, *event_shape)``.
        inverse
            Whether the data are to be standardised by the inverse map, as where a density is
            learned: see :class:`pyroflows.Flow`.

        Raises
        ------
        ValueError
            If there are fewer than two values per channel, or a channel is constant or not finite.
        """
        std, mean = _statistics(x, self.event_shape)
        self.shift.copy_((mean / std if inverse else -mean).view_as(self.shift))
        self.log_scale.copy_((std if inverse else 1 / std).log().view_as(self.log_scale))
        self.initialized = True

    def forward_and_log_det(self, x: Tensor) -> tuple[Tensor, Tensor]:
        self._prepare(x, inverse=False)
        return (x + self.shift) * self.log_scale.exp(), self._log_det(x)

    def inverse_and_log_det(self, y: Tensor) -> tuple[Tensor, Tensor]:
        self._prepare(y, inverse=True)
        return y * (-self.log_scale).exp() - self.shift, -self._log_det(y)

    def get_extra_state(self) -> Tensor:
        """Return whether the layer is initialised, for ``state_dict``."""
        # No buffer: on an accelerator each look at it would wait for the device.
        return torch.tensor(self.initialized, dtype=torch.uint8, device="cpu")

    def set_extra_state(self, state: Tensor) -> None:
        """Restore whether the layer is initialised, from ``load_state_dict``."""
        self.initialized = bool(state)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, initialized={self.initialized}"

    def _log_det(self, x: Tensor) -> Tensor:
        positions = math.prod(self.event_shape[1:])
        batch_shape = x.shape[: x.dim() - len(self.event_shape)]
        return (positions * self.log_scale.sum()).expand(batch_shape)

    def _prepare(self, x: Tensor, inverse: bool) -> None:
        """Initialise the layer if it awaits these data; refuse to work uninitialised."""
        if self._awaits_data:
            self.initialize(x, inverse)
            self._awaits_data = False
        if not self.initialized:
            raise RuntimeError(
                "ActNorm is used before its initialisation: call initialize(x) with a batch of "
                "data, initialize_from_data(flow, x) for a whole flow, or build it with "
                "initialized=True to start as the identity"
            )


@torch.no_grad()
def initialize_from_data(
    flow: FlowTransform, x: Tensor, context: Tensor | None = None, inverse: bool = False
) -> None:
    """Initialise every :class:`ActNorm` of a flow from data as they arrive there.

    Sends the data once through the flow.

    Parameters
    ----------
    flow
        Any flow, composed or not.
    x
        Data, ``(*batch, *event_shape)``.
    context
        The context of the data, for a conditional flow.
    inverse
        The direction the data take: ``True`` where a density is learned, since data then go through
        the inverse of the flow.

    Raises
    ------
    ValueError
        If the flow holds no ActNorm, or data arrive that have fewer than two values per channel, or
        a channel that is constant or not finite.

    Examples
    --------
    >>> from pyroflows.transforms import Compose, Permutation
    >>> flow = Compose([ActNorm(2), Permutation([1, 0])])
    >>> x = torch.tensor([[0.0, 1.0], [4.0, 2.0], [2.0, 3.0]])
    >>> initialize_from_data(flow, x, inverse=True)
    >>> flow.inv(x).detach()
    tensor([[-1., -1.],
            [ 0.,  1.],
            [ 1.,  0.]])
    """
    layers = [module for module in flow.modules() if isinstance(module, ActNorm)]
    if not layers:
        raise ValueError(f"flow must hold an ActNorm, got {type(flow).__name__} without any")
    for layer in layers:
        layer._awaits_data = True
    try:
        (flow.inverse_and_log_det if inverse else flow.forward_and_log_det)(x, context)
    finally:
        for layer in layers:
            layer._awaits_data = False


def _statistics(x: Tensor, event_shape: torch.Size) -> tuple[Tensor, Tensor]:
    """Return the standard deviation and the mean of each channel."""
    event_dim = len(event_shape)
    if x.shape[x.dim() - event_dim :] != event_shape:
        raise ValueError(
            f"ActNorm expects data of trailing shape {tuple(event_shape)}, got data of shape "
            f"{tuple(x.shape)}"
        )
    positions = math.prod(event_shape[1:])
    values = x.reshape(-1, event_shape[0], positions).transpose(0, 1).flatten(1)
    if values.shape[1] < 2:
        raise ValueError(
            f"ActNorm needs at least two values per channel, got data of shape {tuple(x.shape)}"
        )
    infinite = (~values.isfinite().all(1)).nonzero().flatten().tolist()
    if infinite:
        raise ValueError(f"data must be finite, got NaN or infinity in channels {infinite}")
    std, mean = torch.std_mean(values, dim=1)
    constant = ((values.amin(1) == values.amax(1)) | ~(std > 0)).nonzero().flatten().tolist()
    if constant:
        raise ValueError(f"data must vary, got constant values in channels {constant}")
    return std, mean
