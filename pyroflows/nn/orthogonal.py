"""Orthogonal matrices made of free numbers."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from .linalg import identity_like, in_single_precision


@in_single_precision
def householder(vectors: Tensor) -> Tensor:
    r"""Return a product of reflections: :math:`Q = H_1 \cdots H_K`.

    :math:`H_k = I - 2 v_k v_k^\top / |v_k|^2` reflects along the vector :math:`v_k`. The product is
    computed as :math:`Q = I - V^\top T V`, where the vectors are the rows of ``V`` and
    :math:`T^{-1}` is :math:`V V^\top` with its lower triangle removed and its diagonal halved [1].
    Costs ``O(K^2 D + K D^2)``.

    Parameters
    ----------
    vectors
        Shape ``(K, D)``, none of them zero.

    References
    ----------
    [1] T. Joffrain, T. M. Low, E. S. Quintana-Ortí, R. van de Geijn, F. G. Van Zee. Accumulating
        Householder transformations, revisited. ACM Transactions on Mathematical Software 32, 2006.

    Examples
    --------
    >>> householder(torch.tensor([[2.0, 0.0], [0.0, 3.0]]))
    tensor([[-1.,  0.],
            [ 0., -1.]])
    """
    products = vectors @ vectors.mT
    weights = products.triu(1) + products.diagonal().diag() / 2
    return identity_like(vectors) - vectors.mT @ torch.linalg.solve_triangular(
        weights, vectors, upper=True
    )


@in_single_precision
def exponential(generator: Tensor) -> Tensor:
    r"""Return the exponential of a skew-symmetric matrix: :math:`Q = \exp(A - A^\top)`.

    Reaches all rotations. Costs ``O(D^3)``.

    Parameters
    ----------
    generator
        The matrix :math:`A`, shape ``(D, D)``.

    Examples
    --------
    >>> exponential(torch.tensor([[0.0, -torch.pi / 2], [0.0, 0.0]])).round(decimals=4).abs()
    tensor([[0., 1.],
            [1., 0.]])
    """
    return torch.linalg.matrix_exp(generator - generator.mT)


@in_single_precision
def cayley(generator: Tensor) -> Tensor:
    r"""Return a Cayley transform: :math:`Q = (I + S)^{-1} (I - S)` with :math:`S = A - A^\top`.

    Reaches all rotations but those with an eigenvalue -1, half a turn in some plane. Costs
    ``O(D^3)``, a fraction of what the exponential takes.

    Parameters
    ----------
    generator
        The matrix :math:`A`, shape ``(D, D)``.

    Examples
    --------
    >>> cayley(torch.tensor([[0.0, 1.0], [0.0, 0.0]]))
    tensor([[ 0., -1.],
            [ 1.,  0.]])
    """
    skew, identity = generator - generator.mT, identity_like(generator)
    return torch.linalg.solve(identity + skew, identity - skew)


class Reflections(nn.Module):
    r"""Give an orthogonal matrix as a product of reflections along learned vectors.

    :math:`Q = H_1 \cdots H_K \, \mathrm{diag}(-1, \dots, -1, 1, \dots, 1)` with ``K`` minus signs:
    a rotation, the identity for unit vectors :math:`v_k = e_k`. For ``K < D`` the first ``K``
    columns can be any orthonormal ones; all rotations are reached from ``K = D - 1`` on.

    Parameters
    ----------
    size
        Number of rows ``D``.
    num_reflections
        Number of vectors ``K``, at most ``D``. Default: ``D``.
    random
        Whether to start from random vectors rather than at the identity.

    Raises
    ------
    ValueError
        If ``num_reflections`` is not between 1 and ``size``.

    Examples
    --------
    >>> torch.equal(Reflections(3, num_reflections=2)(), torch.eye(3))
    True
    """

    vectors: Tensor
    signs: Tensor

    def __init__(self, size: int, num_reflections: int | None = None, random: bool = False) -> None:
        super().__init__()
        num_reflections = size if num_reflections is None else num_reflections
        if not 1 <= num_reflections <= size:
            raise ValueError(
                f"num_reflections must be between 1 and input_dim {size}, got {num_reflections}"
            )
        vectors = torch.eye(num_reflections, size)
        _register(self, "vectors", torch.randn_like(vectors) if random else vectors)
        signs = torch.ones(size)
        signs[:num_reflections] = -1.0
        self.register_buffer("signs", signs, persistent=False)

    def forward(self) -> Tensor:
        """Return the matrix ``(D, D)``."""
        return householder(self.vectors) * self.signs


class Rotation(nn.Module):
    """Give an orthogonal matrix as a function of a learned skew-symmetric one.

    Parameters
    ----------
    size
        Number of rows ``D``.
    function
        What makes a generator of shape ``(D, D)`` orthogonal: :func:`exponential` or
        :func:`cayley`.
    random
        Whether to start from a random generator rather than at the identity.

    Examples
    --------
    >>> torch.equal(Rotation(3)(), torch.eye(3))
    True
    """

    generator: Tensor

    def __init__(
        self,
        size: int,
        function: Callable[[Tensor], Tensor] = exponential,
        random: bool = False,
    ) -> None:
        super().__init__()
        self.function = function
        scale = max(size, 1) ** -0.5 if random else 0.0
        _register(self, "generator", scale * torch.randn(size, size))

    def forward(self) -> Tensor:
        """Return the matrix ``(D, D)``."""
        return self.function(self.generator)


class FixedAxes(nn.Module):
    """Give the axes of the entries, in their order or backwards; nothing is learned.

    Parameters
    ----------
    size
        Number of rows ``D``.
    backwards
        Whether the last entry comes first.

    Examples
    --------
    >>> FixedAxes(2, backwards=True)()
    tensor([[0., 1.],
            [1., 0.]])
    """

    matrix: Tensor

    def __init__(self, size: int, backwards: bool = False) -> None:
        super().__init__()
        identity = torch.eye(size)
        matrix = identity.flip(0) if backwards else identity
        self.register_buffer("matrix", matrix, persistent=False)

    def forward(self) -> Tensor:
        """Return the matrix ``(D, D)``."""
        return self.matrix


def _register(module: nn.Module, name: str, value: Tensor) -> None:
    """Make a value a parameter, unless there is nothing to learn: one entry cannot turn."""
    if value.shape[-1] > 1:
        module.register_parameter(name, nn.Parameter(value))
    else:
        module.register_buffer(name, value)
