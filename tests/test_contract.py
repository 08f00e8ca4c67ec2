"""What every flow promises, tested on every registered flow and every transform."""

import copy
import io
import pickle
import re
from collections.abc import Callable

import pytest
import torch
from pyro.optim.clipped_adam import ClippedAdam
from torch import Tensor, nn
from torch.func import functional_call

from pyroflows import transforms
from pyroflows.transforms import FlowTransform, ScalarBijection
from tests.batteries import (
    BATCH_SHAPES,
    BIJECTIONS,
    CASES,
    KINDS,
    PRODUCTS,
    Case,
    normal,
    over,
    perturb,
)

DIRECTIONS = ("forward_and_log_det", "inverse_and_log_det")

SETTINGS = [(dtype, noise) for dtype in (torch.float32, torch.float64) for noise in (0.0, 0.1)]


@pytest.fixture(**over(CASES))
def case(request: pytest.FixtureRequest) -> Case:
    return request.param


@pytest.fixture(**over(case for case in CASES if case.exact_log_det))
def exact(request: pytest.FixtureRequest) -> Case:
    return request.param


@pytest.fixture(**over(KINDS))
def kind(request: pytest.FixtureRequest) -> Case:
    return request.param


@pytest.fixture(**over([*KINDS, *(case for case in PRODUCTS if case not in KINDS)]))
def piece(request: pytest.FixtureRequest) -> Case:
    return request.param


@pytest.fixture(**over(case for case in KINDS if any(True for _ in case.bound().parameters())))
def trainable(request: pytest.FixtureRequest) -> Case:
    return request.param


@pytest.fixture(**over(case for case in KINDS if case.traceable))
def traceable(request: pytest.FixtureRequest) -> Case:
    return request.param


@pytest.fixture(**over(case for case in CASES if case.near_identity))
def untrained(request: pytest.FixtureRequest) -> Case:
    return request.param


@pytest.fixture(**over(case for case in CASES if case.context_dim))
def conditional(request: pytest.FixtureRequest) -> Case:
    return request.param


def test_every_exported_transform_is_a_case() -> None:
    exported = {getattr(transforms, name) for name in transforms.__all__}
    exported = {e for e in exported if isinstance(e, type) and issubclass(e, FlowTransform)}
    tested = {type(part) for case in CASES for part in case.bound().modules()}
    assert exported - {FlowTransform} <= tested


def test_every_exported_scalar_bijection_is_a_case() -> None:
    exported = {getattr(transforms, name) for name in transforms.__all__}
    exported = {e for e in exported if isinstance(e, type) and issubclass(e, ScalarBijection)}
    assert exported - {ScalarBijection} <= {type(bijection) for bijection in BIJECTIONS}


# Numbers


def test_inverse_undoes_forward_and_forward_undoes_inverse(case: Case) -> None:
    for dtype, noise in SETTINGS:
        flow, x = case.bound(dtype, noise), case.inputs(50, dtype=dtype)
        for direction, opposite in (DIRECTIONS, DIRECTIONS[::-1]):
            there, _ = getattr(flow, direction)(x)
            back, _ = getattr(flow, opposite)(there)
            assert back.dtype == dtype
            assert (back - x).abs().max() <= case.round_trip[dtype], (dtype, noise, direction)


def test_log_det_is_that_of_the_jacobian(exact: Case) -> None:
    for dtype, noise in SETTINGS:
        flow, x = exact.bound(dtype, noise), exact.inputs(10, dtype=dtype).requires_grad_()
        for direction in DIRECTIONS:
            y, log_det = getattr(flow, direction)(x)
            error = log_det - torch.linalg.slogdet(exact.jacobian(y, x)).logabsdet
            assert log_det.dtype == dtype
            assert error.abs().max() <= exact.log_det[dtype], (dtype, noise, direction)


def test_the_jacobian_of_the_inverse_is_the_inverse_jacobian(case: Case) -> None:
    flow, x = case.bound(noise=0.5), case.inputs(10, scale=1.0).requires_grad_()
    y, _ = flow.forward_and_log_det(x)
    image = y.detach().requires_grad_()
    back, _ = flow.inverse_and_log_det(image)
    product = case.jacobian(back, image) @ case.jacobian(y, x)
    expected = torch.eye(case.size).double().expand_as(product)
    torch.testing.assert_close(product, expected, rtol=0, atol=case.within(1e-8))


def test_log_det_of_the_inverse_is_minus_that_of_forward(exact: Case) -> None:
    for dtype, noise in SETTINGS:
        flow = exact.bound(dtype, noise)
        y, forward = flow.forward_and_log_det(exact.inputs(50, dtype=dtype))
        _, inverse = flow.inverse_and_log_det(y)
        assert (forward + inverse).abs().max() <= exact.log_det[dtype], (dtype, noise)


def test_values_are_the_same_without_gradients(case: Case) -> None:
    flow, x = case.bound(), case.inputs(20)
    for direction in DIRECTIONS:
        with_gradients = getattr(flow, direction)(x)
        with torch.no_grad():
            without = getattr(flow, direction)(x)
        assert not any(t.requires_grad for t in without)
        torch.testing.assert_close(with_gradients, without, rtol=0, atol=case.within(1e-12))


def test_starts_near_the_identity(untrained: Case) -> None:
    x = untrained.inputs(200, scale=1.0)
    for direction in DIRECTIONS:
        y, log_det = getattr(untrained.bound(noise=0.0), direction)(x)
        assert (y - x).abs().max() < 0.1
        assert log_det.abs().max() < 0.1


def test_leaves_its_input_alone(kind: Case) -> None:
    flow, x = kind.bound(), kind.inputs(5)
    before = x.clone()
    for direction in DIRECTIONS:
        y, _ = getattr(flow, direction)(x)
        y.detach().add_(1.0)
        assert torch.equal(x, before)


def test_reads_inputs_of_any_memory_layout(kind: Case) -> None:
    flow, x = kind.bound(), kind.inputs(5, 3)
    strided = x.movedim(-1, 0).contiguous().movedim(0, -1)
    assert not strided.is_contiguous()
    for direction in DIRECTIONS:
        method = getattr(flow, direction)
        torch.testing.assert_close(method(strided), method(x), rtol=0, atol=kind.within(1e-12))


# Shapes


def test_maps_each_event_of_a_batch_by_itself(case: Case) -> None:
    flow, events = case.bound(), case.inputs(12)
    for direction in DIRECTIONS:
        method = getattr(flow, direction)
        alone = [torch.stack(answers) for answers in zip(*map(method, events))]
        for batch in BATCH_SHAPES:
            size = torch.Size(batch).numel()
            y, log_det = method(events[:size].reshape(*batch, *case.event_shape))
            expected = (
                alone[0][:size].reshape(*batch, *case.event_shape),
                alone[1][:size].reshape(batch),
            )
            torch.testing.assert_close((y, log_det), expected, rtol=0, atol=case.within(1e-12))


def test_an_empty_batch_has_zero_gradients(trainable: Case) -> None:
    flow = trainable.bound()
    for direction in DIRECTIONS:
        y, log_det = getattr(flow, direction)(trainable.inputs(0))
        gradients = torch.autograd.grad(
            y.sum() + log_det.sum(), list(flow.parameters()), materialize_grads=True
        )
        assert all(torch.equal(g, torch.zeros_like(g)) for g in gradients)


@pytest.mark.parametrize(
    ("batch", "context_batch"),
    [((), (3,)), ((3,), ()), ((2, 1), (3,)), ((4, 1, 3), (2, 1)), ((0,), ()), ((), (0,))],
    ids=str,
)
def test_context_broadcasts_against_the_batch(
    conditional: Case, batch: tuple[int, ...], context_batch: tuple[int, ...]
) -> None:
    flow = conditional.flow()
    x, context = conditional.inputs(*batch), conditional.context(*context_batch)
    joint = torch.broadcast_shapes(batch, context_batch)
    full_x = x.expand(*joint, *conditional.event_shape).contiguous()
    full_context = context.expand(*joint, context.shape[-1]).contiguous()
    for direction in DIRECTIONS:
        y, log_det = getattr(flow.condition(context), direction)(x)
        assert y.shape == (*joint, *conditional.event_shape)
        assert log_det.shape == joint
        expected = getattr(flow, direction)(full_x, full_context)
        torch.testing.assert_close((y, log_det), expected, rtol=0, atol=conditional.within(1e-12))


def test_the_context_matters(conditional: Case) -> None:
    flow, x = conditional.flow(), conditional.inputs()
    one, other = (flow.condition(conditional.context(seed=seed))(x) for seed in (5, 6))
    assert not torch.allclose(one, other)


def test_a_wrong_trailing_size_is_refused(kind: Case) -> None:
    flow, shape = kind.bound(), kind.event_shape
    larger = (*shape[:-1], shape[-1] + 1)
    for wrong in ((7, *larger), larger, ()):
        message = f"{re.escape(str(shape))}.*{re.escape(str(wrong))}"
        for method in (flow, flow.inv, flow.forward_and_log_det, flow.inverse_and_log_det):
            with pytest.raises(ValueError, match=message):
                method(torch.zeros(wrong, dtype=torch.float64))


def test_a_missing_context_is_refused(conditional: Case) -> None:
    flow, x = conditional.flow(), conditional.inputs(7)
    for method in (flow, flow.inv, flow.forward_and_log_det, flow.inverse_and_log_det):
        with pytest.raises(
            ValueError, match=rf"needs a context of size {conditional.context_dim}, got none"
        ):
            method(x)


def test_an_unexpected_context_is_refused(kind: Case) -> None:
    flow, x, context = kind.bound(), kind.inputs(7), torch.zeros(7, 2, dtype=torch.float64)
    message = r"takes no context \(context_dim=0\), got one of shape \(7, 2\)"
    with pytest.raises(ValueError, match=message):
        flow.condition(context)
    for direction in DIRECTIONS:
        with pytest.raises(ValueError, match=message):
            getattr(flow, direction)(x, context)


def test_a_context_of_the_wrong_size_is_refused(conditional: Case) -> None:
    flow, x, size = conditional.flow(), conditional.inputs(7), conditional.context_dim
    context = torch.zeros(7, size + 1, dtype=torch.float64)
    message = rf"context of trailing size {size}, got a context of shape \(7, {size + 1}\)"
    with pytest.raises(ValueError, match=message):
        flow.condition(context)
    for direction in DIRECTIONS:
        with pytest.raises(ValueError, match=message):
            getattr(flow, direction)(x, context)


def test_batches_that_do_not_broadcast_are_refused(conditional: Case) -> None:
    flow = conditional.flow().condition(conditional.context(2))
    for method in (flow, flow.inv, flow.forward_and_log_det, flow.inverse_and_log_det):
        with pytest.raises(ValueError, match=r"\(5, 3\).*\(2,\)"):
            method(conditional.inputs(5, 3))


# Gradients


class Direction(nn.Module):
    """Make one direction of a flow a function of inputs and parameters."""

    def __init__(self, flow: FlowTransform, direction: str) -> None:
        super().__init__()
        self.flow = flow
        self.direction = direction

    def forward(self, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        return getattr(self.flow, self.direction)(*inputs)

    def as_function(self, *variables: Tensor) -> tuple[Tensor, Tensor]:
        parameters = dict(self.named_parameters())
        size = len(variables) - len(parameters)
        return functional_call(self, dict(zip(parameters, variables[size:])), variables[:size])

    def variables(self, case: Case, *batch: int, seed: int) -> tuple[Tensor, ...]:
        context = (case.context(*batch, seed=seed + 1),) if self.flow.context_dim else ()
        inputs = (case.inputs(*batch, seed=seed), *context, *self.parameters())
        return tuple(t.detach().clone().requires_grad_() for t in inputs)


def has_no_effect(case: Case, parameter: str) -> bool:
    """Tell the parameters that nothing can depend on: what a mask hides from a single entry."""
    if case.size > 1:
        return False
    return (case.name.startswith("Autoregressive") and "layers.0.weight" in parameter) or (
        case.name.startswith("TriangularAffine") and "below_diagonal" in parameter
    )


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_gradients_match_finite_differences(piece: Case, direction: str) -> None:
    """Checks inputs, the context and all parameters, by random projections of the Jacobian."""
    module = Direction(piece.flow(noise=0.5), direction)
    variables = module.variables(piece, 2, seed=1)
    assert torch.autograd.gradcheck(module.as_function, variables, fast_mode=True)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_every_parameter_receives_a_gradient(case: Case, direction: str) -> None:
    flow = case.bound()
    y, _ = getattr(flow, direction)(case.inputs(20))
    if y.requires_grad:
        (y * normal(*y.shape, seed=9)).sum().backward()
    for name, parameter in flow.named_parameters():
        if has_no_effect(case, name):
            continue
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
        assert parameter.grad.any(), name


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_log_det_sends_a_gradient_to_each_parameter_it_depends_on(
    case: Case, direction: str
) -> None:
    flow, x = case.bound(), case.inputs(20)
    names, parameters = [*zip(*flow.named_parameters())] or ((), ())
    _, log_det = getattr(flow, direction)(x)
    gradients = [None] * len(names)
    if log_det.requires_grad:
        gradients = torch.autograd.grad(log_det.sum(), parameters, allow_unused=True)
    for name, parameter, gradient in zip(names, parameters, gradients, strict=True):
        before = parameter.detach().clone()
        with torch.no_grad():
            parameter.add_(normal(*parameter.shape, seed=9))
            _, moved = getattr(flow, direction)(x)
            parameter.copy_(before)
        depends = bool((moved - log_det).abs().max() > 1e-9)
        assert depends == (gradient is not None and bool(gradient.any())), name


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_the_context_receives_a_gradient(conditional: Case, direction: str) -> None:
    context = conditional.context(20).requires_grad_()
    y, _ = getattr(conditional.flow().condition(context), direction)(conditional.inputs(20))
    (gradient,) = torch.autograd.grad((y * normal(*y.shape, seed=9)).sum(), context)
    assert gradient.any()


@pytest.mark.parametrize("turned", [False, True], ids=["forward", "inverse"])
def test_backward_works_again_for_the_same_tensor(trainable: Case, turned: bool) -> None:
    """The graph behind a remembered answer is gone after ``backward``."""
    flow, x = trainable.bound(), trainable.inputs(5)
    flow = flow.inv if turned else flow
    losses: list[Callable[[Tensor, Tensor], Tensor]] = [
        lambda y, log_det: y.sum(),
        lambda y, log_det: log_det.sum(),
        lambda y, log_det: y.sum() + log_det.sum(),
    ]
    gradients = []
    for loss in (*losses, *losses):
        flow.zero_grad()
        y = flow(x)
        loss(y, flow.log_abs_det_jacobian(x, y)).backward()
        gradients.append([p.grad for p in flow.parameters()])
    for first, second in zip(gradients[:3], gradients[3:], strict=True):
        torch.testing.assert_close(first, second, rtol=0, atol=0)


@pytest.mark.parametrize("turned", [False, True], ids=["forward", "inverse"])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_call_without_gradients_does_not_spoil_one_with(
    trainable: Case, mode: Callable, turned: bool
) -> None:
    flow, x = trainable.bound(), trainable.inputs(5)
    flow = flow.inv if turned else flow
    with mode():
        y = flow(x)
        assert not y.requires_grad
        flow.log_abs_det_jacobian(x, y)
    y = flow(x)
    assert y.requires_grad
    y.sum().backward()
    assert any(p.grad is not None and p.grad.any() for p in flow.parameters())
    with mode():
        assert not flow(x).requires_grad


def test_a_frozen_flow_builds_no_graph(trainable: Case) -> None:
    flow, x = trainable.bound().requires_grad_(False), trainable.inputs(5)
    for direction in DIRECTIONS:
        assert not any(t.requires_grad for t in getattr(flow, direction)(x))


def test_gradients_can_be_asked_for_later(trainable: Case) -> None:
    flow, x = trainable.bound().requires_grad_(False), trainable.inputs(5)
    flow(x)
    x.requires_grad_()
    assert torch.autograd.grad(flow(x).sum(), x)[0].any()
    flow.requires_grad_(True)
    flow(x).sum().backward()
    assert any(p.grad is not None and p.grad.any() for p in flow.parameters())


# No stale answers


def flat(flow: FlowTransform) -> Tensor:
    return nn.utils.parameters_to_vector(flow.parameters()).detach()


def take_step(optimizer: type[torch.optim.Optimizer]) -> Callable[[FlowTransform, Case], None]:
    def update(flow: FlowTransform, case: Case) -> None:
        x = case.inputs(5, seed=8)
        (y, forward), (z, inverse) = flow.forward_and_log_det(x), flow.inverse_and_log_det(x)
        (y.sum() + z.square().sum() + forward.sum() + 2 * inverse.sum()).backward()
        optimizer(flow.parameters(), lr=0.1).step()

    return update


def load_other_weights(flow: FlowTransform, case: Case) -> None:
    flow.load_state_dict(perturb(case.bound(), 0.5).state_dict())


def edit_in_place(flow: FlowTransform, case: Case) -> None:
    perturb(flow, 0.5)


def replace_data(flow: FlowTransform, case: Case) -> None:
    for parameter in flow.parameters():
        parameter.data = parameter.data + 0.1


def load_two_vectors(flow: FlowTransform, case: Case) -> None:
    """The second vector may lie where the weights lay before the first one."""
    vector = flat(flow)
    for step in (0.1, 0.2):
        nn.utils.vector_to_parameters(vector + step, flow.parameters())


UPDATES = {
    "adam": take_step(torch.optim.Adam),
    "pyro-clipped-adam": take_step(ClippedAdam),
    "load-state-dict": load_other_weights,
    "edit-in-place": edit_in_place,
    "replace-data": replace_data,
    "load-two-vectors": load_two_vectors,
}
ANSWERS: dict[str, Callable[[FlowTransform, Tensor, Tensor], Tensor]] = {
    "forward": lambda flow, x, y: flow(x),
    "inverse": lambda flow, x, y: flow.inv(y),
    "log-det": lambda flow, x, y: flow.log_abs_det_jacobian(x, y),
    "inverse-log-det": lambda flow, x, y: flow.inv.log_abs_det_jacobian(y, x),
}


@pytest.mark.parametrize("update", UPDATES.values(), ids=UPDATES.keys())
def test_is_fresh_after_an_update(trainable: Case, update: Callable) -> None:
    for name, answer in ANSWERS.items():
        flow, x = trainable.bound(), trainable.inputs(5)
        # Makes the weights views of one vector, as `load_two_vectors` does.
        nn.utils.vector_to_parameters(flat(flow), flow.parameters())
        with torch.no_grad():
            y = flow(x)
            before = answer(flow, x, y)
        update(flow, trainable)
        other = trainable.bound(noise=0.0)
        other.load_state_dict(flow.state_dict())
        with torch.no_grad():
            after, expected = answer(flow, x, y), answer(other, x, y)
        assert (after - expected).abs().max() <= trainable.within(1e-12), name
        assert (after - before).abs().max() > 1e-6, name


@pytest.mark.parametrize("edited", ["input", "output"])
def test_is_fresh_after_an_edit_in_place(kind: Case, edited: str) -> None:
    for name, answer in ANSWERS.items():
        flow, x = kind.bound(), kind.inputs(5)
        with torch.no_grad():
            y = flow(x)
            (x if edited == "input" else y).mul_(2.0)
            expected = answer(flow.with_cache(0), x, y)
            assert torch.equal(answer(flow, x, y), expected), name


def test_is_fresh_after_an_edit_of_the_context(conditional: Case) -> None:
    x, context = conditional.inputs(5), conditional.context()
    flow = conditional.flow().condition(context)
    before = flow(x).detach().clone()
    context.add_(1.0)
    expected, _ = flow.forward_and_log_det(x)
    assert torch.equal(flow(x), expected)
    assert not torch.equal(before, expected)


def test_the_pair_remembered_does_not_answer_for_another(kind: Case) -> None:
    flow, x, other = kind.bound(), kind.inputs(5), kind.inputs(5, seed=7)
    with torch.no_grad():
        y = kind.bound()(other)
        for answer in ANSWERS.values():
            flow(x)
            expected = answer(flow.with_cache(0), other, y)
            torch.testing.assert_close(
                answer(flow, other, y), expected, rtol=0, atol=kind.within(1e-12)
            )


# Caching


def test_remembers_its_last_pair(kind: Case) -> None:
    flow, x = kind.bound(), kind.inputs(5)
    y = flow(x)
    assert flow(x) is y
    assert flow.inv(y) is x
    assert flow.inv.inv(x) is y
    y = kind.inputs(5, seed=7)
    x = flow.inv(y)
    assert flow.inv(y) is x
    assert flow(x) is y


def test_log_det_of_a_remembered_pair_is_right(kind: Case) -> None:
    flow, x = kind.bound(), kind.inputs(5)
    for transform in (flow, flow.inv):
        y = transform(x)
        _, expected = transform.forward_and_log_det(x)
        log_det = transform.log_abs_det_jacobian(x, y)
        torch.testing.assert_close(log_det, expected, rtol=0, atol=kind.within(1e-9))


def test_without_a_cache_nothing_is_remembered(kind: Case) -> None:
    flow, x = kind.bound(), kind.inputs(5)
    y = flow(x)
    uncached = flow.with_cache(0)
    assert uncached(x) is not y
    assert uncached(x) is not uncached(x)
    assert uncached.inv(uncached(x)) is not x
    assert flow.inv(y) is x
    assert {id(p) for p in uncached.parameters()} == {id(p) for p in flow.parameters()}
    cached = uncached.with_cache(1)
    assert cached.inv(cached(x)) is x
    assert flow.with_cache(1).inv(y) is x


def test_clear_cache_forgets_in_every_part(kind: Case) -> None:
    flow = kind.bound()
    parts = [m for m in flow.modules() if isinstance(m, FlowTransform) and not m.context_dim]
    for owner in (flow, flow.inv):
        for part in parts:
            x = normal(5, *part.event_shape, seed=1)
            y = part(x)
            assert part(x) is y
            owner.clear_cache()
            assert part(x) is not y


def test_another_cache_size_is_refused(kind: Case) -> None:
    with pytest.raises(ValueError, match="0 or 1, got 2"):
        kind.bound().with_cache(2)


# Modules


def test_the_inverse_is_a_module_with_the_same_parameters(kind: Case) -> None:
    flow, x = kind.bound(), kind.inputs(5)
    inverse = flow.inv
    assert isinstance(inverse, nn.Module)
    assert inverse.inv is flow
    assert [id(p) for p in inverse.parameters()] == [id(p) for p in flow.parameters()]
    assert len(inverse.state_dict()) == len(flow.state_dict())
    for a, b in zip(DIRECTIONS, reversed(DIRECTIONS), strict=True):
        torch.testing.assert_close(getattr(inverse, a)(x), getattr(flow, b)(x), rtol=0, atol=0)


def copies(flow: FlowTransform) -> dict[str, FlowTransform]:
    file = io.BytesIO()
    torch.save(flow, file)
    file.seek(0)
    return {
        "deepcopy": copy.deepcopy(flow),
        "pickle": pickle.loads(pickle.dumps(flow)),
        "torch.save": torch.load(file, weights_only=False),
    }


def test_copies_after_a_call_agree_and_are_independent(kind: Case) -> None:
    flow, x = kind.bound(), kind.inputs(5)
    y = flow(x)
    for name, other in copies(flow).items():
        assert torch.equal(other(x), y), name
        assert {id(p) for p in other.parameters()}.isdisjoint(id(p) for p in flow.parameters())
        with torch.no_grad():
            for parameter in other.parameters():
                parameter.add_(1.0)
        assert flow(x) is y, name
        if any(True for _ in flow.parameters()):
            assert not torch.equal(other(x), y), name


def test_weights_survive_a_state_dict_round_trip(kind: Case) -> None:
    flow, x = kind.bound(), kind.inputs(5)
    keys = flow.state_dict().keys()
    y = flow(x)
    assert flow.state_dict().keys() == keys
    other = kind.bound(noise=0.0)
    other(x)
    other.load_state_dict(flow.state_dict())
    assert torch.equal(other(x), y)


def test_the_conditioned_flow_shares_parameters(conditional: Case) -> None:
    flow = conditional.flow()
    conditioned = flow.condition(conditional.context())
    assert [id(p) for p in conditioned.parameters()] == [id(p) for p in flow.parameters()]
    assert len(conditioned.state_dict()) == len(flow.state_dict())


def test_creates_nothing_on_another_device(kind: Case) -> None:
    flow, x = kind.bound().to("meta"), kind.inputs(2, 3).to("meta")
    for direction in DIRECTIONS:
        for mode in (torch.enable_grad, torch.no_grad):
            with mode():
                outputs = getattr(flow, direction)(x)
            assert all(t.is_meta for t in outputs)
            assert [t.shape for t in outputs] == [(2, 3, *kind.event_shape), (2, 3)]


def trace(flow: FlowTransform, direction: str, *inputs: Tensor) -> Callable:
    """Trace a function: ``torch.jit.trace`` does not take a module's method."""
    return torch.jit.trace(
        lambda *inputs: getattr(flow, direction)(*inputs), inputs, check_trace=False
    )


def arguments(case: Case, seed: int) -> tuple[Tensor, ...]:
    x = case.inputs(3, 2, seed=seed).requires_grad_()
    return (x, case.context(3, 2, seed=seed + 1)) if case.context_dim else (x,)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_a_traced_flow_agrees_on_new_inputs(traceable: Case) -> None:
    flow, inputs = traceable.flow().requires_grad_(False), arguments(traceable, seed=5)
    for direction in DIRECTIONS:
        traced = trace(flow, direction, *arguments(traceable, seed=1))
        answers = traced(*inputs), getattr(flow, direction)(*inputs)
        torch.testing.assert_close(*answers, rtol=0, atol=traceable.within(1e-10))
        gradients = [torch.autograd.grad(y.sum() + log.sum(), inputs[0]) for y, log in answers]
        torch.testing.assert_close(*gradients, rtol=0, atol=traceable.within(1e-9))


def test_can_be_traced_without_a_warning(traceable: Case) -> None:
    flow = traceable.flow().requires_grad_(False)
    for direction in DIRECTIONS:
        trace(flow, direction, *arguments(traceable, seed=1))


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_a_module_that_holds_a_flow_can_be_traced(direction: str) -> None:
    (case,) = (case for case in KINDS if case.name == "iaf-4-3")
    module, x = Direction(case.bound(), direction), case.inputs(3)
    traced = torch.jit.trace(module, case.inputs(3, seed=5))
    torch.testing.assert_close(traced(x), module(x), rtol=0, atol=1e-10)


def test_repr_names_the_structure(kind: Case) -> None:
    text = repr(kind.bound())
    for part in kind.bound().modules():
        assert type(part).__name__ in text
        if hasattr(part, "bijection"):
            assert repr(part.bijection) in text
    assert str(kind.input_dim) in text
