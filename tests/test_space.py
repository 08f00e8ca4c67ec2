"""Parameters as unconstrained vectors: bijective, inside the support, with the right Jacobian."""

from collections.abc import Callable

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor
from torch.distributions import constraints

from pyroflows.sbi import ParameterSpace
from tests.batteries import jacobian


def many_supports() -> None:
    pyro.sample("real", dist.Normal(0.0, 1.0))
    pyro.sample("interval", dist.Uniform(-3.0, 1.0).expand([2]).to_event(1))
    pyro.sample("positive", dist.HalfCauchy(2.0))
    pyro.sample("simplex", dist.Dirichlet(torch.ones(3)))
    pyro.sample("cholesky", dist.LKJCholesky(3, 1.0))
    with pyro.plate("groups", 2):
        pyro.sample("fraction", dist.Beta(2.0, 3.0))
    pyro.sample("x", dist.Normal(0.0, 1.0))


@pytest.fixture
def space() -> ParameterSpace:
    return ParameterSpace.of_model(many_supports, ("x",))


def test_sites_are_the_latent_ones_in_order(space: ParameterSpace) -> None:
    assert space.names == ("real", "interval", "positive", "simplex", "cholesky", "fraction")
    assert space.dim == 1 + 2 + 1 + 2 + 3 + 2
    assert space.shapes["cholesky"] == (3, 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_vectors_go_there_and_back(space: ParameterSpace, dtype: torch.dtype) -> None:
    z = torch.randn(200, space.dim, dtype=torch.float64).clamp(-4, 4).to(dtype)
    values = space.constrain(z)
    assert all(value.dtype == dtype for value in values.values())
    # Away from zero, single precision resolves a probability to 1e-7 of a density of 1e-3.
    tolerance = 1e-9 if dtype == torch.float64 else 2e-3
    torch.testing.assert_close(space.unconstrain(values), z, rtol=0, atol=tolerance)


def test_the_log_det_is_that_of_the_jacobian() -> None:
    def model() -> None:  # sites whose Jacobian is square
        pyro.sample("real", dist.Normal(0.0, 1.0))
        pyro.sample("interval", dist.Uniform(-3.0, 1.0).expand([2]).to_event(1))
        pyro.sample("positive", dist.Gamma(2.0, 1.0))
        pyro.sample("x", dist.Normal(0.0, 1.0))

    space = ParameterSpace.of_model(model, ("x",))
    z = torch.randn(20, space.dim, dtype=torch.float64, requires_grad=True)
    values = space.constrain(z)
    flat = torch.cat([value.reshape(20, -1) for value in values.values()], -1)
    expected = torch.linalg.slogdet(jacobian(flat, z)).logabsdet
    torch.testing.assert_close(space.log_abs_det_jacobian(z), expected, rtol=0, atol=1e-9)


def test_a_uniform_prior_becomes_standard_normal() -> None:
    space = ParameterSpace({"theta": (dist.Uniform(-2.0, 5.0), torch.Size())})
    z = torch.linspace(-4, 4, 50, dtype=torch.float64).unsqueeze(-1)
    log_prior = -torch.tensor(7.0).double().log() + space.log_abs_det_jacobian(z)
    expected = dist.Normal(0.0, 1.0).log_prob(z.squeeze(-1))
    torch.testing.assert_close(log_prior, expected)


def test_nothing_leaves_the_prior_however_far_a_vector_is() -> None:
    space = ParameterSpace.of_model(many_supports, ("x",))
    for scale in (1.0, 10.0, 30.0):
        values = space.constrain(scale * torch.randn(1000, space.dim))
        interval, fraction = values["interval"], values["fraction"]
        assert ((interval > -3) & (interval < 1)).all()
        assert ((fraction > 0) & (fraction < 1)).all()
        assert constraints.simplex.check(values["simplex"]).all()


def test_draws_at_the_edge_of_the_prior_are_finite() -> None:
    space = ParameterSpace({"theta": (dist.Uniform(0.0, 1.0), torch.Size())})
    for edge in (0.0, 1.0):
        assert space.unconstrain({"theta": torch.tensor([edge])}).isfinite().all()


def test_batches_of_any_shape(space: ParameterSpace) -> None:
    for batch in ((), (7,), (2, 3)):
        values = space.constrain(torch.zeros(*batch, space.dim))
        assert values["simplex"].shape == (*batch, 3)
        assert space.unconstrain(values).shape == (*batch, space.dim)
        assert space.log_abs_det_jacobian(torch.zeros(*batch, space.dim)).shape == batch


def test_whole_numbers_are_numbers() -> None:
    space = ParameterSpace({"scale": (dist.HalfNormal(1.0), torch.Size())})
    expected = torch.tensor([[2.0], [5.0]]).log()
    torch.testing.assert_close(space.unconstrain({"scale": torch.tensor([2, 5])}), expected)


def test_noise_sites_are_left_out_on_request() -> None:
    def model() -> None:
        pyro.sample("theta", dist.Normal(0.0, 1.0))
        pyro.sample("count", dist.Poisson(3.0))
        pyro.sample("x", dist.Normal(0.0, 1.0))

    assert ParameterSpace.of_model(model, ("x",), ("theta",)).names == ("theta",)
    with pytest.raises(ValueError, match=r"site 'count' is discrete \(Poisson\)"):
        ParameterSpace.of_model(model, ("x",))


# Errors


def random_bound() -> None:
    high = pyro.sample("high", dist.Uniform(1.0, 2.0))
    pyro.sample("theta", dist.Uniform(0.0, high))
    pyro.sample("x", dist.Normal(0.0, 1.0))


def nothing_latent() -> None:
    pyro.sample("x", dist.Normal(0.0, 1.0))


def random_bounds_of_a_vector() -> None:
    low = pyro.sample("low", dist.Uniform(1.0, 2.0))
    pyro.sample("theta", dist.Pareto(low, 1.0).expand([2]).to_event(1))
    pyro.sample("x", dist.Normal(0.0, 1.0))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (random_bounds_of_a_vector, "supports change from draw to draw"),
        (random_bound, "supports change from draw to draw"),
        (nothing_latent, "no latent sites: there is nothing to infer"),
    ],
)
def test_models_without_a_fixed_space_are_refused(model: Callable, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ParameterSpace.of_model(model, ("x",))


def test_unknown_sites_are_refused_with_the_names_there_are() -> None:
    with pytest.raises(ValueError, match=r"observed \['y'\] are not sites.*'simplex', 'x'\]"):
        ParameterSpace.of_model(many_supports, ("y",))
    with pytest.raises(ValueError, match=r"parameters \['z'\] are not sites"):
        ParameterSpace.of_model(many_supports, ("x",), ("z",))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, r"must hold site 'theta', got \[\]"),
        ({"theta": torch.zeros(5, 3)}, r"has shape \(2,\), got values of shape \(5, 3\)"),
        ({"theta": torch.full((5, 2), 2.0)}, "'theta' lie outside the support"),
        ({"theta": torch.full((5, 2), torch.nan)}, "'theta' lie outside the support"),
    ],
)
def test_wrong_values_are_refused(values: dict[str, Tensor], message: str) -> None:
    space = ParameterSpace({"theta": (dist.Uniform(-1.0, 1.0), torch.Size([2]))})
    with pytest.raises(ValueError, match=message):
        space.unconstrain(values)


def test_vectors_of_the_wrong_size_are_refused(space: ParameterSpace) -> None:
    with pytest.raises(ValueError, match=rf"{space.dim} entries, got shape \(5, 2\)"):
        space.constrain(torch.zeros(5, 2))
