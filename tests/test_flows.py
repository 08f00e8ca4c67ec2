"""The named architectures at their default depth, and their registry."""

import inspect
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

import pyroflows as pf
from pyroflows.flows import FlowSpec
from pyroflows.transforms import FlowTransform
from tests.batteries import jacobian, normal, perturb, registered, wrapped

NAMES = pf.flows.names()
DTYPES = [torch.float32, torch.float64]
DIRECTIONS = ("forward_and_log_det", "inverse_and_log_det")


def takes(name: str, option: str) -> bool:
    return option in inspect.signature(pf.flows.spec(name).factory).parameters


@pytest.fixture(params=NAMES)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=[(5, 0), (16, 0), (5, 3), (1, 0)], ids=str)
def sizes(request: pytest.FixtureRequest) -> tuple[int, int]:
    return request.param


def build(name: str, sizes: tuple[int, int], dtype: torch.dtype, noise: float) -> FlowTransform:
    """Build an architecture of default depth, with a context bound to it if it takes any."""
    torch.manual_seed(0)
    flow = perturb(pf.flow(name, *sizes).to(dtype), noise)
    return flow.condition(normal(sizes[1], seed=2).to(dtype)) if sizes[1] else flow


def on_support(name: str, x: Tensor) -> Tensor:
    """Turn numbers, or differences of them, into angles where the flow maps angles."""
    return wrapped(x) if pf.flows.spec(name).support == "circle" else x


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_inverts_at_default_depth(name: str, sizes: tuple[int, int], dtype: torch.dtype) -> None:
    flow = build(name, sizes, dtype, 0.05)
    x = on_support(name, 3 * normal(200, sizes[0], seed=1)).to(dtype)
    closed_form = pf.flows.spec(name).closed_form_inverse
    tolerance = 1e-4 if dtype == torch.float32 else 1e-10 if closed_form else 1e-8
    for there, back in (DIRECTIONS, DIRECTIONS[::-1]):
        y, log_det = getattr(flow, there)(x)
        x_back, log_det_back = getattr(flow, back)(y)
        assert on_support(name, x_back - x).abs().max() <= tolerance, there
        assert (log_det + log_det_back).abs().max() <= 10 * tolerance, there


def test_log_det_is_that_of_the_jacobian(name: str, sizes: tuple[int, int]) -> None:
    if not pf.flows.spec(name).exact_log_det:
        return
    flow = build(name, sizes, torch.float64, 0.05)
    x = on_support(name, 3 * normal(10, sizes[0], seed=1)).requires_grad_()
    for direction in DIRECTIONS:
        y, log_det = getattr(flow, direction)(x)
        expected = torch.linalg.slogdet(jacobian(y, x)).logabsdet
        tolerance = 1e-9 if pf.flows.spec(name).closed_form_inverse else 1e-6
        torch.testing.assert_close(log_det, expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_starts_near_the_identity(name: str, sizes: tuple[int, int], dtype: torch.dtype) -> None:
    flow = build(name, sizes, dtype, 0.0)
    x = on_support(name, 3 * normal(200, sizes[0], seed=1)).to(dtype)
    for direction in DIRECTIONS:
        y, log_det = getattr(flow, direction)(x)
        assert (on_support(name, y - x).abs() / (1 + x.abs())).max() < 0.1
        assert log_det.abs().max() < 0.5


@pytest.mark.parametrize("input_dim", [2, 5, 16])
def test_every_entry_moves_and_depends_on_every_other(name: str, input_dim: int) -> None:
    flow = perturb(pf.flow(name, input_dim).double(), 0.2)
    x = normal(50, input_dim, seed=1).requires_grad_()
    for direction in DIRECTIONS:
        y, _ = getattr(flow, direction)(x)
        assert (jacobian(y, x).abs().amax(0) > 1e-8).all()


def test_two_layers_move_every_entry(name: str) -> None:
    flow = perturb(registered(name, 5, num_layers=2).double(), 0.2)
    x = normal(50, 5, seed=1)
    assert ((flow(x) - x).abs().amax(0) > 1e-3).all()


def test_every_build_of_an_architecture_has_the_same_structure(name: str) -> None:
    """Orders of entries must not be random: weights would not fit another build."""
    one, other = (build(name, (6, 0), torch.float64, 0.1) for _ in range(2))
    torch.manual_seed(1)
    other = pf.flow(name, 6).double()
    other.load_state_dict(one.state_dict())
    x = normal(5, 6, seed=1)
    assert torch.equal(one(x), other(x))


def test_is_built_in_the_default_dtype(name: str) -> None:
    torch.set_default_dtype(torch.float64)
    flow = pf.flow(name, 4)
    tensors = [t for t in (*flow.parameters(), *flow.buffers()) if t.is_floating_point()]
    assert all(t.dtype == torch.float64 for t in tensors)
    for y in flow.forward_and_log_det(torch.zeros(4)):
        assert y.dtype == torch.float64


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_runs_in_half_precision(name: str, dtype: torch.dtype) -> None:
    if not pf.flows.spec(name).closed_form_inverse:
        return
    flow, x = pf.flow(name, 4).to(dtype), normal(20, 4, seed=1).to(dtype)
    for transform in (flow, flow.inv):
        y, log_det = transform.forward_and_log_det(x)
        assert y.dtype == log_det.dtype == dtype
        assert on_support(name, y - x).abs().max() < 0.1


@pytest.mark.parametrize("context_dim", [0, 3])
@pytest.mark.parametrize("input_dim", [1, 5])
def test_is_built_on_the_default_device(name: str, input_dim: int, context_dim: int) -> None:
    with torch.device("meta"):
        flow = pf.flow(name, input_dim, context_dim)
        flow = flow.condition(torch.zeros(context_dim)) if context_dim else flow
        x = torch.zeros(7, input_dim)
    assert all(t.is_meta for t in (*flow.parameters(), *flow.buffers()))
    for direction in DIRECTIONS:
        assert all(t.is_meta for t in getattr(flow, direction)(x))


def parameters_of(flow: FlowTransform) -> int:
    return sum(parameter.numel() for parameter in flow.parameters())


def test_options_reach_the_architecture(name: str) -> None:
    if takes(name, "num_layers"):
        sizes = [parameters_of(pf.flow(name, 4, num_layers=n)) for n in (2, 4)]
        assert sizes[1] > sizes[0]
    if takes(name, "hidden_dims"):
        assert any(11 in p.shape for p in pf.flow(name, 4, 3, hidden_dims=(11, 7)).parameters())
    if takes(name, "activation"):
        usual, other = pf.flow(name, 4, 3), pf.flow(name, 4, 3, activation=torch.nn.SiLU)
        kinds = [{type(module) for module in flow.modules()} for flow in (usual, other)]
        assert len(kinds[0] - kinds[1]) == 1
        assert kinds[1] - kinds[0] == {torch.nn.SiLU}
    if takes(name, "bins"):
        assert "bins=5" in repr(pf.flow(name, 4, bins=5))
    if takes(name, "bound"):
        assert "bound=2.0" in repr(pf.flow(name, 4, bound=2.0))


# Errors


def test_impossible_options_are_refused(name: str) -> None:
    refused = {
        "num_layers": [(0, "num_layers must be at least 1, got 0"), (-1, "got -1")],
        "hidden_dims": [((), r"at least one positive size, got \(\)"), ((8, 0), r"got \(8, 0\)")],
        "bins": [(1, "bins must be at least 2, got 1")],
        "bound": [(-1.0, "bound must be positive, got -1.0")],
    }
    for option, values in refused.items():
        for value, message in values:
            if takes(name, option):
                with pytest.raises(ValueError, match=message):
                    pf.flow(name, 4, 3, **{option: value})


def test_impossible_sizes_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="input_dim must be at least 1, got 0"):
        pf.flow(name, 0)
    with pytest.raises(ValueError, match="context_dim must be at least 0, got -1"):
        pf.flow(name, 4, -1)


def test_an_unknown_option_is_refused(name: str) -> None:
    with pytest.raises(TypeError, match="num_leyers"):
        pf.flow(name, 4, num_leyers=3)


def test_an_unknown_name_is_refused_with_the_names_there_are() -> None:
    for ask in (lambda: pf.flow("realvnp", 4), lambda: pf.flows.spec("realvnp")):
        with pytest.raises(ValueError, match="unknown flow 'realvnp'") as error:
            ask()
        assert all(name in str(error.value) for name in NAMES)


# The registry


@pytest.fixture
def mirrored() -> Iterator[str]:
    def mirror(input_dim: int, context_dim: int = 0) -> FlowTransform:
        return pf.transforms.permute(input_dim, range(input_dim)[::-1])

    pf.register_flow(FlowSpec("mirrored", mirror, True, True, paper=""))
    yield "mirrored"
    del pf.flows.registry._registry["mirrored"]


def test_a_registered_flow_can_be_built(mirrored: str) -> None:
    assert mirrored in pf.flows.names()
    assert pf.flow(mirrored, 3)(torch.arange(3.0)).tolist() == [2.0, 1.0, 0.0]


def test_a_name_is_registered_once(mirrored: str) -> None:
    spec = pf.flows.spec(mirrored)
    with pytest.raises(ValueError, match="'mirrored' is registered already"):
        pf.register_flow(spec)


def test_names_are_sorted_and_complete() -> None:
    assert sorted(NAMES) == NAMES
    assert {"iaf", "maf", "nice", "realnvp", "spline_autoregressive", "spline_coupling"} <= {*NAMES}


def test_the_registry_tells_what_it_holds(name: str) -> None:
    spec = pf.flows.spec(name)
    assert spec.name == name
    assert spec.paper
    assert all(
        isinstance(promise, bool)
        for promise in (
            spec.fast_forward,
            spec.fast_inverse,
            spec.exact_log_det,
            spec.closed_form_inverse,
        )
    )
