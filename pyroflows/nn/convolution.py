"""Convolutional networks that turn images and a context into the parameters of a flow."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .mlp import OUTPUT_INIT_SCALE, activate


class ConvolutionalNetwork(nn.Module):
    r"""Map images to images through weight-normalised residual convolutions.

    .. math:: h_0 = W_0 * x + V c, \qquad h_l = h_{l-1} + W_l * s(h_{l-1}), \qquad
        y = W * s(h_L)

    Weights of all but the last convolution are normalised: :math:`W = g\, v / \|v\|`, a scale and
    a direction for each channel that comes out [1].

    Parameters
    ----------
    in_channels
        Number of channels of the input.
    out_channels
        Number of channels of the output. Outputs start near zero.
    width
        Number of channels inside.
    num_blocks
        Number of residual convolutions ``L``.
    kernel_size
        Size of the kernels of the residual convolutions, odd. The first and the last convolution
        see 3 x 3 pixels.
    context_dim
        Size of the context ``c``, 0 for none.
    activation
        A class of activation modules.

    Raises
    ------
    ValueError
        If a number is below 1, ``num_blocks`` below 0, or ``kernel_size`` even.

    References
    ----------
    [1] T. Salimans, D. P. Kingma. Weight normalization: A simple reparameterization to accelerate
        training of deep neural networks. `arXiv:1602.07868 <https://arxiv.org/abs/1602.07868>`_,
        2016.

    Examples
    --------
    >>> network = ConvolutionalNetwork(3, 6, width=8, context_dim=2)
    >>> network(torch.randn(5, 3, 4, 4), torch.randn(5, 2)).shape
    torch.Size([5, 6, 4, 4])
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        width: int = 64,
        num_blocks: int = 1,
        kernel_size: int = 1,
        context_dim: int = 0,
        activation: type[nn.Module] = nn.ReLU,
    ) -> None:
        super().__init__()
        if width < 1 or num_blocks < 0:
            raise ValueError(
                f"width must be at least 1 and num_blocks at least 0, got {width} and {num_blocks}"
            )
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be odd and positive, got {kernel_size}")
        self.input = _WeightNormalized(in_channels, width, 3)
        self.context = nn.Linear(context_dim, width, bias=False) if context_dim else None
        self.blocks = nn.ModuleList(
            _WeightNormalized(width, width, kernel_size) for _ in range(num_blocks)
        )
        self.output = nn.Conv2d(width, out_channels, 3, padding=1)
        self.activation = activation()
        with torch.no_grad():
            for parameter in self.output.parameters():
                parameter.mul_(OUTPUT_INIT_SCALE)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """Return images ``(N, out_channels, H, W)``, given ``(N, in_channels, H, W)``.

        The context has shape ``(N, context_dim)``.
        """
        # On a CPU convolutions are faster where the channels of a pixel lie side by side.
        hidden = self.input(x.contiguous(memory_format=torch.channels_last))
        if self.context is not None:
            hidden = hidden + self.context(context)[..., None, None]
        for block in self.blocks:
            # In place: what a convolution returns is nobody else's, nor needed for its gradient.
            hidden = block(self.activation(hidden)).add_(hidden)
        return self.output(activate(self.activation, hidden))


class _WeightNormalized(nn.Module):
    """Convolve with kernels that are a direction and a scale each; the size of images stays."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int) -> None:
        super().__init__()
        usual = nn.Conv2d(in_channels, out_channels, kernel_size)
        self.direction = usual.weight
        self.scale = nn.Parameter(_norms(usual.weight.detach()))
        self.bias = usual.bias

    def forward(self, x: Tensor) -> Tensor:
        weight = self.direction * (self.scale / _norms(self.direction))
        return F.conv2d(x, weight, self.bias, padding=weight.shape[-1] // 2)


def _norms(kernels: Tensor) -> Tensor:
    return torch.linalg.vector_norm(kernels, dim=(1, 2, 3), keepdim=True)
