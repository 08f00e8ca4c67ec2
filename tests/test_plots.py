"""Pictures show the numbers they should, where they should, and refuse what is none."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from scipy import stats
from torch import Tensor, nn

import pyroflows as pf
from pyroflows.diagnostics import SBC, Coverage, psis, tarp
from pyroflows.distributions.standardized import Standardized
from pyroflows.plots import (
    LINE_STYLES,
    plot_corner,
    plot_coverage,
    plot_density,
    plot_ecdf_pit,
    plot_elbo,
    plot_layers,
    plot_losses,
    plot_pair,
    plot_ranks,
    plot_trajectories,
    plot_warp,
    plot_weight_tail,
)
from pyroflows.plots.style import DRAWS
from pyroflows.sbi.densities.flow_matching_density import FlowMatchingDensity
from pyroflows.sbi.model.observations import ObservationSpace
from pyroflows.transforms import Compose, ContinuousFlow, Permutation, affine_coupling

SEED = np.random.SeedSequence(0)


@pytest.fixture
def ax() -> Iterator[Axes]:
    figure, ax = plt.subplots()
    yield ax
    plt.close(figure)


@pytest.fixture(autouse=True)
def _close_figures() -> Iterator[None]:
    yield
    plt.close("all")


def normal(*shape: int) -> np.ndarray:
    return np.random.default_rng(SEED).normal(size=shape)


def calibrated(num_replicates: int = 200, dim: int = 2) -> SBC:
    ranks = torch.from_numpy(np.random.default_rng(SEED).integers(0, 100, (num_replicates, dim)))
    return SBC(ranks, 99, tuple(f"theta[{i}]" for i in range(dim)))


class Shear(nn.Module):
    """The field whose flow is ``(x, y + 2 t x)``."""

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        return torch.stack([torch.zeros_like(x[:, 0]), 2 * x[:, 0]], -1)


def stretched(layers: Compose, factor: float) -> Standardized:
    return Standardized(layers, torch.zeros(2), torch.tensor([factor, factor]))


# What holds for all

PLOTS: dict[str, Callable[..., Any]] = {
    "elbo": lambda **on: plot_elbo({"guide": [3.0, 2.0, 1.0]}, **on),
    "losses": lambda **on: plot_losses([3.0, 2.0, 1.0], **on),
    "pair": lambda **on: plot_pair(normal(50, 2), normal(60, 2), **on),
    "weight tail": lambda **on: plot_weight_tail(normal(500), **on),
    "ecdf pit": lambda **on: plot_ecdf_pit(calibrated(50), **on),
    "coverage": lambda **on: plot_coverage(Coverage(torch.arange(100), 99), **on),
    "density": lambda **on: plot_density(lambda x: -x.square().sum(-1), cells=5, **on),
    "warp": lambda **on: plot_warp(torch.sinh, lines=3, **on),
    "trajectories": lambda **on: plot_trajectories(normal(4, 5, 2), **on),
}
GRIDS: dict[str, tuple[Callable[..., Any], tuple[int, int]]] = {
    "corner": (lambda **on: plot_corner(normal(50, 2), normal(60, 2), **on), (2, 2)),
    "ranks": (lambda **on: plot_ranks(calibrated(), **on), (1, 2)),
    "layers": (lambda **on: plot_layers([Permutation([1, 0])], lines=3, **on), (2, 2)),
}


@pytest.mark.parametrize("name", PLOTS)
def test_axes_that_are_given_are_drawn_on_and_no_others(name: str, ax: Axes) -> None:
    other = plt.subplots()[1]  # the current axes are not the ones to draw on
    before = plt.get_fignums()
    assert PLOTS[name](ax=ax) is ax
    assert ax.has_data()
    assert not other.has_data()
    assert plt.get_fignums() == before
    assert plt.gca() is other


@pytest.mark.parametrize("name", PLOTS)
def test_without_axes_there_is_one_new_figure(name: str, ax: Axes) -> None:
    before = plt.get_fignums()
    drawn = PLOTS[name]()
    assert len(plt.get_fignums()) == len(before) + 1
    assert drawn is not ax
    drawn.figure.canvas.draw()


@pytest.mark.parametrize("name", GRIDS)
def test_grids_of_axes_are_given_or_new(name: str) -> None:
    draw, shape = GRIDS[name]
    given = plt.subplots(*shape, squeeze=False)[1]
    before = plt.get_fignums()
    drawn = draw(axes=given)
    assert plt.get_fignums() == before
    assert [*drawn.flat] == [*given.flat]
    assert draw()[(0,) * drawn.ndim].figure is not given[0, 0].figure
    assert len(plt.get_fignums()) == len(before) + 1
    with pytest.raises(ValueError, match="axes must"):
        draw(axes=plt.subplots(3, 3)[1])


def numbers(ax: Axes) -> list[np.ndarray]:
    return [line.get_xydata() for line in ax.lines]


@pytest.mark.parametrize(
    ("draw", "shape"),
    [
        (plot_elbo, (60,)),
        (plot_losses, (60,)),
        (plot_weight_tail, (60,)),
        (plot_pair, (60, 2)),
        (plot_trajectories, (6, 10, 2)),
        (plot_trajectories, (6, 10)),
        (lambda values: plot_corner(values)[1, 0], (60, 2)),
    ],
)
def test_tensors_arrays_and_lists_give_the_same_picture(
    draw: Callable[[Any], Axes], shape: tuple[int, ...]
) -> None:
    # Numbers that half precision holds too.
    array = np.round(normal(*shape) * 8) / 8
    expected = numbers(draw(array))
    tensor = torch.from_numpy(array)
    for values in (array.tolist(), tensor.requires_grad_(), tensor.float(), tensor.bfloat16()):
        for one, other in zip(numbers(draw(values)), expected, strict=True):
            np.testing.assert_array_equal(one, other)


@pytest.mark.gpu
def test_tensors_may_live_on_a_gpu() -> None:
    draws = torch.randn(100, 2, device="cuda")
    plot_pair(draws, draws)
    plot_corner({"theta": draws}, truth={"theta": draws[0]})
    plot_weight_tail({"guide": draws[:, 0]})
    flow = pf.flow("realnvp", 2, num_layers=2).cuda()
    plot_layers(flow, lines=3, device="cuda")
    plot_density(pf.Flow(None, flow).log_prob, cells=5, device="cuda")


@pytest.mark.parametrize("wrong", [math.nan, math.inf])
@pytest.mark.parametrize(
    ("draw", "name"),
    [
        (lambda x: plot_pair(x), "draws"),
        (lambda x: plot_pair(normal(9, 2), x), "reference"),
        (lambda x: plot_corner(x), "draws"),
        (lambda x: plot_corner(normal(9, 2), x), "reference"),
        (lambda x: plot_corner(normal(9, 2), truth=x[0]), "truth"),
        (lambda x: plot_corner({"theta": x}), r"draws\['theta'\]"),
        (lambda x: plot_trajectories(x), "states"),
        (lambda x: plot_trajectories(normal(2, 3), times=x[0]), "times"),
    ],
)
def test_numbers_that_are_not_finite_are_refused(
    draw: Callable, name: str, wrong: float, ax: Axes
) -> None:
    before = plt.get_fignums()
    with pytest.raises(ValueError, match=f"^{name} must be finite, got 1 of"):
        draw(np.array([[wrong, 1.0], [1.0, 1.0]]))
    assert plt.get_fignums() == before  # no empty figure is left behind


@pytest.mark.parametrize(
    ("draw", "message"),
    [
        (lambda: plot_elbo([]), r"losses must have shape \(num_steps,\), got \(0,\)"),
        (lambda: plot_elbo({}), "at least one curve"),
        (lambda: plot_elbo({"a": [[1.0]]}), r"losses\['a'\] must have shape"),
        (
            lambda: plot_losses([math.nan, math.inf]),
            "losses must hold a finite loss, got none in 2",
        ),
        (lambda: plot_losses([1.0], window=0), "window must be at least 1, got 0"),
        (lambda: plot_pair(np.zeros((0, 2))), r"draws must have shape \(S, 2\), got \(0, 2\)"),
        (lambda: plot_pair(np.zeros((9, 3))), r"draws must have shape \(S, 2\), got \(9, 3\)"),
        (lambda: plot_pair(normal(9, 2), normal(9)), r"reference must have shape \(R, 2\)"),
        (lambda: plot_pair(normal(9, 2), labels=("x",)), "labels must be two, got 1"),
        (lambda: plot_corner(normal(9)), r"draws must have shape \(S, D\), got \(9,\)"),
        (lambda: plot_corner(normal(9, 2), normal(9, 3)), "reference must have 2 columns .* got 3"),
        (lambda: plot_corner(normal(9, 2), labels=["x"]), "labels must be .* 2, got 1"),
        (lambda: plot_corner(normal(9, 2), truth=[1.0]), "truth must have 2 columns .* got 1"),
        (lambda: plot_corner({"a": normal(9), "b": normal(8)}), "equally many draws"),
        (lambda: plot_corner({"a": normal(9)}, {"b": normal(9)}), r"\['a'\] are missing"),
        (lambda: plot_weight_tail([]), r"log_weights must have shape \(S,\)"),
        (lambda: plot_weight_tail([math.nan, 0.0]), "NaN"),
        (lambda: plot_ranks(calibrated(), num_bins=1), "num_bins must be at least 2, got 1"),
        (lambda: plot_ranks(calibrated(), confidence=1.0), "confidence must lie"),
        (lambda: plot_ecdf_pit(calibrated(), confidence=0.0), "confidence must lie"),
        (lambda: plot_coverage({}), "at least one curve"),
        (lambda: plot_density(lambda x: x), "log_prob must map points of shape"),
        (lambda: plot_density(lambda x: x[:, 0].sqrt()), "log_prob must not be NaN"),
        (lambda: plot_density(lambda x: x[:, 0] - math.inf), "log_prob must be finite somewhere"),
        (lambda: plot_density(torch.sum, cells=0), "cells must be at least 1, got 0"),
        (lambda: plot_density(torch.sum, limits=((1, 0), (0, 1))), "limits must be two ascending"),
        (lambda: plot_warp(torch.sqrt), "transform must map the grid to finite points"),
        (lambda: plot_warp(lambda x: x[:, 0]), "transform must map points of shape"),
        (lambda: plot_warp(torch.sinh, lines=0), "lines must be at least 1, got 0"),
        (lambda: plot_layers([]), "at least one layer"),
        (lambda: plot_layers(pf.flow("nice", 3)), "must map the plane, got event_shape"),
        (lambda: plot_layers(pf.flow("nice", 2, context_dim=1)), "needs a context"),
        (lambda: plot_trajectories(normal(9)), r"states must have shape \(T, N\), got \(9,\)"),
        (lambda: plot_trajectories(normal(4, 5, 3)), r"states must have shape \(T, N, 2\)"),
        (lambda: plot_trajectories(normal(4, 5), times=[0.0, 1.0]), r"times must have shape \(4,"),
    ],
)
def test_impossible_arguments_are_named(draw: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        draw()
    assert not plt.get_fignums()


@pytest.mark.parametrize(
    ("draw", "message"),
    [
        (lambda: plot_ranks(Coverage(torch.arange(100), 99)), "test must be a SBC, got Coverage"),
        (lambda: plot_ecdf_pit(torch.arange(100)), "test must be a SBC, got Tensor"),
        (lambda: plot_coverage({"a": calibrated()}), r"result\['a'\] must be a Coverage, got SBC"),
        (lambda: plot_layers([torch.sinh]), "flow must hold FlowTransforms"),
    ],
)
def test_wrong_types_are_named(draw: Callable[[], Any], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        draw()


@pytest.mark.parametrize(
    "draw",
    [
        lambda few: plot_elbo({str(i): few for i in range(6)}),
        lambda few: plot_losses({str(i): few for i in range(6)}),
        lambda few: plot_coverage({str(i): Coverage(torch.arange(100), 99) for i in range(6)}),
        lambda few: plot_ecdf_pit(calibrated(dim=6)),
    ],
)
def test_curves_differ_in_style_not_only_in_colour(draw: Callable) -> None:
    lines = [line for line in draw([2.0, 1.0]).lines if not line.get_label().startswith("_")]
    assert len(lines) == len(LINE_STYLES)
    # Dashed lines all call themselves "--": the pattern tells them apart.
    assert len({line._unscaled_dash_pattern for line in map(hashable, lines)}) == len(LINE_STYLES)


def hashable(line: Any) -> Any:
    offset, dashes = line._unscaled_dash_pattern
    line._unscaled_dash_pattern = (offset, tuple(dashes or ()))
    return line


# Losses


def test_curves_are_moving_averages(ax: Axes) -> None:
    losses = normal(100)
    plot_losses({"a": losses}, window=7, ax=ax)
    x, y = ax.lines[0].get_data()
    np.testing.assert_array_equal(x, np.arange(7, 101))
    np.testing.assert_allclose(y, [losses[i - 7 : i].mean() for i in range(7, 101)])
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["a"]


def test_a_window_is_no_wider_than_the_fit(ax: Axes) -> None:
    plot_losses([1.0, 2.0, 6.0], window=50, ax=ax)
    np.testing.assert_allclose(ax.lines[0].get_xydata(), [[3.0, 3.0]])
    assert ax.get_legend() is None


def test_steps_without_a_loss_are_left_out(ax: Axes) -> None:
    frame = pd.DataFrame(
        {"loss": [4.0, math.inf, 2.0, 1.0], "validation_loss": [math.nan, 5.0, math.nan, 3.0]},
        index=range(1, 5),
    )
    plot_losses(frame, window=2, ax=ax)
    np.testing.assert_allclose(ax.lines[0].get_xydata(), [[3, 2.0], [4, 1.5]])
    np.testing.assert_allclose(ax.lines[1].get_xydata(), [[2, 5.0], [4, 3.0]])


def test_an_elbo_is_minus_the_loss_or_the_gap_to_the_evidence(ax: Axes) -> None:
    plot_elbo({"a": [4.0, 2.0]}, window=1, ax=ax)
    np.testing.assert_allclose(ax.lines[0].get_ydata(), [-4.0, -2.0])
    assert ax.get_yscale() == "linear"
    gap = plot_elbo({"a": [4.0, 2.0]}, log_evidence=-1.0, window=1)
    np.testing.assert_allclose(gap.lines[0].get_ydata(), [3.0, 1.0])
    assert gap.get_yscale() == "log"


# Weights


def test_a_tail_is_the_share_of_larger_weights(ax: Axes) -> None:
    logs = normal(50)
    plot_weight_tail({"guide": logs + 1000.0}, ax=ax)
    x, y = ax.lines[0].get_data()
    weights = np.exp(logs) / np.exp(logs).mean()
    np.testing.assert_allclose(y, [(weights >= value * (1 - 1e-9)).mean() for value in x])
    np.testing.assert_allclose(np.sort(x), np.sort(weights))


def test_the_fitted_tail_is_that_of_the_generalised_pareto(ax: Axes) -> None:
    # Exact quantiles of a Pareto distribution of shape .5, shuffled: the fit must find them.
    quantiles = (np.arange(4000) + 0.5) / 4000
    logs = np.random.default_rng(SEED).permutation(-0.5 * np.log(quantiles))
    plot_weight_tail({"guide": logs}, ax=ax)
    raw, fitted = ax.lines
    khat = psis(torch.from_numpy(logs))[1]
    assert raw.get_label() == f"guide, $\\hat k$ = {khat:.2f}"
    x, y = fitted.get_data()
    assert 180 < len(x) <= math.ceil(3 * math.sqrt(4000))
    mean = np.exp(logs).mean()
    # Exceedance P(W > w) = w^-2; the shape that is fitted is a few hundredths off, over a tail of
    # four e-folds.
    np.testing.assert_allclose(np.log(y), -2 * np.log(x * mean), atol=0.3)
    assert x.max() < raw.get_xdata().max()
    # Along the fit, (1 + k y / s)^(-1 / k): a straight line in w^-k.
    threshold = np.sort(np.exp(logs) / mean)[-math.ceil(3 * math.sqrt(4000)) - 1]
    power = (y * 4000 / math.ceil(3 * math.sqrt(4000))) ** -khat - 1
    np.testing.assert_allclose(power / (x - threshold), power[0] / (x[0] - threshold), rtol=1e-6)


@pytest.mark.parametrize(
    ("logs", "label"),
    [
        (np.zeros(100), "$\\hat k$ = 0.00"),
        (normal(10), "$\\hat k$ = inf"),
        (np.where(np.arange(100) < 3, 0.0, -np.inf), "$\\hat k$ = inf"),
        (np.where(np.arange(100) < 10, np.arange(100.0), -np.inf), "$\\hat k$ = "),
    ],
    ids=["equal", "few", "zero", "mostly zero"],
)
def test_where_no_tail_is_fitted_none_is_drawn(logs: np.ndarray, label: str, ax: Axes) -> None:
    plot_weight_tail(logs, ax=ax)
    (line,) = ax.lines
    assert line.get_label().startswith(label)
    ax.figure.canvas.draw()


# Pairs


def test_points_are_the_first_draws(ax: Axes) -> None:
    draws = normal(30, 2)
    plot_pair(draws, num_draws=20, ax=ax)
    (points,) = ax.lines
    np.testing.assert_array_equal(points.get_xydata(), draws[:20])
    assert not ax.collections


def test_contours_hold_half_and_most_of_the_reference(ax: Axes) -> None:
    reference = normal(20_000, 2) @ np.array([[2.0, 0.0], [1.0, 0.5]])
    plot_pair(reference[:10], reference, ax=ax)
    (contours,) = ax.collections
    dashed, solid = contours.get_paths()
    # The blur of the histogram makes them a little too large. Monte Carlo error .004.
    assert 0.945 < inside(dashed, reference) < 0.97
    assert 0.49 < inside(solid, reference) < 0.55
    (_, no_dashes), (_, dashes) = contours.get_linestyles()[::-1]
    assert dashes
    assert not no_dashes


def inside(path: Any, points: np.ndarray) -> float:
    return np.mean([path.contains_points(points)])


def test_outliers_do_not_coarsen_the_contours(ax: Axes) -> None:
    reference = np.concatenate([normal(5000, 2), 1e6 * normal(10, 2)])
    plot_pair(reference[:5], reference, ax=ax)
    dashed, _ = ax.collections[0].get_paths()
    assert abs(dashed.vertices).max() < 4


@pytest.mark.parametrize("size", [1, 2, 7])
def test_few_or_equal_reference_draws_have_contours_too(size: int, ax: Axes) -> None:
    plot_pair(np.zeros((3, 2)), np.ones((size, 2)), ax=ax)
    ax.figure.canvas.draw()
    for path in ax.collections[0].get_paths():
        assert path.contains_point((1.0, 1.0))


def test_light_points_let_dark_contours_be_seen_in_greyscale() -> None:
    lightness = np.dot((0.2126, 0.7152, 0.0722), to_rgb(DRAWS))
    assert 0.5 < lightness < 0.85


def test_a_corner_shows_each_pair_and_each_margin() -> None:
    draws, reference = normal(500, 3), 2 * normal(700, 3)
    axes = plot_corner(draws, reference, labels=["a", "b", "c"], truth=[0.1, 0.2, 0.3])
    for i, j in np.ndindex(3, 3):
        ax = axes[i, j]
        assert ax.get_visible() == (j <= i)
        if j < i:
            np.testing.assert_array_equal(ax.lines[0].get_xydata(), draws[:, [j, i]])
            assert ax.collections
            vertical, horizontal = ax.lines[1:]
            assert vertical.get_xdata()[0] == [0.1, 0.2, 0.3][j]
            assert horizontal.get_ydata()[0] == [0.1, 0.2, 0.3][i]
            assert ax.get_ylim() == axes[i, i].get_xlim()
    for i in range(3):
        bars, (outline,) = axes[i, i].containers[0], axes[i, i].patches[40:]
        counts = np.array([bar.get_height() for bar in bars])
        edges = [bars[0].get_x(), *(bar.get_x() + bar.get_width() for bar in bars)]
        expected = np.histogram(draws[:, i], edges, density=True)[0]
        np.testing.assert_allclose(counts, expected)
        top = np.histogram(reference[:, i], edges, density=True)[0].max()
        assert outline.get_xy()[:, 1].max() == pytest.approx(top)
    assert [ax.get_xlabel() for ax in axes[-1]] == ["a", "b", "c"]
    assert [ax.get_ylabel() for ax in axes[:, 0]] == ["", "b", "c"]
    texts = [text.get_text() for text in axes[0, 0].get_legend().get_texts()]
    assert texts == ["draws", "reference", "truth"]


def test_a_corner_of_sites_matches_them_by_name() -> None:
    draws = {"mu": torch.randn(40), "theta": torch.randn(40, 1, 2)}
    reference = {name: draws[name] for name in ("theta", "mu")}
    truth = {"theta": [[1.0, 2.0]], "mu": 0.0}
    axes = plot_corner(draws, reference, truth=truth)
    assert [ax.get_xlabel() for ax in axes[-1]] == ["mu", "theta[0, 0]", "theta[0, 1]"]
    points, vertical, horizontal = axes[2, 0].lines
    np.testing.assert_allclose(points.get_xdata(), draws["mu"])
    np.testing.assert_allclose(points.get_ydata(), draws["theta"][:, 0, 1])
    assert (vertical.get_xdata()[0], horizontal.get_ydata()[0]) == (0.0, 2.0)


def test_a_corner_of_one_quantity_that_is_constant() -> None:
    (ax,) = plot_corner({"theta": np.ones(10)}, {"theta": np.ones(10)}).flat
    ax.figure.canvas.draw()
    assert ax.get_xlim() == (0.5, 1.5)


# Calibration


def test_rank_histograms_are_counts_over_expected_ones() -> None:
    # 30 ranks make 7 bins of 4 or 5.
    ranks = torch.from_numpy(np.random.default_rng(SEED).integers(0, 30, (400, 1)))
    (ax,) = plot_ranks(SBC(ranks, 29, ("theta",)), num_bins=7)
    (bars,) = ax.containers
    left = np.array([bar.get_x() for bar in bars]) * 30
    right = left + 30 * np.array([bar.get_width() for bar in bars])
    assert left[0] == 0
    np.testing.assert_allclose([*left[1:], 30], right)
    for a, b, bar in zip(np.round(left), np.round(right), bars, strict=True):
        count = ((ranks >= a) & (ranks < b)).sum().item()
        assert bar.get_height() == pytest.approx(count / (400 * (b - a) / 30))


def test_bins_hold_five_replicates_on_average() -> None:
    (ax,) = plot_ranks(calibrated(50, 1))
    assert len(ax.containers[0]) == 10
    assert len(plot_ranks(calibrated(), num_bins=12)[1].containers[0]) == 12


def test_bands_of_rank_histograms_hold_all_bars_as_often_as_stated() -> None:
    rng = np.random.default_rng(SEED)
    test = SBC(torch.from_numpy(rng.integers(0, 100, (200, 2))), 99, ("a", "b"))
    (ax, _) = plot_ranks(test, num_bins=10, confidence=0.8)
    lower, upper = band(ax)
    counts = rng.multinomial(200, [0.1] * 10, size=2000)
    heights = counts / 20
    share = ((heights >= lower - 1e-9) & (heights <= upper + 1e-9)).all(1).mean()
    # At least .8, and not much more: bars are discrete. Four standard errors of .009.
    assert 0.8 - 0.036 < share < 0.92
    # A narrower band by one count would break the promise.
    tighter = ((heights > lower + 1e-9) & (heights < upper - 1e-9)).all(1).mean()
    assert tighter < 0.8


def band(ax: Axes) -> tuple[float, float]:
    (patch,) = (p for p in ax.patches if hasattr(p, "get_data"))
    data = patch.get_data()
    assert len(set(np.round(data.values, 12))) == len(set(np.round(data.baseline, 12))) == 1
    return data.baseline[0], data.values[0]


def test_the_ecdf_and_its_band_are_those_of_the_diagnostics(ax: Axes) -> None:
    test = calibrated()
    plot_ecdf_pit(test, confidence=0.9, ax=ax)
    curves = test.ecdf(0.9)
    zero, *lines = ax.lines
    assert set(zero.get_ydata()) == {0.0}
    for i, line in enumerate(lines):
        assert line.get_label() == test.names[i]
        np.testing.assert_allclose(line.get_xdata(), [0, *curves.levels, 1])
        np.testing.assert_allclose(line.get_ydata(), [0, *curves.difference[:, i], 0])
        ecdf = stats.ecdf(test.ranks[:, i].numpy() + 1).cdf.evaluate(
            np.round(100 * line.get_xdata())
        )
        np.testing.assert_allclose(line.get_ydata(), ecdf - line.get_xdata(), atol=1e-9)
    (filled,) = ax.collections
    drawn = filled.get_paths()[0].vertices
    assert drawn[:, 1].max() == pytest.approx(curves.upper.max().item())
    assert drawn[:, 1].min() == pytest.approx(curves.lower.min().item())
    assert filled.get_label() == "90 % band, N = 200"


def test_coverage_is_drawn_against_the_diagonal(ax: Axes) -> None:
    truth = torch.randn(100, 2)
    results = {
        "wide": Coverage(torch.arange(100) // 2, 99),
        "tarp": tarp(torch.randn(50, 100, 2), truth),
    }
    plot_coverage(results, ax=ax)
    diagonal, *lines = ax.lines
    np.testing.assert_array_equal(diagonal.get_xydata(), [[0, 0], [1, 1]])
    for line, (label, result) in zip(lines, results.items(), strict=True):
        assert line.get_label() == label
        np.testing.assert_allclose(line.get_xdata(), [0, *result.levels, 1])
        np.testing.assert_allclose(line.get_ydata(), [0, *result.curve, 1])
    assert (lines[0].get_ydata()[1:-1] > lines[0].get_xdata()[1:-1]).all()


def test_results_of_one_size_share_a_band(ax: Axes) -> None:
    one, other = Coverage(torch.arange(100), 99), Coverage(torch.arange(100).flip(0), 99)
    large = Coverage(torch.arange(100).repeat(4), 99)
    plot_coverage({"one": one, "large": large, "other": other}, ax=ax)
    labels = [filled.get_label() for filled in ax.collections]
    assert labels == ["95 % band, N = 100", "95 % band, N = 400"]  # the narrower on top
    drawn = ax.collections[1].get_paths()[0].vertices
    upper = large.levels + large.ecdf.upper
    assert np.isclose(drawn[:, 1, None], upper.numpy()).any(0).all()


# The plane


def test_a_density_is_darkest_at_its_mode(ax: Axes) -> None:
    def log_prob(x: Tensor) -> Tensor:
        return -0.5 * ((x[:, 0] - 2.0) / 0.3).square() - 0.5 * ((x[:, 1] + 1.0) / 0.3).square()

    assert plot_density(log_prob, ((-4.0, 4.0), (-2.0, 2.0)), cells=40, ax=ax) is ax
    (image,) = ax.images
    row, column = np.unravel_index(image.get_array().argmax(), image.get_array().shape)
    assert (column + 0.5) * 8 / 40 - 4 == pytest.approx(2.0, abs=0.11)
    assert (row + 0.5) * 4 / 40 - 2 == pytest.approx(-1.0, abs=0.06)
    assert image.get_extent() == [-4.0, 4.0, -2.0, 2.0]
    assert image.origin == "lower"


def test_a_density_may_be_zero_in_places(ax: Axes) -> None:
    plot_density(lambda x: x[:, 0].log().nan_to_num(-math.inf), cells=4, ax=ax)
    np.testing.assert_allclose(ax.images[0].get_array()[0], [0, 0, 1 / 3, 1], atol=1e-6)


def test_lightness_falls_with_the_density(ax: Axes) -> None:
    plot_density(lambda x: -x.square().sum(-1), cells=10, ax=ax)
    red, green, blue, _ = ax.images[0].get_cmap()(np.linspace(0, 1, 100)).T
    lightness = 0.2126 * red + 0.7152 * green + 0.0722 * blue
    assert (np.diff(lightness) <= 0).all()
    assert lightness[0] - lightness[-1] > 0.9


def shear(x: Tensor) -> Tensor:
    return torch.stack([x[:, 0], x[:, 1] + 0.5 * x[:, 0]], -1)


def test_a_warp_shows_the_images_of_grid_lines(ax: Axes) -> None:
    assert plot_warp(shear, ((-1.0, 1.0), (0.0, 2.0)), lines=3, ax=ax) is ax
    vertical, horizontal = ax.lines[:3], ax.lines[3:]
    for line, x in zip(vertical, (-1.0, 0.0, 1.0), strict=True):
        np.testing.assert_allclose(line.get_xdata(), x)
        np.testing.assert_allclose(line.get_ydata(), np.linspace(0, 2, 60) + 0.5 * x, atol=1e-6)
    for line, y in zip(horizontal, (0.0, 1.0, 2.0), strict=True):
        along = np.linspace(-1, 1, 60)
        np.testing.assert_allclose(line.get_xdata(), along, atol=1e-6)
        np.testing.assert_allclose(line.get_ydata(), y + 0.5 * along, atol=1e-6)
    assert {line.get_linestyle() for line in vertical} == {"-"}
    assert {line.get_linestyle() for line in horizontal} == {"--"}


def test_pictures_record_no_gradients(ax: Axes) -> None:
    weight = torch.ones(2, requires_grad=True)
    plot_density(lambda x: (-x.square() * weight).sum(-1), cells=5, ax=ax)
    plot_warp(lambda x: x * weight, lines=3, ax=ax)
    plot_layers(perturbed_layers(), lines=3)
    assert weight.grad is None


def test_points_have_the_dtype_that_is_asked_for(ax: Axes) -> None:
    flow = pf.Flow(None, perturbed_layers().double())
    plot_density(flow.log_prob, cells=5, dtype=torch.float64, ax=ax)
    plot_warp(flow.transform, lines=3, dtype=torch.float64, ax=ax)
    plot_layers(flow.transform, lines=3, dtype=torch.float64)


def perturbed_layers() -> Compose:
    parts = [affine_coupling(2), Permutation([1, 0]), affine_coupling(2)]
    flow = Compose(parts)
    for parameter in flow.parameters():
        nn.init.normal_(parameter, std=0.3)
    return flow


def test_layers_are_drawn_forward_and_backward() -> None:
    flow = perturbed_layers()
    axes = plot_layers(flow, ((-1.0, 1.0), (-2.0, 2.0)), lines=4)
    assert axes.shape == (2, 3)  # a permutation belongs to the layer before it
    between = flow[:2]
    for row, maps in enumerate([(None, between, flow), (flow.inv, flow[2].inv, None)]):
        for column, transform in enumerate(maps):
            expected = plot_warp(
                torch.clone if transform is None else transform,
                ((-1.0, 1.0), (-2.0, 2.0)),
                lines=4,
            )
            drawn = axes[row, column].lines
            assert len(drawn) == 8
            for line, like in zip(drawn, expected.lines, strict=True):
                np.testing.assert_allclose(line.get_xydata(), like.get_xydata(), atol=1e-5)


def test_panels_of_layers_show_all_of_the_grid_in_squares() -> None:
    for ax in plot_layers(perturbed_layers(), lines=3).flat:
        points = np.concatenate([line.get_xydata() for line in ax.lines])
        (left, right), (bottom, top) = ax.get_xlim(), ax.get_ylim()
        assert right - left == pytest.approx(top - bottom, rel=1e-4)
        assert (points > (left, bottom)).all()
        assert (points < (right, top)).all()


@pytest.mark.parametrize(
    ("build", "num_layers"),
    [
        (lambda flow: flow, 2),
        (lambda flow: flow.inv, 2),
        (lambda flow: Compose([flow, perturbed_layers()]), 4),
        (lambda flow: stretched(flow, 3.0), 3),
        (lambda flow: stretched(flow, 3.0).inv, 3),
        (lambda flow: [flow, flow[:1]], 2),
        (lambda flow: affine_coupling(2), 1),
    ],
)
def test_the_layers_of_a_flow_make_the_flow(build: Callable, num_layers: int) -> None:
    flow = build(perturbed_layers())
    axes = plot_layers(flow, lines=3)
    assert axes.shape == (2, num_layers + 1)
    whole = Compose(flow) if isinstance(flow, list) else flow
    expected = plot_warp(whole, lines=3)
    for line, like in zip(axes[0, -1].lines, expected.lines, strict=True):
        np.testing.assert_allclose(line.get_xydata(), like.get_xydata(), atol=1e-5)


# Trajectories


def test_paths_are_drawn_from_start_to_end(ax: Axes) -> None:
    states = normal(5, 3, 2)
    plot_trajectories(states, ax=ax)
    *paths, starts, ends = ax.lines
    for i, path in enumerate(paths):
        np.testing.assert_array_equal(path.get_xydata(), states[:, i])
    np.testing.assert_array_equal(starts.get_xydata(), states[0])
    np.testing.assert_array_equal(ends.get_xydata(), states[-1])
    assert starts.get_fillstyle() == "none"
    assert ends.get_fillstyle() == "full"


def test_paths_of_numbers_are_drawn_against_time(ax: Axes) -> None:
    states = normal(3, 4)
    plot_trajectories(states, times=torch.tensor([0.0, 0.2, 1.0]), ax=ax)
    for i in range(4):
        np.testing.assert_allclose(ax.lines[i].get_xdata(), [0.0, 0.2, 1.0])
        np.testing.assert_array_equal(ax.lines[i].get_ydata(), states[:, i])
    default = plot_trajectories(states)
    np.testing.assert_allclose(default.lines[0].get_xdata(), [0.0, 0.5, 1.0])


def test_a_continuous_flow_tells_where_points_are_on_the_way() -> None:
    flow = ContinuousFlow(Shear(), 2, solver="rk4", num_steps=2)  # exact for this field
    x, times = torch.randn(4, 3, 2), [0.0, 0.25, 1.0]
    path = flow.trajectory(x, times)
    assert path.shape == (3, 4, 3, 2)
    for state, time in zip(path, times, strict=True):
        expected = torch.stack([x[..., 0], x[..., 1] + 2 * time * x[..., 0]], -1)
        torch.testing.assert_close(state, expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(path[-1], flow(x), atol=1e-4, rtol=1e-4)
    back = flow.trajectory(path[-1], torch.tensor([1.0, 0.25, 0.0]))
    torch.testing.assert_close(back.flip(0), path, atol=1e-4, rtol=1e-4)


def test_the_trajectory_of_a_conditional_flow_takes_the_context() -> None:
    flow = pf.transforms.conditional_cnf(2, 3)
    for parameter in flow.parameters():
        nn.init.normal_(parameter, std=0.5)
    x, context = torch.randn(5, 2), torch.randn(5, 3)
    path = flow.trajectory(x, [0.0, 0.4, 1.0], context)
    torch.testing.assert_close(path[-1], flow.condition(context)(x), atol=1e-4, rtol=1e-4)
    with pytest.raises(ValueError, match="needs a context"):
        flow.trajectory(x, [0.0, 1.0])


WRONG_TIMES: list[list[float]] = [[], [0.0, 1.1], [-0.1, 1.0], [0.0, 0.5, 0.5], [0.0, 0.5, 0.2]]


@pytest.mark.parametrize("times", WRONG_TIMES)
def test_times_must_lead_one_way_between_0_and_1(times: list[float]) -> None:
    with pytest.raises(ValueError, match=r"times must ascend or descend between 0 and 1.*got \["):
        ContinuousFlow(Shear(), 2).trajectory(torch.zeros(1, 2), times)
    with pytest.raises(ValueError, match=r"times must ascend between 0 and 1.*got \["):
        density().trajectory(10, times, torch.zeros(1))


def density() -> FlowMatchingDensity:
    """Return an untrained density of two parameters that depend on an observation linearly."""
    x = torch.randn(500, 1)
    z = torch.cat([x, -2 * x], -1) + torch.tensor([0.1, 0.5]) * torch.randn(500, 2)
    model = FlowMatchingDensity(
        2, ObservationSpace({"x": torch.Size([1])}), width=8, num_blocks=1, num_steps=32
    )
    model.prepare(z, x)
    for parameter in model.network.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model.eval()


def test_a_flow_matching_density_tells_where_its_draws_come_from() -> None:
    model, x = density().with_solver(num_steps=48), torch.randn(3, 1)
    torch.manual_seed(1)
    draws = model.sample(2000, x)
    torch.manual_seed(1)
    path = model.trajectory(2000, [0.0, 0.5, 1.0], x)
    assert path.shape == (3, 2000, 3, 2)
    # The path takes as many steps for each half of it.
    torch.testing.assert_close(path[-1], draws, atol=1e-3, rtol=1e-3)
    # At first, noise in the scale of the residuals of the regression: all covariances are those of
    # the regression, .01 and .25, up to the sampling error of the 500 rows and the 2000 draws.
    # Standard error of a variance: sqrt(2 / 500) = 6 %; four of them and those of the draws.
    assert (path[0].var(0) / torch.tensor([0.01, 0.25]) - 1).abs().max() < 0.35


def test_the_trajectory_of_a_density_solves_its_field() -> None:
    model, x = density(), torch.randn(1)
    torch.manual_seed(1)
    coarse = model.trajectory(50, [0.3, 0.7], x)
    torch.manual_seed(1)
    fine = model.with_solver(tolerance=1e-6).trajectory(50, torch.linspace(0.1, 0.7, 7), x)
    torch.testing.assert_close(coarse, fine[[2, 6]], atol=1e-3, rtol=1e-3)
