"""Linear flows: what their matrices are, and how ActNorm starts from data."""

import copy
import pickle
from collections.abc import Callable
from pathlib import Path

import pyro.distributions as dist
import pytest
import torch
from safetensors.torch import load_model, save_model
from torch import Tensor

import pyroflows as pf
from pyroflows.nn.orthogonal import Reflections, cayley, exponential, householder
from pyroflows.transforms import (
    PLU,
    QR,
    ActNorm,
    Compose,
    FlowTransform,
    Orthogonal,
    Permutation,
    conditional_plu,
    conditional_qr,
)
from pyroflows.transforms.linear import initialize_from_data
from tests.batteries import coupling, jacobian, normal, perturb

METHODS = ("householder", "exponential", "cayley")
HALVES = (torch.float16, torch.bfloat16)


def matrix_of(flow: FlowTransform) -> Tensor:
    """Return the matrix of an affine flow, column by column."""
    zero, unit = torch.zeros(flow.event_shape[0]).double(), torch.eye(flow.event_shape[0]).double()
    return (flow(unit) - flow(zero)).detach().T


def reflections(vectors: Tensor) -> Tensor:
    product = torch.eye(vectors.shape[1]).double()
    for v in vectors:
        product = product - 2 * torch.outer(product @ v, v) / (v @ v)
    return product


# Orthogonal matrices


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (1, 4), (3, 5), (5, 5), (64, 64)])
def test_a_product_of_reflections_is_one(rows: int, columns: int) -> None:
    vectors = normal(rows, columns, seed=1)
    torch.testing.assert_close(householder(vectors), reflections(vectors), rtol=0, atol=1e-13)


def test_a_product_of_reflections_does_not_depend_on_lengths() -> None:
    vectors = normal(4, 6, seed=1)
    lengths = torch.tensor([1e-6, 1.0, 1e6, 3.0]).double()
    torch.testing.assert_close(
        householder(lengths.unsqueeze(-1) * vectors), householder(vectors), rtol=0, atol=1e-13
    )


def test_a_rotation_of_the_plane_is_known() -> None:
    angle = torch.tensor(0.7).double()
    expected = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()]).view(2, 2)
    generator = torch.zeros(2, 2).double()
    generator[1, 0] = angle
    torch.testing.assert_close(exponential(generator), expected)
    generator[1, 0] = -(angle / 2).tan()
    torch.testing.assert_close(cayley(generator), expected)


@pytest.mark.parametrize("num_reflections", [1, 3, 4])
def test_reflections_start_at_the_identity_and_stay_rotations(num_reflections: int) -> None:
    matrix = Reflections(4, num_reflections).double()
    assert torch.equal(matrix(), torch.eye(4).double())
    perturb(matrix, 2.0)
    torch.testing.assert_close(torch.linalg.det(matrix()), torch.ones(()).double())


@pytest.mark.parametrize("num_reflections", [0, 5])
def test_an_impossible_number_of_reflections_is_refused(num_reflections: int) -> None:
    message = f"num_reflections must be between 1 and input_dim 4, got {num_reflections}"
    with pytest.raises(ValueError, match=message):
        QR(4, num_reflections=num_reflections)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("input_dim", [1, 2, 7, 64])
def test_an_orthogonal_flow_keeps_lengths_and_volume(method: str, input_dim: int) -> None:
    flow = perturb(Orthogonal(input_dim, method).double(), 2.0)
    matrix, x = matrix_of(flow), normal(10, input_dim, seed=1)
    identity = torch.eye(input_dim).double()
    torch.testing.assert_close(matrix @ matrix.T, identity, rtol=0, atol=1e-12)
    torch.testing.assert_close(matrix.det(), torch.ones(()).double())
    for direction in (flow.forward_and_log_det, flow.inverse_and_log_det):
        y, log_det = direction(x)
        torch.testing.assert_close(y.norm(dim=-1), x.norm(dim=-1))
        assert torch.equal(log_det, torch.zeros(10).double())


@pytest.mark.parametrize("method", METHODS)
def test_an_orthogonal_flow_can_be_turned_to_a_rotation(method: str) -> None:
    """Fits a given rotation by gradients: the parametrisation has all the freedom it needs."""
    target = exponential(0.5 * normal(4, 4, seed=3))
    flow = Orthogonal(4, method).double()
    optimizer = torch.optim.LBFGS(flow.parameters(), max_iter=200, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        error = (flow(torch.eye(4).double()) - target.T).square().sum()
        error.backward()
        return error

    optimizer.step(loss)
    torch.testing.assert_close(matrix_of(flow), target, rtol=0, atol=1e-4)


def test_an_unknown_method_is_refused() -> None:
    message = "method must be one of householder, exponential, cayley, got 'givens'"
    with pytest.raises(ValueError, match=message):
        Orthogonal(3, method="givens")


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("build", [QR, *(lambda D, m=m: Orthogonal(D, m) for m in METHODS)])
def test_orthogonal_factors_run_in_half_precision(
    build: Callable[[int], FlowTransform], dtype: torch.dtype
) -> None:
    flow, x = build(4).to(dtype), normal(20, 4, seed=1).to(dtype)
    for transform in (flow, flow.inv):
        y, log_det = transform.forward_and_log_det(x)
        assert y.dtype == log_det.dtype == dtype
        assert (y - x).abs().max() < 0.05


# PLU and QR


def general_weight(input_dim: int) -> Tensor:
    """Return a matrix that needs pivoting, of negative determinant."""
    weight = normal(input_dim, input_dim, seed=5)
    weight[0] *= -weight.det().sign()
    return weight


@pytest.mark.parametrize("input_dim", [1, 3, 5])
def test_plu_starts_from_a_given_matrix(input_dim: int) -> None:
    weight, x = general_weight(input_dim), normal(7, input_dim, seed=1)
    assert weight.det() < 0
    flow = PLU(input_dim, weight=weight)
    assert input_dim == 1 or flow.permutation.tolist() != [*range(input_dim)]
    y, log_det = flow.forward_and_log_det(x)
    torch.testing.assert_close(y, x @ weight.T)
    torch.testing.assert_close(log_det, torch.linalg.slogdet(weight).logabsdet.expand(7))
    torch.testing.assert_close(flow.inv(y.detach()), x)
    assert all(parameter.dtype == torch.float64 for parameter in flow.parameters())


def test_plu_is_the_product_of_its_factors() -> None:
    flow = perturb(PLU(4, weight=general_weight(4)), 0.5)
    shift, log_scale = flow.shift_and_log_scale().chunk(2)
    lower, upper = (
        part + torch.eye(4).double() for part in (flow.factors.tril(-1), flow.factors.triu(1))
    )
    permutation = torch.eye(4).double()[flow.permutation]
    weight = permutation @ lower @ (flow.signs * log_scale.exp()).diag() @ upper
    x = normal(7, 4, seed=1)
    torch.testing.assert_close(flow(x), x @ weight.T + shift)


def test_learning_leaves_the_permutation_and_the_signs_alone() -> None:
    flow, x = PLU(4, weight=general_weight(4)), normal(50, 4, seed=1)
    before = copy.deepcopy(dict(flow.named_buffers()))
    optimizer = torch.optim.Adam(flow.parameters(), lr=0.3)
    for _ in range(20):
        optimizer.zero_grad()
        z, log_det = flow.inverse_and_log_det(x)
        (z.square().sum(-1) / 2 - log_det).mean().backward()
        optimizer.step()
    assert {*before} == {"permutation", "signs"} <= flow.state_dict().keys()
    assert all(torch.equal(buffer, before[name]) for name, buffer in flow.named_buffers())
    assert matrix_of(flow).det() < 0


def test_a_plu_matrix_is_part_of_the_state() -> None:
    flow, other, x = PLU(4, weight=general_weight(4)), PLU(4).double(), normal(7, 4, seed=1)
    other.load_state_dict(flow.state_dict())
    assert torch.equal(other(x), flow(x))
    assert torch.equal(other.inv(x), flow.inv(x))


def test_plu_gives_any_normal_distribution() -> None:
    scale_tril = normal(3, 3, seed=2).tril(-1) + torch.tensor([0.5, 2.0, 1.0]).double().diag()
    base = dist.Normal(torch.zeros(3).double(), 1.0).to_event(1)
    flow = pf.Flow(base, PLU(3, weight=scale_tril))
    expected = dist.MultivariateNormal(torch.zeros(3).double(), scale_tril=scale_tril)
    x = normal(20, 3, seed=1)
    torch.testing.assert_close(flow.log_prob(x), expected.log_prob(x))


def test_a_weight_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match=r"weight must have shape \(3, 3\), got \(3, 2\)"):
        PLU(3, weight=torch.zeros(3, 2))


@pytest.mark.parametrize("bad", [0.0, float("nan")])
def test_a_weight_that_is_not_invertible_is_refused(bad: float) -> None:
    weight = torch.eye(3)
    weight[1, 1] = bad
    with pytest.raises(ValueError, match=r"weight must be invertible, got pivots \[1.0, "):
        PLU(3, weight=weight)


@pytest.mark.parametrize("num_reflections", [1, 4])
def test_qr_is_the_product_of_its_factors(num_reflections: int) -> None:
    flow = perturb(QR(4, num_reflections=num_reflections).double(), 0.5)
    shift, log_scale = flow.shift_and_log_scale().chunk(2)
    signs = torch.tensor([-1.0] * num_reflections + [1.0] * (4 - num_reflections)).double()
    rotation = reflections(flow.orthogonal.vectors) @ signs.diag()
    upper = log_scale.exp().diag() @ (flow.factors.triu(1) + torch.eye(4).double())
    x = normal(7, 4, seed=1)
    torch.testing.assert_close(flow(x), x @ (rotation @ upper).T + shift)


@pytest.mark.parametrize("factory", [conditional_plu, conditional_qr])
def test_a_context_moves_scales_and_shift_only(factory: Callable[..., FlowTransform]) -> None:
    flow = perturb(factory(4, 3).double(), 0.3)
    one, other = (matrix_of(flow.condition(normal(3, seed=seed))) for seed in (5, 6))
    assert not torch.allclose(one, other, rtol=0.01)
    # One is A diag(s) U, the other A diag(s') U.
    left = flow.matrix_of_left_factor()
    quotient = torch.linalg.solve(left, one @ torch.linalg.inv(other)) @ left
    torch.testing.assert_close(quotient, quotient.diagonal().diag(), rtol=0, atol=1e-9)


# ActNorm


def check_standard(y: Tensor, dims: tuple[int, ...] = (0,)) -> None:
    std, mean = torch.std_mean(y.detach(), dim=dims)
    torch.testing.assert_close(mean, torch.zeros_like(mean), rtol=0, atol=1e-6)
    torch.testing.assert_close(std, torch.ones_like(std), rtol=0, atol=1e-6)


def data(*batch: int) -> Tensor:
    return normal(*batch, 3, seed=1) * torch.tensor([0.1, 1.0, 50.0]) + torch.tensor([5.0, 0, -9])


@pytest.mark.parametrize("batch", [(2,), (100,), (20, 5)], ids=str)
@pytest.mark.parametrize("inverse", [False, True])
def test_actnorm_standardises_the_data_it_is_initialised_with(
    batch: tuple[int, ...], inverse: bool
) -> None:
    flow, x = ActNorm(3).double(), data(*batch)
    flow.initialize(x, inverse)
    check_standard((flow.inv if inverse else flow)(x).reshape(-1, 3))


def test_actnorm_is_its_formula() -> None:
    flow, x = perturb(ActNorm(3, initialized=True).double(), 0.5), data(7)
    y, log_det = flow.forward_and_log_det(x)
    torch.testing.assert_close(y, (x + flow.shift) * flow.log_scale.exp())
    torch.testing.assert_close(log_det, flow.log_scale.sum().expand(7))


def test_actnorm_takes_channels_of_images() -> None:
    flow, x = ActNorm((3, 4, 2)).double(), data(10, 4, 2).movedim(-1, 1)
    flow.initialize(x)
    assert flow.shift.shape == (3, 1, 1)
    flat = x.flatten(1).requires_grad_()
    y, log_det = flow.forward_and_log_det(flat.unflatten(1, (3, 4, 2)))
    check_standard(y, dims=(0, 2, 3))
    slogdet = torch.linalg.slogdet(jacobian(y.flatten(1), flat)).logabsdet
    torch.testing.assert_close(log_det, slogdet)
    torch.testing.assert_close(flow.inv(y.detach()), x)


def test_actnorm_is_refused_before_its_initialisation() -> None:
    flow, x = ActNorm(3), torch.zeros(2, 3)
    message = r"call initialize\(x\).*initialize_from_data\(flow, x\).*initialized=True"
    for direction in (flow, flow.inv, flow.forward_and_log_det, flow.inverse_and_log_det):
        with pytest.raises(RuntimeError, match=message):
            direction(x)


@pytest.mark.parametrize(
    "restore",
    [
        copy.deepcopy,
        lambda flow: pickle.loads(pickle.dumps(flow)),
        lambda flow: flow.with_cache(0),
    ],
    ids=["deepcopy", "pickle", "with_cache"],
)
@pytest.mark.parametrize("initialized", [False, True])
def test_a_copy_of_actnorm_knows_whether_it_is_initialised(
    restore: Callable, initialized: bool
) -> None:
    flow = ActNorm(3).double()
    if initialized:
        flow.initialize(data(10))
    other = restore(flow)
    assert other.initialized is initialized
    if initialized:
        assert torch.equal(other(data(5)), flow(data(5)))


@pytest.mark.parametrize("initialized", [False, True])
def test_the_state_of_actnorm_tells_whether_it_is_initialised(
    tmp_path: Path, initialized: bool
) -> None:
    flow = Compose([ActNorm(3), Permutation([2, 0, 1])]).double()
    if initialized:
        initialize_from_data(flow, data(10))
    loaded, from_file = (
        Compose([ActNorm(3, initialized=not initialized), Permutation([0, 1, 2])]).double()
        for _ in range(2)
    )
    loaded.load_state_dict(flow.state_dict())
    save_model(flow, str(tmp_path / "flow.safetensors"))
    load_model(from_file, tmp_path / "flow.safetensors")
    for other in (loaded, from_file):
        assert other[0].initialized is initialized
        if initialized:
            assert torch.equal(other(data(5)), flow(data(5)))


@pytest.mark.parametrize("batch", [(), (1,), (0,)], ids=str)
def test_too_few_data_are_refused(batch: tuple[int, ...]) -> None:
    shape = ", ".join(map(str, (*batch, 3)))
    with pytest.raises(ValueError, match=rf"at least two values per channel.*\({shape},?\)"):
        ActNorm(3).initialize(torch.zeros(*batch, 3))


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (float("nan"), r"finite, got NaN or infinity in channels \[1\]"),
        (float("inf"), r"finite, got NaN or infinity in channels \[1\]"),
        (None, r"vary, got constant values in channels \[1\]"),
    ],
)
def test_data_without_statistics_are_refused(value: float | None, message: str) -> None:
    flow, x = ActNorm(3).double(), data(10)
    if value is None:
        x[:, 1] = 0.1
    else:
        x[4, 1] = value
    with pytest.raises(ValueError, match=message):
        flow.initialize(x)
    assert not flow.initialized


def test_data_of_another_size_are_refused() -> None:
    with pytest.raises(ValueError, match=r"trailing shape \(3,\), got data of shape \(10, 4\)"):
        ActNorm(3).initialize(torch.zeros(10, 4))


@pytest.mark.parametrize("inverse", [False, True])
def test_every_actnorm_of_a_flow_is_initialised_as_data_arrive(inverse: bool) -> None:
    parts = [ActNorm(3), perturb(coupling(3), 0.5), ActNorm(3).inv, coupling(3)]
    flow, x = Compose([Compose(parts[:2]), *parts[2:]]).double(), data(100)
    initialize_from_data(flow, x, inverse=inverse)
    for part in reversed(parts) if inverse else parts:
        x = (part.inv if inverse else part)(x)
        if any(isinstance(module, ActNorm) for module in part.modules()):
            check_standard(x)


def test_a_conditional_flow_is_initialised_with_the_context_of_the_data() -> None:
    first, norm = perturb(coupling(3, 2), 0.5), ActNorm(3)
    flow, x, context = Compose([first, norm]).double(), data(100), normal(100, 2, seed=4)
    initialize_from_data(flow, x, context)
    check_standard(flow.condition(context)(x))


def test_a_layer_met_twice_is_initialised_where_data_meet_it_first() -> None:
    layer, x = ActNorm(3), data(100)
    initialize_from_data(Compose([layer, Permutation([1, 2, 0]), layer]).double(), x)
    check_standard(layer(x))


def test_a_failed_initialisation_leaves_the_rest_uninitialised() -> None:
    flow, x = Compose([coupling(3), ActNorm(3), ActNorm(3)]).double(), data(10)
    with pytest.raises(ValueError, match="at least two values"):
        initialize_from_data(flow, x[:1])
    with pytest.raises(RuntimeError, match="before its initialisation"):
        flow(x)


def test_initialisation_can_be_repeated() -> None:
    flow = ActNorm(3).double()
    for x in (data(10), 2 * data(10) + 1):
        y = flow(x) if flow.initialized else None
        initialize_from_data(flow, x)
        assert flow(x) is not y
        check_standard(flow(x))


def test_a_flow_without_actnorm_is_refused() -> None:
    with pytest.raises(ValueError, match="flow must hold an ActNorm, got Compose without any"):
        initialize_from_data(Compose([coupling(3)]), torch.zeros(10, 3))
