"""The named architectures of images."""

import inspect
from pathlib import Path

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

import pyroflows as pf
from pyroflows.transforms import Affine, Chain, FlowTransform, Spline
from tests.batteries import jacobian, normal, perturb

NAMES = pf.flows.names("image")
DTYPES = [torch.float32, torch.float64]
DIRECTIONS = ("forward_and_log_det", "inverse_and_log_det")
SHAPE = (1, 8, 8)
SMALL = {"width": 8, "num_layers": 2}


@pytest.fixture(params=NAMES)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


def build(name: str, context_dim: int, dtype: torch.dtype, noise: float) -> FlowTransform:
    """Build an architecture of default depth, with a context bound to it if it takes any."""
    torch.manual_seed(0)
    flow = perturb(pf.flow(name, SHAPE, context_dim, width=16).to(dtype), noise)
    return flow.condition(normal(context_dim, seed=2).to(dtype)) if context_dim else flow


def test_the_names_of_image_flows() -> None:
    assert NAMES == ["glow", "realnvp_image"]
    assert not {*NAMES} & {*pf.flows.names()}
    for name in NAMES:
        spec = pf.flows.spec(name)
        assert spec.event == "image"
        assert spec.paper
    assert all(pf.flows.spec(name).event == "vector" for name in pf.flows.names())


@pytest.mark.parametrize("context_dim", [0, 3])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_inverts_at_default_depth(name: str, context_dim: int, dtype: torch.dtype) -> None:
    flow, x = build(name, context_dim, dtype, 0.02), 2 * normal(10, *SHAPE, seed=1).to(dtype)
    tolerance = 1e-4 if dtype == torch.float32 else 1e-10
    for there, back in (DIRECTIONS, DIRECTIONS[::-1]):
        y, log_det = getattr(flow, there)(x)
        x_back, log_det_back = getattr(flow, back)(y)
        assert (y - x).abs().max() > 0.1
        assert (x_back - x).abs().max() <= tolerance, there
        assert (log_det + log_det_back).abs().max() <= 10 * tolerance, there


def test_log_det_is_that_of_the_jacobian_at_default_depth(name: str) -> None:
    flow = build(name, 0, torch.float64, 0.02)
    x = normal(3, *SHAPE, seed=1).requires_grad_()
    for direction in DIRECTIONS:
        y, log_det = getattr(flow, direction)(x)
        expected = torch.linalg.slogdet(jacobian(y, x, 3)).logabsdet
        assert (log_det - expected).abs().max() < 1e-9


@pytest.mark.parametrize("context_dim", [0, 3])
def test_starts_near_the_identity(name: str, context_dim: int) -> None:
    flow, x = build(name, context_dim, torch.float32, 0.0), normal(50, *SHAPE, seed=1).float()
    for direction in DIRECTIONS:
        y, log_det = getattr(flow, direction)(x)
        assert (y - x).abs().max() < 0.1
        assert log_det.abs().max() < 0.5


def test_every_entry_moves_and_depends_on_every_other(name: str) -> None:
    flow = perturb(pf.flow(name, (1, 4, 4), **SMALL).double(), 0.2)
    x = normal(20, 1, 4, 4, seed=1).requires_grad_()
    for direction in DIRECTIONS:
        y, _ = getattr(flow, direction)(x)
        assert (jacobian(y, x, 3).abs().amax(0) > 1e-8).all()


def test_every_build_of_an_architecture_has_the_same_structure(name: str) -> None:
    one = perturb(pf.flow(name, (2, 4, 4), **SMALL).double(), 0.1)
    other = pf.flow(name, (2, 4, 4), **SMALL).double()
    other.load_state_dict(one.state_dict())
    x = normal(5, 2, 4, 4, seed=1)
    assert torch.equal(one(x), other(x))


def test_is_built_in_the_default_dtype(name: str) -> None:
    torch.set_default_dtype(torch.float64)
    flow = pf.flow(name, (1, 4, 4), **SMALL)
    assert all(t.dtype == torch.float64 for t in flow.parameters())
    for y in flow.forward_and_log_det(torch.zeros(1, 4, 4)):
        assert y.dtype == torch.float64


def test_runs_in_half_precision(name: str) -> None:
    flow, x = pf.flow(name, (1, 4, 4), **SMALL).bfloat16(), normal(5, 1, 4, 4, seed=1).bfloat16()
    for transform in (flow, flow.inv):
        y, log_det = transform.forward_and_log_det(x)
        assert y.dtype == log_det.dtype == torch.bfloat16
        assert (y - x).abs().max() < 0.1


@pytest.mark.parametrize("context_dim", [0, 3])
def test_is_built_on_the_default_device(name: str, context_dim: int) -> None:
    with torch.device("meta"):
        flow = pf.flow(name, SHAPE, context_dim)
        flow = flow.condition(torch.zeros(context_dim)) if context_dim else flow
        x = torch.zeros(7, *SHAPE)
    assert all(t.is_meta for t in (*flow.parameters(), *flow.buffers()))
    for direction in DIRECTIONS:
        assert all(t.is_meta for t in getattr(flow, direction)(x))


# Options


def test_options_reach_the_architecture(name: str) -> None:
    def kinds(**options) -> set[type]:
        return {type(module) for module in pf.flow(name, (1, 4, 4), **SMALL, **options).modules()}

    def size(**options) -> int:
        return sum(p.numel() for p in pf.flow(name, (1, 4, 4), **options).parameters())

    assert size(width=8, num_layers=4) > size(**SMALL)
    assert size(width=16, num_layers=2) > size(**SMALL)
    assert size(num_blocks=4, **SMALL) > size(num_blocks=1, **SMALL)
    assert size(num_scales=2, **SMALL) > size(num_scales=1, **SMALL)
    assert kinds(activation=nn.SiLU) - kinds() == {nn.SiLU}
    spline = Chain(Spline(bins=5), Affine())
    assert repr(spline) in repr(pf.flow(name, (1, 4, 4), bijection=spline, **SMALL))


def test_a_single_scale_takes_images_of_any_size(name: str) -> None:
    shape = (2, 5, 7) if name == "realnvp_image" else (2, 2, 6)
    flow = perturb(pf.flow(name, shape, num_scales=1, **SMALL).double(), 0.1)
    x = normal(3, *shape, seed=1)
    torch.testing.assert_close(flow.inv(flow(x).clone()), x)


@pytest.mark.parametrize(
    ("shape", "options", "message"),
    [
        (64, {}, r"\(C, H, W\), positive, got \(64,\)"),
        ((8, 8), {}, r"\(C, H, W\), positive, got \(8, 8\)"),
        ((1, 8, 0), {}, r"\(C, H, W\), positive, got \(1, 8, 0\)"),
        ((1, 8, 7), {}, r"multiples of . for num_scales=2, got an image of shape \(1, 8, 7\)"),
        ((1, 8, 8), {"num_scales": 0}, "num_scales must be at least 1, got 0"),
        ((1, 8, 8), {"num_scales": 5}, "multiples of .* for num_scales=5"),
        ((1, 8, 8), {"num_layers": 0}, "num_layers must be at least 1, got 0"),
        ((1, 8, 8), {"width": 0}, "width must be at least 1.*got 0"),
        ((1, 8, 8), {"context_dim": -1}, "context_dim must be at least 0, got -1"),
    ],
)
def test_impossible_options_are_refused(
    name: str, shape: tuple, options: dict, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        pf.flow(name, shape, **options)


def test_an_unknown_option_is_refused(name: str) -> None:
    with pytest.raises(TypeError, match="num_leyers"):
        pf.flow(name, SHAPE, num_leyers=3)


def test_an_unknown_name_is_refused_with_all_names() -> None:
    with pytest.raises(ValueError, match="unknown flow 'glowing'") as error:
        pf.flow("glowing", SHAPE)
    assert all(name in str(error.value) for name in (*NAMES, *pf.flows.names()))


def test_a_guide_refuses_a_flow_of_images() -> None:
    def model() -> None:
        pyro.sample("x", dist.Normal(torch.zeros(4), 1.0).to_event(1))

    with pytest.raises(ValueError, match=r"\(C, H, W\)"):
        pf.AutoFlow(model, flow="glow")()


# Flows of vectors


@pytest.mark.parametrize("name", ["nice", "maf", "spline_coupling"])
def test_a_flow_of_vectors_maps_an_image_in_a_row(name: str) -> None:
    image = perturb(pf.flow(name, (2, 2, 3), 2).double(), 0.1)
    vector = pf.flow(name, 12, 2).double()
    vector.load_state_dict({k.removeprefix("flow."): v for k, v in image.state_dict().items()})
    x, context = normal(5, 2, 2, 3, seed=1), normal(5, 2, seed=2)
    y, log_det = image.forward_and_log_det(x, context)
    expected, expected_log_det = vector.forward_and_log_det(x.flatten(1), context)
    assert torch.equal(y.flatten(1), expected)
    assert torch.equal(log_det, expected_log_det)


def test_the_dense_nice_of_the_paper_is_a_density_of_images() -> None:
    """Four additive couplings of five rectified layers, a rescaling, and a logistic base."""
    flow = pf.flow("nice", SHAPE, num_layers=4, hidden_dims=(20,) * 5, activation=nn.ReLU)
    density = pf.Flow(dist.Logistic(torch.zeros(SHAPE), 1.0), flow)
    x = density.sample((7,))
    assert x.shape == (7, *SHAPE)
    z, log_det = flow.inverse_and_log_det(x)
    expected = dist.Logistic(0.0, 1.0).log_prob(z).sum((1, 2, 3)) + log_det
    torch.testing.assert_close(density.log_prob(x), expected, rtol=1e-4, atol=1e-3)


# Densities


def test_a_density_of_images_has_the_event_shape(name: str) -> None:
    density = pf.Flow(None, pf.flow(name, (1, 4, 4), 3, **SMALL))
    one_hot = torch.eye(3)
    conditioned = density.condition(one_hot)
    assert conditioned.event_shape == (1, 4, 4)
    assert conditioned.batch_shape == (3,)
    x, log_prob = conditioned.rsample_and_log_prob((5,))
    assert x.shape == (5, 3, 1, 4, 4)
    assert log_prob.shape == (5, 3)
    torch.testing.assert_close(conditioned.log_prob(x.clone()), log_prob, rtol=1e-4, atol=1e-4)


def test_cold_images_are_one_image(name: str) -> None:
    torch.manual_seed(0)
    density = pf.Flow(None, perturb(pf.flow(name, (1, 4, 4), **SMALL), 0.1))
    cold, mode = density.temper(0.0).sample((5,)), density.transform(torch.zeros(1, 4, 4))
    torch.testing.assert_close(cold, mode.expand(5, 1, 4, 4), rtol=0, atol=1e-5)
    spread = [density.temper(t).sample((200,)).std(0).mean() for t in (0.3, 0.7, 1.0)]
    assert spread == sorted(spread)


def test_a_fit_learns_what_pixels_have_in_common(name: str) -> None:
    """Neighbouring pixels that are equal but for noise take far less than independent ones."""
    generator = torch.Generator().manual_seed(0)
    level = torch.randn(600, 1, 1, 1, generator=generator)
    data = level + 0.3 * torch.randn(600, 1, 4, 4, generator=generator)
    torch.manual_seed(0)
    density = pf.Flow(None, pf.flow(name, (1, 4, 4), **SMALL))
    density.fit(data[:500], num_steps=150, batch_size=100, learning_rate=1e-2, progress=False)
    covariance = 0.09 * torch.eye(16) + 1.0
    best = dist.MultivariateNormal(torch.zeros(16), covariance).log_prob(data[500:].flatten(1))
    alone = dist.Normal(0.0, 1.09**0.5).log_prob(data[500:]).sum((1, 2, 3))
    reached = (density.log_prob(data[500:]).mean() - alone.mean()) / (best - alone).mean()
    assert reached > 0.6


def test_weights_survive_a_file(name: str, tmp_path: Path) -> None:
    density = pf.Flow(None, pf.flow(name, (1, 4, 4), **SMALL))
    density.fit(torch.randn(50, 1, 4, 4), num_steps=3, progress=False)
    torch.save(density.state_dict(), tmp_path / "weights.pt")
    other = pf.Flow(None, pf.flow(name, (1, 4, 4), **SMALL))
    other.load_state_dict(torch.load(tmp_path / "weights.pt"))
    x = torch.randn(5, 1, 4, 4)
    assert torch.equal(density.log_prob(x), other.eval().log_prob(x))


def test_the_context_tells_classes_apart(name: str) -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(2, (600,), generator=generator)
    data = 2.0 * labels.view(-1, 1, 1, 1) + 0.5 * torch.randn(600, 1, 4, 4, generator=generator)
    context = torch.eye(2)[labels]
    torch.manual_seed(0)
    density = pf.Flow(None, pf.flow(name, (1, 4, 4), 2, **SMALL))
    options = {"num_steps": 150, "batch_size": 100, "learning_rate": 1e-2}
    density.fit(data, context, progress=False, **options)
    means = density.condition(torch.eye(2)).sample((500,)).mean((0, 2, 3, 4))
    torch.testing.assert_close(means, torch.tensor([0.0, 2.0]), rtol=0, atol=0.4)


def test_factories_document_their_papers(name: str) -> None:
    text = inspect.getdoc(pf.flows.spec(name).factory) or ""
    assert pf.flows.spec(name).paper.replace("arXiv:", "abs/") in text
