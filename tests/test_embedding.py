"""Networks that summarise observations: shapes, invariance, missing entries, errors."""

from collections.abc import Callable

import pytest
import torch
from torch import nn

from pyroflows.sbi import ImageEmbedding, SeriesEmbedding, SetEmbedding
from pyroflows.sbi.densities.conditional import ConditionalDensity
from pyroflows.sbi.model.observations import ObservationSpace

GRIDS = [
    lambda: SeriesEmbedding((1, 1), 5),
    lambda: SeriesEmbedding((7, 2), 5),
    lambda: SeriesEmbedding((100, 3), 5, width=8),
    lambda: ImageEmbedding((1, 1, 1), 5),
    lambda: ImageEmbedding((3, 2, 11), 5, width=8),
    lambda: ImageEmbedding((1, 16, 9), 5, width=8),
]


@pytest.mark.parametrize("build", GRIDS)
def test_grids_of_any_size_become_vectors(build: Callable) -> None:
    embedding = build()
    size = torch.Size(embedding.shape).numel()
    for batch in ((), (4,), (2, 3), (0,)):
        assert embedding(torch.randn(*batch, size)).shape == (*batch, 5)
    embedding(torch.randn(4, size)).square().sum().backward()
    assert all(p.grad is not None for p in embedding.parameters())


@pytest.mark.parametrize("build", [*GRIDS[1:3], *GRIDS[4:]])
def test_grids_are_read_in_place(build: Callable) -> None:
    """Summaries tell where something happens, up to the ends."""
    embedding = build()
    size = torch.Size(embedding.shape).numel()
    one = torch.eye(size)[[0, size // 2, size - 1]]
    difference = torch.cdist(embedding(one), embedding(one))
    assert (difference + torch.eye(3) > 1e-4).all()


@pytest.mark.parametrize("build", [lambda: SetEmbedding(6, 5), *GRIDS[1:3], *GRIDS[4:]])
def test_missing_entries_differ_from_zeros(build: Callable) -> None:
    embedding = build()
    shape = (
        (4, 6) if isinstance(embedding, SetEmbedding) else (torch.Size(embedding.shape).numel(),)
    )
    zeros = torch.zeros(shape)
    missing = zeros.clone()
    missing.flatten()[1] = torch.nan
    summary = embedding(missing)
    assert summary.isfinite().all()
    assert (summary - embedding(zeros)).abs().max() > 1e-4


def test_embeddings_may_normalise_batches() -> None:
    """One observation is no batch to normalise by, nor are zeros one to learn from."""
    embedding = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout().eval())
    density = ConditionalDensity(2, ObservationSpace({"x": torch.Size([3])}), embedding)
    assert density.context_dim == 4
    assert density.embedding[1].num_batches_tracked == 0
    assert [part.training for part in density.embedding] == [True, True, False]


def test_sets_have_no_order() -> None:
    embedding = SetEmbedding(2, 5)
    x = torch.randn(3, 7, 2)
    torch.testing.assert_close(embedding(x), embedding(x[:, torch.randperm(7)]))


def test_elements_that_are_missing_altogether_do_not_count() -> None:
    embedding = SetEmbedding(2, 5)
    x = torch.randn(3, 7, 2)
    padded = torch.cat([x, torch.full((3, 4, 2), torch.nan)], 1)
    torch.testing.assert_close(embedding(padded), embedding(x))
    assert embedding(torch.full((7, 2), torch.nan)).isfinite().all()


def test_a_series_embedding_learns_where_a_bump_is() -> None:
    """Bumps among 32 times, with noise: 100 steps locate them to a fifth of their spread."""
    torch.manual_seed(0)
    embedding = SeriesEmbedding((32, 1), 1, width=8)
    optimizer = torch.optim.Adam(embedding.parameters(), 1e-2)
    centre = 4 + 24 * torch.rand(1000, 1)
    x = 3 * (-(torch.arange(32) - centre).square() / 8).exp() + 0.1 * torch.randn(1000, 32)
    target = (centre - 16) / centre.std()
    for i in range(100):
        rows = slice(8 * i, 8 * i + 8)
        optimizer.zero_grad()
        nn.functional.mse_loss(embedding(x[rows]), target[rows]).backward()
        optimizer.step()
    error = embedding(x[800:]) - target[800:]
    assert error.square().mean().sqrt() < 0.2


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: SeriesEmbedding((0, 2)), r"shape must be \(T, C\)"),
        (lambda: SeriesEmbedding((4,)), r"shape must be \(T, C\), numbers of at least 1, got \(4,"),
        (lambda: ImageEmbedding((8, 8)), r"shape must be \(C, H, W\)"),
        (lambda: SeriesEmbedding((4, 2), 0), "at least 1, got {'output_dim': 0}"),
        (lambda: SeriesEmbedding((4, 2))(torch.zeros(9)), r"shape \(4, 2\) has 8 entries, got"),
        (lambda: ImageEmbedding((1, 2, 2))(torch.zeros(3)), r"has 4 entries, got"),
    ],
)
def test_wrong_shapes_are_refused(build: Callable, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()
