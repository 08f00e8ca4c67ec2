"""Parameters of a flow that are learned, or depend on a context."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from .mlp import MLP, check_hidden_dims


class Hypernetwork(nn.Module):
    r"""Give the parameters of a flow: :math:`\theta(c) = \theta_0 + \mathrm{MLP}(c)`.

    Without a context they are the learned constant :math:`\theta_0` alone.

    Parameters
    ----------
    initial
        The initial :math:`\theta_0`, shape ``(n,)``.
    context_dim
        Size of the context, 0 for none.
    hidden_dims
        Sizes of the hidden layers of the network of the context.
    activation
        A class of activation modules for the network of the context.

    Examples
    --------
    >>> import torch
    >>> Hypernetwork(torch.zeros(5))().shape
    torch.Size([5])
    >>> Hypernetwork(torch.zeros(5), context_dim=2)(torch.randn(7, 2)).shape
    torch.Size([7, 5])
    """

    def __init__(
        self,
        initial: Tensor,
        context_dim: int = 0,
        hidden_dims: Sequence[int] = (64, 64),
        activation: type[nn.Module] = nn.Tanh,
    ) -> None:
        super().__init__()
        check_hidden_dims(hidden_dims)
        self.constant = nn.Parameter(initial.detach().clone())
        self.network = (
            MLP(0, len(initial), hidden_dims, context_dim, activation) if context_dim else None
        )

    def forward(self, context: Tensor | None = None) -> Tensor:
        """Return parameters of shape ``(n,)``, or ``(*batch, n)`` with a context."""
        if self.network is None:
            return self.constant
        return self.constant + self.network(None, context)
