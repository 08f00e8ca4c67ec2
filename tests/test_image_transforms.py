"""What each transform of images is, beyond the contract of all flows."""

import math
from collections.abc import Callable

import pyro.distributions as dist
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pyroflows as pf
from pyroflows.nn import ConvolutionalNetwork
from pyroflows.transforms import (
    PLU,
    QR,
    ActNorm,
    Affine,
    Coupling,
    FactorOut,
    Flattened,
    FlowTransform,
    ImageCoupling,
    InvertibleConvolution,
    Logit,
    Orthogonal,
    Permutation,
    Shift,
    Squeezed,
)
from pyroflows.transforms.image.squeeze import squeeze, unsqueeze
from tests.batteries import jacobian, normal, perturb

DIRECTIONS = ("forward_and_log_det", "inverse_and_log_det")


# Squeezing


def test_channels_of_a_squeezed_image_are_pixels_of_blocks() -> None:
    x = torch.arange(2 * 4 * 6).reshape(2, 4, 6)
    squeezed = squeeze(x, 2)
    assert squeezed.shape == (8, 2, 3)
    for i in range(2):
        for j in range(2):
            for c in range(2):
                assert torch.equal(squeezed[(2 * i + j) * 2 + c], x[c, i::2, j::2])


@pytest.mark.parametrize("factor", [1, 2, 3])
@pytest.mark.parametrize("batch", [(), (5,), (0,), (2, 3)])
def test_unsqueezing_undoes_squeezing(batch: tuple[int, ...], factor: int) -> None:
    x = torch.randn(*batch, 2, 6, 12)
    assert torch.equal(unsqueeze(squeeze(x, factor), factor), x)
    if factor == 2 and x.numel():  # of one channel, torch has it too, but for empty batches
        grey = x[..., :1, :, :]
        assert torch.equal(squeeze(grey, 2), F.pixel_unshuffle(grey, 2))


def test_a_squeezed_flow_maps_pixels_by_their_place_in_a_block() -> None:
    inner = ActNorm((4, 2, 2), initialized=True)
    with torch.no_grad():
        inner.shift.copy_(torch.arange(4.0).view(4, 1, 1))
    y = Squeezed(inner)(torch.zeros(1, 4, 4))
    assert y.tolist() == [[[0.0, 1.0] * 2, [2.0, 3.0] * 2] * 2]


# Couplings


def coupling(mask: str, shape: tuple[int, int, int], **options) -> ImageCoupling:
    torch.manual_seed(0)
    return perturb(ImageCoupling(Affine(), shape, mask=mask, width=8, **options).double(), 0.3)


def moved_entries(mask: str, shape: tuple[int, int, int], swap: bool) -> Tensor:
    channel, row, column = torch.meshgrid(*map(torch.arange, shape), indexing="ij")
    moved = channel >= shape[0] // 2 if mask == "channel" else (row + column) % 2 == 1
    return ~moved if swap else moved


@pytest.mark.parametrize("swap", [False, True])
@pytest.mark.parametrize(
    ("mask", "shape"),
    [("channel", (2, 3, 3)), ("channel", (3, 2, 2)), ("checkerboard", (1, 3, 5))],
)
def test_a_coupling_moves_what_its_mask_says(mask: str, shape: tuple, swap: bool) -> None:
    flow, moved = coupling(mask, shape, swap=swap), moved_entries(mask, shape, swap)
    x = normal(20, *shape, seed=1).requires_grad_()
    for direction in DIRECTIONS:
        y, _ = getattr(flow, direction)(x)
        changed = (y != x).any(0)
        assert torch.equal(changed, moved)
        depends = (jacobian(y, x, 3).abs().amax(0) > 0) & ~torch.eye(x[0].numel()).bool()
        moved_entry = moved.flatten()
        assert not depends[~moved_entry].any()
        assert not depends[:, moved_entry].any()
        assert depends[moved_entry].any(1).all()


def test_a_coupling_is_its_formula() -> None:
    flow, x = coupling("channel", (2, 4, 4)), normal(5, 2, 4, 4, seed=1)
    shift, raw = flow.network(x[:, :1]).split(1, 1)
    log_scale = 3 * torch.tanh(raw / 3)
    y, log_det = flow.forward_and_log_det(x)
    torch.testing.assert_close(y[:, 1:], x[:, 1:] * log_scale.exp() + shift)
    torch.testing.assert_close(log_det, log_scale.sum((1, 2, 3)))


def test_an_additive_coupling_keeps_volumes() -> None:
    flow = perturb(ImageCoupling(Shift(), (2, 4, 4), width=8), 0.3)
    assert flow.forward_and_log_det(torch.randn(5, 2, 4, 4))[1].tolist() == [0.0] * 5


# Networks


def test_a_network_starts_near_zero() -> None:
    torch.manual_seed(0)
    y = ConvolutionalNetwork(3, 6, num_blocks=3, kernel_size=3)(torch.randn(20, 3, 8, 8))
    assert 0 < y.abs().max() < 0.1


def test_lengths_of_kernels_do_not_matter() -> None:
    network, x = ConvolutionalNetwork(3, 6, width=8).double(), normal(5, 3, 4, 4, seed=1)
    before = network(x)
    with torch.no_grad():
        for layer in (network.input, *network.blocks):
            layer.direction.mul_(torch.rand(8, 1, 1, 1) + 0.5)
    torch.testing.assert_close(network(x), before)


def test_a_network_is_its_formula() -> None:
    network = ConvolutionalNetwork(2, 3, width=4, num_blocks=2, kernel_size=3, context_dim=2)
    network, x, context = network.double(), normal(5, 2, 6, 6, seed=1), normal(5, 2, seed=2)

    def convolved(layer: nn.Module, x: Tensor) -> Tensor:
        norms = layer.direction.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
        return F.conv2d(x, layer.scale * layer.direction / norms, layer.bias, padding=1)

    hidden = convolved(network.input, x) + (context @ network.context.weight.T)[..., None, None]
    for layer in network.blocks:
        hidden = hidden + convolved(layer, hidden.clamp(min=0))
    expected = F.conv2d(hidden.clamp(min=0), network.output.weight, network.output.bias, padding=1)
    torch.testing.assert_close(network(x, context), expected)


# Linear maps of channels


@pytest.mark.parametrize("linear", [PLU, QR, Orthogonal, lambda size: Permutation([2, 0, 1])])
def test_an_invertible_convolution_maps_every_pixel_alike(linear: Callable) -> None:
    inner = perturb(linear(3).double(), 0.5)
    flow, x = InvertibleConvolution(inner, (4, 5)), normal(7, 3, 4, 5, seed=1)
    for direction in DIRECTIONS:
        y, log_det = getattr(flow, direction)(x)
        pixels, log_dets = getattr(inner, direction)(x.movedim(1, -1))
        torch.testing.assert_close(y, pixels.movedim(-1, 1))
        torch.testing.assert_close(log_det, log_dets.sum((1, 2)))


def test_an_invertible_convolution_is_a_convolution() -> None:
    weight = normal(3, 3, seed=1)
    flow, x = InvertibleConvolution(PLU(3, weight=weight), (4, 5)), normal(7, 3, 4, 5, seed=2)
    y, log_det = flow.forward_and_log_det(x)
    torch.testing.assert_close(y, F.conv2d(x, weight[..., None, None]))
    expected = 20 * torch.linalg.slogdet(weight).logabsdet
    torch.testing.assert_close(log_det, expected.expand(7))


def test_an_invertible_convolution_depends_on_a_context() -> None:
    inner = perturb(PLU(3, context_dim=2, hidden_dims=(8,)).double(), 0.5)
    flow, x, context = InvertibleConvolution(inner, (4, 5)), normal(7, 3, 4, 5, seed=1), None
    context = normal(7, 2, seed=2)
    y, log_det = flow.forward_and_log_det(x, context)
    pixels, log_dets = inner.forward_and_log_det(x.movedim(1, -1), context[:, None, None])
    torch.testing.assert_close(y, pixels.movedim(-1, 1))
    torch.testing.assert_close(log_det, log_dets.sum((1, 2)))


# Parts of an image, and its rows


def test_what_is_factored_out_stays_as_it_is() -> None:
    inner = perturb(ActNorm((1, 2, 2), initialized=True), 0.5)
    flow, x = FactorOut(inner, 3), torch.randn(5, 3, 2, 2)
    y, log_det = flow.forward_and_log_det(x)
    assert torch.equal(y[:, 1:], x[:, 1:])
    first, expected = inner.forward_and_log_det(x[:, :1])
    assert torch.equal(y[:, :1], first)
    assert torch.equal(log_det, expected)


def test_a_flow_of_vectors_sees_an_image_in_a_row() -> None:
    inner = Permutation([3, 2, 1, 0])
    x = torch.arange(4.0).reshape(1, 2, 2)
    assert Flattened(inner, (1, 2, 2))(x).tolist() == [[[3.0, 2.0], [1.0, 0.0]]]


# The logit


def test_the_logit_is_its_formula() -> None:
    x = torch.rand(50, 3, dtype=torch.float64).requires_grad_()
    for margin in (0.0, 0.05, 0.3):
        y, log_det = Logit(3, margin).forward_and_log_det(x)
        torch.testing.assert_close(y, torch.logit(margin + (1 - 2 * margin) * x))
        (slopes,) = torch.autograd.grad(y.sum(), x, retain_graph=True)
        torch.testing.assert_close(log_det, slopes.log().sum(-1))


def test_a_margin_keeps_black_and_white_finite() -> None:
    ends = torch.tensor([0.0, 1.0])
    for dtype in (torch.float32, torch.float64):
        flow, x = Logit(2, margin=0.05), ends.to(dtype)
        y, log_det = flow.forward_and_log_det(x)
        torch.testing.assert_close(y, torch.tensor([-1.0, 1.0], dtype=dtype) * math.log(19))
        assert log_det.isfinite()
        torch.testing.assert_close(flow.inv(y), x)
        assert flow.domain.check(x)
        assert flow.domain.check(flow.inv(1e3 * y))


def test_the_inverse_logit_makes_logistic_numbers_uniform() -> None:
    base = dist.Logistic(torch.zeros(2, 3, 3), 1.0).to_event(3)
    density = pf.Flow(base, Logit((2, 3, 3), margin=0.0).inv)
    x = density.sample((100,))
    assert ((x > 0) & (x < 1)).all()
    torch.testing.assert_close(density.log_prob(x), torch.zeros(100), rtol=0, atol=1e-4)
    with pytest.raises(ValueError, match="support"):
        density.log_prob(x + 1)


# Errors


def identity(*shape: int) -> FlowTransform:
    return ActNorm(shape, initialized=True)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Squeezed(identity(6, 2, 2)), "divide the 6 channels of the flow, got 2"),
        (lambda: Squeezed(identity(4)), r"\(C, H, W\), positive, got \(4,\)"),
        (lambda: FactorOut(identity(3, 2, 2), 2), "at least the 3 of the flow, got 2"),
        (lambda: FactorOut(identity(3), 4), r"\(C, H, W\), positive, got \(3,\)"),
        (lambda: Flattened(identity(4), (1, 2, 3)), r"6 entries.*event shape \(4,\)"),
        (lambda: ImageCoupling(Affine(), (1, 4, 4)), r"two channels, got.*\(1, 4, 4\)"),
        (lambda: ImageCoupling(Affine(), 4), r"\(C, H, W\), positive, got \(4,\)"),
        (lambda: ImageCoupling(Affine(), (2, 0, 4)), r"positive, got \(2, 0, 4\)"),
        (lambda: coupling("checkerboard", (2, 1, 1)), r"two pixels, got.*\(2, 1, 1\)"),
        (lambda: coupling("stripes", (2, 1, 1)), "mask must be one of 'channel'.*got 'stripes'"),
        (lambda: coupling("channel", (2, 4, 4), kernel_size=2), "kernel_size must be odd.*got 2"),
        (lambda: coupling("channel", (2, 4, 4), num_blocks=-1), "num_blocks.*got 8 and -1"),
        (lambda: InvertibleConvolution(PLU(3), (2,)), r"\(C, H, W\), positive, got \(3, 2\)"),
        (lambda: Logit(3, margin=0.5), r"margin must lie in \[0, 0.5\), got 0.5"),
        (lambda: Logit(3, margin=-0.1), r"margin must lie in \[0, 0.5\), got -0.1"),
    ],
)
def test_impossible_layers_are_refused(build: Callable, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()


def test_a_convolution_of_a_flow_that_is_not_linear_is_refused() -> None:
    with pytest.raises(TypeError, match="linear must be a linear flow, got Coupling"):
        InvertibleConvolution(Coupling(Affine(), 3), (2, 2))
