"""What each transform is, how transforms combine, and how they fit into Pyro code."""

import inspect
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.nn import PyroModule
from pyro.optim import ClippedAdam
from torch import Tensor
from torch.distributions import ComposeTransform, SigmoidTransform

import pyroflows as pf
from pyroflows import transforms
from pyroflows.transforms import (
    Affine,
    Autoregressive,
    Chain,
    CircularSpline,
    Compose,
    Coupling,
    DiagonalAffine,
    Elementwise,
    FlowTransform,
    Inverse,
    Permutation,
    ScalarBijection,
    Scale,
    Shift,
    Spline,
    TriangularAffine,
)
from tests.batteries import BIJECTIONS, coupling, jacobian, normal, perturb, stack, wrapped

FACTORIES = sorted(
    {name for name in transforms.__all__ if name.islower()} - {"initialize_from_data"}
)
CONDITIONAL = [name for name in FACTORIES if name.startswith("conditional_")]
UNCONDITIONAL = [name for name in FACTORIES if name not in CONDITIONAL]
IN_PYRO = [name for name in FACTORIES if hasattr(dist.transforms, name)]
LAYERS = (Coupling, Autoregressive, Elementwise)


def standard_normal(size: int) -> dist.Distribution:
    return dist.Normal(torch.zeros(size), 1.0).to_event(1)


# The contract's author writes two methods and nothing else


class Double(FlowTransform):
    """Double each entry, and count the work."""

    def __init__(self, input_dim: int, cache_size: int = 1) -> None:
        super().__init__(input_dim, cache_size=cache_size)
        self.calls = 0

    def forward_and_log_det(self, x: Tensor) -> tuple[Tensor, Tensor]:
        self.calls += 1
        return 2 * x, torch.full_like(x, 2.0).log().sum(-1)

    def inverse_and_log_det(self, y: Tensor) -> tuple[Tensor, Tensor]:
        self.calls += 1
        return y / 2, -torch.full_like(y, 2.0).log().sum(-1)


def test_a_remembered_pair_costs_nothing() -> None:
    flow, x = Double(3), torch.randn(5, 3)
    y = flow(x)
    flow.inv(y), flow(x), flow.inv.inv(x)
    flow.log_abs_det_jacobian(x, y), flow.inv.log_abs_det_jacobian(y, x)
    assert flow.calls == 1


def test_a_flow_built_without_a_cache_remembers_nothing() -> None:
    flow, x = Double(3, cache_size=0), torch.randn(5, 3)
    flow(x), flow(x)
    assert flow.calls == 2


def test_an_unfinished_flow_names_what_is_missing() -> None:
    class Unfinished(FlowTransform):
        pass

    with pytest.raises(NotImplementedError, match="Unfinished does not define forward_and_log_det"):
        Unfinished(3)(torch.zeros(3))
    with pytest.raises(NotImplementedError, match="Unfinished does not define inverse_and_log_det"):
        Unfinished(3).inv(torch.zeros(3))


@pytest.mark.parametrize("size", [0, -1, ()])
def test_an_impossible_size_is_refused(size: Any) -> None:
    with pytest.raises(ValueError, match=r"input_dim must be at least 1, got"):
        Double(size)


@pytest.mark.parametrize("layer", LAYERS)
def test_a_negative_context_size_is_refused(layer: type) -> None:
    with pytest.raises(ValueError, match="context_dim must be at least 0, got -1"):
        layer(Affine(), 3, -1)


# Scalar bijections


@pytest.mark.parametrize(
    ("bijection", "parameters", "expected"),
    [
        (Shift(), [0.5], 2.5),
        (Scale(), [3 * 0.549306], 2.0 * 4.481689),  # 3 tanh(atanh(1/2)) = 1.5
        (Affine(), [0.5, 3 * 0.549306], 2.0 * 4.481689 + 0.5),
    ],
    ids=["Shift", "Scale", "Affine"],
)
def test_a_scalar_bijection_is_its_formula(
    bijection: ScalarBijection, parameters: list[float], expected: float
) -> None:
    x, raw = torch.tensor([2.0]), torch.tensor(parameters).unsqueeze(-1)
    y, log_derivative = bijection.forward(x, raw)
    torch.testing.assert_close(y, torch.tensor([expected]), rtol=1e-5, atol=0)
    slope = 1.5 if len(parameters) > 1 or expected > 3 else 0.0
    torch.testing.assert_close(log_derivative, torch.tensor([slope]), rtol=1e-5, atol=0)


@pytest.mark.parametrize("bijection", BIJECTIONS)
def test_zero_parameters_mean_the_identity(bijection: ScalarBijection) -> None:
    x = 3 * normal(100, seed=1)
    x = wrapped(x) if isinstance(bijection, CircularSpline) else x
    y, log_derivative = bijection.forward(x, torch.zeros(bijection.num_parameters, 100).double())
    torch.testing.assert_close(y, x, rtol=0, atol=1e-12)
    torch.testing.assert_close(log_derivative, torch.zeros_like(x), rtol=0, atol=1e-12)


@pytest.mark.parametrize("bijection", [Scale(), Affine()])
def test_extreme_scales_stay_bounded_with_live_gradients(bijection: ScalarBijection) -> None:
    raw = torch.tensor([-9.0, 9.0]).expand(bijection.num_parameters, 2).clone().requires_grad_()
    y, log_scale = bijection.forward(torch.ones(2), raw)
    assert log_scale.abs().max() < 3.0
    (gradient,) = torch.autograd.grad(log_scale.sum(), raw)
    assert (gradient[-1] > 1e-3).all()
    x, _ = bijection.inverse(y, raw)
    torch.testing.assert_close(x, torch.ones(2), rtol=0, atol=1e-4)


def test_a_chain_applies_its_bijections_in_order() -> None:
    chain, x, raw = Chain(Affine(), Spline(), Shift()), normal(50, seed=1), normal(26, 50, seed=2)
    y, slope = Affine().forward(x, raw[:2])
    y, next_slope = Spline().forward(y, raw[2:25])
    expected = y + raw[25], slope + next_slope
    torch.testing.assert_close(chain.forward(x, raw), expected)
    back, inverse_slope = chain.inverse(expected[0], raw)
    torch.testing.assert_close((back, inverse_slope), (x, -expected[1]))


def test_a_chain_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one scalar bijection, got none"):
        Chain()


# Coupling


@pytest.mark.parametrize("swap", [False, True])
def test_a_coupling_moves_one_part_as_the_other_says(swap: bool) -> None:
    flow = perturb(Coupling(Shift(), 5, hidden_dims=(8,), split_dim=2, swap=swap), 0.5)
    first = torch.tensor([True, True, False, False, False])
    kept = ~first if swap else first
    x = torch.randn(10, 5, requires_grad=True)
    assert torch.equal((flow(x) != x).any(0), ~kept)
    reads = jacobian(flow(x) - x, x).abs().amax(0) > 0
    assert torch.equal(reads.any(0), kept)
    assert torch.equal(reads.any(1), ~kept)


@pytest.mark.parametrize("split_dim", [-1, 0, 4, 5])
def test_a_split_that_leaves_a_part_empty_is_refused(split_dim: int) -> None:
    with pytest.raises(ValueError, match=rf"split_dim .*got {split_dim} of input_dim 4"):
        Coupling(Affine(), 4, split_dim=split_dim)


def test_a_context_alone_can_drive_a_coupling() -> None:
    flow = perturb(Coupling(Affine(), 4, 3, split_dim=0), 0.1).condition(torch.ones(3))
    x = torch.randn(10, 4)
    assert (flow(x) != x).all()


@pytest.mark.parametrize("layer", [Coupling, Autoregressive])
def test_a_single_entry_without_a_context_is_refused(layer: type) -> None:
    with pytest.raises(ValueError, match=r"input_dim.* 1"):
        layer(Affine(), 1)


# Autoregression


@pytest.mark.parametrize("order", [None, [2, 0, 3, 1]])
@pytest.mark.parametrize("turned", [False, True], ids=["forward", "inverse"])
def test_each_entry_depends_on_those_before_it(order: list[int] | None, turned: bool) -> None:
    flow = perturb(Autoregressive(Affine(), 4, hidden_dims=(12, 12), order=order), 0.5)
    flow = flow.inv if turned else flow
    x = torch.randn(20, 4, requires_grad=True)
    depends = jacobian(flow(x), x).abs().amax(0) > 0
    order = order or [0, 1, 2, 3]
    assert torch.equal(depends[order][:, order], torch.ones(4, 4).tril().bool())


def test_every_entry_depends_on_the_context() -> None:
    flow = perturb(Autoregressive(Affine(), 4, 3, hidden_dims=(12, 12)), 0.5)
    context = torch.randn(20, 3, requires_grad=True)
    y, _ = flow.forward_and_log_det(torch.zeros(20, 4), context)
    assert (jacobian(y, context).abs().amax(0) > 0).all()


@pytest.mark.parametrize("order", [[0, 0, 1], [0, 1], [1, 2, 3]])
def test_an_order_that_is_no_permutation_is_refused(order: list[int]) -> None:
    message = rf"order must be a permutation of 0 \.\. 2, got \[{', '.join(map(str, order))}\]"
    with pytest.raises(ValueError, match=message):
        Autoregressive(Affine(), 3, order=order)


@pytest.mark.parametrize("hidden_dims", [(), (8, 0)])
@pytest.mark.parametrize("layer", LAYERS)
def test_hidden_layers_of_no_size_are_refused(layer: type, hidden_dims: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"hidden_dims must hold at least one .*got \("):
        layer(Affine(), 3, 2, hidden_dims=hidden_dims)


# Linear maps


def test_a_permutation_reorders() -> None:
    x = torch.tensor([[10.0, 20.0, 30.0]])
    flow = Permutation([2, 0, 1])
    assert flow(x).tolist() == [[30.0, 10.0, 20.0]]
    assert flow.inv(x).tolist() == [[20.0, 30.0, 10.0]]


def test_a_permutation_is_part_of_the_state() -> None:
    x = torch.randn(5, 4)
    flow, other = (Compose([coupling(4), transforms.permute(4, p)]) for p in ([3, 1, 0, 2], None))
    assert any("permutation" in key for key in flow.state_dict())
    other.load_state_dict(flow.state_dict())
    assert torch.equal(other(x), flow(x))
    torch.testing.assert_close(other.inv(x), flow.inv(x))
    assert all(buffer.is_meta for buffer in flow.to("meta").buffers())
    assert flow(x.to("meta")).is_meta


def test_a_random_permutation_is_one() -> None:
    assert sorted(transforms.permute(10)(torch.arange(10.0)).tolist()) == list(range(10))


@pytest.mark.parametrize("permutation", [[0, 0, 1], [1, 2, 3]])
def test_a_permutation_that_is_none_is_refused(permutation: list[int]) -> None:
    message = rf"permutation of 0 \.\. 2, got \[{', '.join(map(str, permutation))}\]"
    with pytest.raises(ValueError, match=message):
        Permutation(permutation)


def test_a_triangular_affine_map_is_its_matrix() -> None:
    loc, matrix, x = normal(3, seed=1), normal(3, 3, seed=2).tril(), normal(5, 3, seed=3)
    matrix.diagonal().abs_()
    flow = TriangularAffine(loc, matrix + torch.ones(3, 3).triu(1))
    torch.testing.assert_close(flow(x), loc + x @ matrix.T)
    assert all(parameter.dtype == torch.float64 for parameter in flow.parameters())


def test_a_diagonal_affine_map_is_its_formula() -> None:
    loc, scale, x = normal(3, seed=1), normal(3, seed=2).exp(), normal(5, 3, seed=3)
    flow = DiagonalAffine(loc, scale)
    torch.testing.assert_close(flow(x), loc + scale * x)
    assert all(parameter.dtype == torch.float64 for parameter in flow.parameters())


@pytest.mark.parametrize("layer", [TriangularAffine, DiagonalAffine])
def test_an_affine_map_can_be_set_anew(layer: type) -> None:
    loc, scale, x = normal(3, seed=1), normal(3, 3, seed=2).tril(), normal(5, 3, seed=3)
    scale.diagonal().abs_()
    start = torch.eye(3).double()
    if layer is DiagonalAffine:
        scale, start = scale.diagonal(), start.diagonal()
    flow = perturb(layer(loc, start), 0.5)
    with torch.no_grad():
        flow(x)
    flow.set_frame(loc, scale)
    expected = layer(loc, scale)
    torch.testing.assert_close(flow(x), expected(x))
    torch.testing.assert_close(flow.inv(x), expected.inv(x))
    for direction in ("forward_and_log_det", "inverse_and_log_det"):
        answers = getattr(flow, direction)(x), getattr(expected, direction)(x)
        torch.testing.assert_close(*answers)


@pytest.mark.parametrize("entry", [-0.25, 0.0])
def test_a_diagonal_that_is_not_positive_is_refused(entry: float) -> None:
    scale = torch.tensor([1.0, entry])
    with pytest.raises(ValueError, match=rf"scale_tril .*positive diagonal.*{entry}"):
        TriangularAffine(torch.zeros(2), scale.diag())
    with pytest.raises(ValueError, match=rf"scale must be positive.*{entry}"):
        DiagonalAffine(torch.zeros(2), scale)


def test_affine_arguments_of_different_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\(D,\).*\(D, D\), got \(2,\) and \(3, 3\)"):
        TriangularAffine(torch.zeros(2), torch.eye(3))
    with pytest.raises(ValueError, match=r"shape \(D,\).*got \(2,\) and \(3,\)"):
        DiagonalAffine(torch.zeros(2), torch.ones(3))


# Composition


def test_a_stack_holds_every_part() -> None:
    parts = [coupling(4), Permutation([3, 2, 1, 0]), coupling(4).inv]
    flow = Compose(parts)
    assert len(flow) == 3
    assert list(flow) == parts
    assert [flow[i] for i in range(3)] == parts
    assert flow[-1] is parts[-1]
    assert isinstance(flow[1:], Compose)
    assert list(flow[1:]) == parts[1:]
    with pytest.raises(IndexError):
        flow[3]


def test_a_stack_applies_its_parts_in_order() -> None:
    flow, x = stack().double(), normal(5, 4, seed=1)
    context = normal(5, 3, seed=2)
    y, total = x, torch.zeros(5).double()
    for part in flow:
        part = part.condition(context) if part.context_dim else part
        total = total + part.log_abs_det_jacobian(y, part(y))
        y = part(y)
    answer, log_det = flow.forward_and_log_det(x, context)
    torch.testing.assert_close(answer, y)
    torch.testing.assert_close(log_det, total)


def test_a_slice_shares_parameters() -> None:
    flow = Compose([coupling(4), coupling(4), coupling(4)])
    assert {id(p) for p in flow[:2].parameters()} < {id(p) for p in flow.parameters()}


def test_a_stack_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one flow, got none"):
        Compose([])


def test_parts_of_different_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"agree in event_shape, got \[\(2,\), \(3,\)\]"):
        Compose([coupling(3), coupling(2)])
    with pytest.raises(ValueError, match=r"agree in context_dim, got \[1, 2\]"):
        Compose([coupling(3, 2), coupling(3), coupling(3, 1)])


def test_a_context_is_bound_without_a_copy_of_the_flow() -> None:
    flow = coupling(4, 3)
    one, other = (flow.condition(torch.full((3,), value)) for value in (0.0, 1.0))
    x = torch.randn(5, 4)
    before = one(x), other(x)
    perturb(flow, 0.5)
    assert not torch.equal(one(x), before[0])
    assert not torch.equal(other(x), before[1])
    assert torch.equal(one(x), flow.condition(torch.zeros(3))(x))


def test_a_context_moves_with_its_flow() -> None:
    conditioned = coupling(4, 3).condition(torch.zeros(3))
    assert conditioned.double()(normal(5, 4, seed=1)).dtype == torch.float64
    assert conditioned.to("meta")(torch.zeros(5, 4, device="meta")).is_meta


# Factories


@pytest.fixture(params=UNCONDITIONAL)
def factory(request: pytest.FixtureRequest) -> Callable[..., FlowTransform]:
    return getattr(transforms, request.param)


@pytest.fixture(params=CONDITIONAL)
def conditional(request: pytest.FixtureRequest) -> Callable[..., FlowTransform]:
    return getattr(transforms, request.param)


def test_factories_come_in_pairs() -> None:
    expected = {f"conditional_{name}" for name in UNCONDITIONAL} - {"conditional_permute"}
    assert set(CONDITIONAL) == expected


@pytest.mark.parametrize("name", IN_PYRO)
def test_a_factory_takes_the_arguments_of_the_one_in_pyro(name: str) -> None:
    """Positional arguments mean the same, up to the first that has no meaning here."""
    not_offered = {"dim", "order", "kwargs"}
    theirs = [
        parameter
        for parameter in inspect.signature(getattr(dist.transforms, name)).parameters
        if parameter not in not_offered
    ]
    ours = [
        parameter.name
        for parameter in inspect.signature(getattr(transforms, name)).parameters.values()
        if parameter.kind is parameter.POSITIONAL_OR_KEYWORD
    ]
    assert ours[: len(theirs)] == theirs


def test_a_factory_drops_into_pyro(factory: Callable[..., FlowTransform]) -> None:
    transform = factory(4)
    distribution = dist.TransformedDistribution(standard_normal(4), [transform])
    x = distribution.rsample((7,))
    log_prob = distribution.log_prob(x)
    assert log_prob.shape == (7,)
    z, log_det = transform.inverse_and_log_det(x)
    torch.testing.assert_close(log_prob, standard_normal(4).log_prob(z) + log_det)
    pyro.module("flow", transform)
    assert len(pyro.get_param_store()) == len(list(transform.parameters()))


def test_a_conditional_factory_drops_into_pyro(conditional: Callable[..., FlowTransform]) -> None:
    transform, context = conditional(4, 3), torch.randn(7, 3)
    distribution = dist.ConditionalTransformedDistribution(standard_normal(4), [transform])
    conditioned = distribution.condition(context)
    x = conditioned.rsample()
    log_prob = conditioned.log_prob(x)
    assert log_prob.shape == (7,)
    z, log_det = transform.inverse_and_log_det(x, context)
    torch.testing.assert_close(log_prob, standard_normal(4).log_prob(z) + log_det)


def test_a_conditioned_factory_drops_into_pyro(conditional: Callable[..., FlowTransform]) -> None:
    transform, context = conditional(4, 3), torch.randn(7, 3)
    distribution = dist.TransformedDistribution(
        standard_normal(4), [transform.condition(context), transform.condition(context).inv]
    )
    assert distribution.batch_shape == (7,)
    z = standard_normal(4).sample((7,))
    torch.testing.assert_close(
        distribution.log_prob(z), standard_normal(4).log_prob(z), rtol=0, atol=1e-4
    )


def test_a_factory_refuses_empty_hidden_dims(conditional: Callable[..., FlowTransform]) -> None:
    with pytest.raises(ValueError, match="hidden_dims must hold at least one"):
        conditional(4, 3, hidden_dims=())


# Pyro and torch


def test_composes_with_transforms_of_torch() -> None:
    flow, x = perturb(coupling(4), 0.1).double(), normal(5, 4, seed=1)
    transform = ComposeTransform([flow, SigmoidTransform(), SigmoidTransform().inv, flow.inv])
    y = transform(x)
    torch.testing.assert_close(y, x)
    log_det = transform.log_abs_det_jacobian(x, y)
    torch.testing.assert_close(log_det, torch.zeros(5).double(), rtol=0, atol=1e-9)
    torch.testing.assert_close(transform.inv(y), x)
    assert transform.domain.event_dim == transform.codomain.event_dim == 1


def test_a_flow_onto_the_unit_cube_is_a_distribution() -> None:
    flow = perturb(coupling(4), 0.5)
    distribution = dist.TransformedDistribution(standard_normal(4), [flow, SigmoidTransform()])
    x = distribution.rsample((7,))
    assert ((x > 0) & (x < 1)).all()
    z, log_det = flow.inverse_and_log_det(x.logit())
    expected = standard_normal(4).log_prob(z) + log_det - (x * (1 - x)).log().sum(-1)
    torch.testing.assert_close(distribution.log_prob(x), expected, rtol=1e-4, atol=1e-4)


def test_a_torch_stack_of_flows_equals_ours() -> None:
    parts = [perturb(coupling(4), 0.5), Permutation([3, 2, 1, 0]), perturb(coupling(4), 0.5)]
    x = torch.randn(5, 4)
    ours = dist.TransformedDistribution(standard_normal(4), [Compose(parts)])
    for transform in (ComposeTransform(parts), dist.ComposeTransformModule(parts)):
        theirs = dist.TransformedDistribution(standard_normal(4), [transform])
        torch.testing.assert_close(ours.log_prob(x), theirs.log_prob(x))


def test_iterated_repeats_a_factory() -> None:
    flow = dist.transforms.iterated(3, transforms.affine_coupling, 4)
    assert len(list(flow.parameters())) == 3 * len(list(transforms.affine_coupling(4).parameters()))
    x = torch.randn(5, 4)
    torch.testing.assert_close(flow.inv(flow(x)), x)


@pytest.mark.parametrize("wrap", [lambda f: f, lambda f: f.inv, lambda f: Compose([f])])
def test_a_distribution_clears_the_cache(wrap: Callable[[FlowTransform], FlowTransform]) -> None:
    flow, x = wrap(Double(4)), torch.randn(5, 4)
    y = flow(x)
    assert flow(x) is y
    dist.TransformedDistribution(standard_normal(4), [flow]).clear_cache()
    assert flow(x) is not y


def test_a_density_is_fresh_after_a_step_of_pyro() -> None:
    """Validates between steps of Pyro's optimizer, which edits ``parameter.data``."""
    flow, held_out, data = coupling(4), torch.randn(5, 4), torch.randn(20, 4)
    density = dist.TransformedDistribution(standard_normal(4), [flow])
    optimizer = ClippedAdam({"lr": 0.1})
    with torch.no_grad():
        before = density.log_prob(held_out)
    z, log_det = flow.inverse_and_log_det(data)
    (-standard_normal(4).log_prob(z) - log_det).mean().backward()
    optimizer(flow.parameters())
    with torch.no_grad():
        after = density.log_prob(held_out)
        z, log_det = flow.inverse_and_log_det(held_out)
    torch.testing.assert_close(after, standard_normal(4).log_prob(z) + log_det)
    assert not torch.allclose(before, after)


class Density(PyroModule):
    """Fit a flow that is an attribute of a Pyro module to data."""

    def __init__(self) -> None:
        super().__init__()
        self.flow = pf.flow("realnvp", 2, num_layers=2, hidden_dims=(8,))

    def forward(self, data: Tensor) -> Tensor:
        with pyro.plate("data", len(data)):
            return pyro.sample("x", pf.Flow(standard_normal(2), self.flow), obs=data)


@pytest.mark.parametrize("loss", [pyro.infer.Trace_ELBO, pyro.infer.JitTrace_ELBO])
def test_trains_as_an_attribute_of_a_pyro_module(loss: type) -> None:
    model, data = Density(), 2 * torch.randn(100, 2) + 1
    options = {"ignore_jit_warnings": True} if loss is pyro.infer.JitTrace_ELBO else {}
    svi = pyro.infer.SVI(model, lambda data: None, ClippedAdam({"lr": 0.03}), loss(**options))
    losses = [svi.step(data) for _ in range(40)]
    assert losses[-1] < losses[0] - 20
    assert len(pyro.get_param_store()) == len(list(model.parameters()))
    expected = -pf.Flow(standard_normal(2), model.flow).log_prob(data).sum()
    assert svi.evaluate_loss(data) == pytest.approx(expected.item(), rel=1e-4)


def test_a_flow_works_under_vmap_and_jacrev() -> None:
    flow, x = perturb(coupling(4), 0.5).double(), normal(5, 4, seed=1)
    y, log_det = flow.forward_and_log_det(x)
    torch.testing.assert_close(torch.func.vmap(flow)(x), y)
    slogdet = torch.linalg.slogdet(torch.func.vmap(torch.func.jacrev(flow))(x)).logabsdet
    torch.testing.assert_close(slogdet, log_det)
    assert torch.equal(flow(x), y)


def test_the_inverse_of_an_inverse_is_the_flow() -> None:
    flow = coupling(4)
    assert Inverse(flow).inv is flow
    assert flow.inv.inv is flow
