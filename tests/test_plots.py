"""Pictures of densities and of maps show what they should, where they should."""

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch

from pyroflows.plots import plot_density, plot_warp


@pytest.fixture
def ax():
    figure, ax = plt.subplots()
    yield ax
    plt.close(figure)


def test_a_density_is_darkest_at_its_mode(ax):
    def log_prob(x):
        return -0.5 * ((x[:, 0] - 2.0) / 0.3).square() - 0.5 * ((x[:, 1] + 1.0) / 0.3).square()

    assert plot_density(log_prob, ((-4.0, 4.0), (-2.0, 2.0)), cells=40, ax=ax) is ax
    (image,) = ax.images
    row, column = np.unravel_index(image.get_array().argmax(), image.get_array().shape)
    assert (column + 0.5) * 8 / 40 - 4 == pytest.approx(2.0, abs=0.11)
    assert (row + 0.5) * 4 / 40 - 2 == pytest.approx(-1.0, abs=0.06)
    assert image.get_extent() == [-4.0, 4.0, -2.0, 2.0]
    assert image.origin == "lower"


def test_lightness_falls_with_the_density(ax):
    plot_density(lambda x: -x.square().sum(-1), cells=10, ax=ax)
    red, green, blue, _ = ax.images[0].get_cmap()(np.linspace(0, 1, 100)).T
    lightness = 0.2126 * red + 0.7152 * green + 0.0722 * blue
    assert (np.diff(lightness) <= 0).all()
    assert lightness[0] - lightness[-1] > 0.9


def test_a_warp_shows_the_images_of_grid_lines(ax):
    def shear(x):
        return torch.stack([x[:, 0], x[:, 1] + 0.5 * x[:, 0]], -1)

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


def test_pictures_record_no_gradients(ax):
    weight = torch.ones(2, requires_grad=True)
    plot_density(lambda x: (-x.square() * weight).sum(-1), cells=5, ax=ax)
    plot_warp(lambda x: x * weight, lines=3, ax=ax)
    assert weight.grad is None
