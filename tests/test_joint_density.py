"""Densities of simulators: right, batched where the model allows, refused where there are none."""

from collections.abc import Callable

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from pyroflows.sbi.model.joint_density import JointDensity
from pyroflows.sbi.model.observations import ObservationSpace
from pyroflows.sbi.model.space import ParameterSpace
from tests.simulators import (
    black_box,
    conjugate,
    gaussian_linear_uniform,
    reads_entries_wrongly,
    slcp,
    two_moons,
)


def joint_of(model: Callable, parameters: tuple[str, ...] | None = None) -> JointDensity:
    where = (model, ("x",))
    space = ParameterSpace.of_model(*where, parameters)
    return JointDensity(model, space, ObservationSpace.of_model(*where))


def by_hand(model: Callable, joint: JointDensity, z: Tensor, x: Tensor) -> Tensor:
    """Return the log-density of one vector after the other, by Pyro itself."""
    total = []
    for row in z:
        values = {**joint.space.constrain(row), "x": x}
        trace = pyro.poutine.trace(pyro.condition(model, values)).get_trace()
        total.append(trace.log_prob_sum() + joint.space.log_abs_det_jacobian(row))
    return torch.stack(total)


def counted(model: Callable) -> tuple[Callable, list[int]]:
    calls: list[int] = []

    def wrapped() -> None:
        calls.append(1)
        model()

    return wrapped, calls


def heights() -> None:
    """Draw positive, simplex and correlated parameters."""
    scale = pyro.sample("scale", dist.HalfNormal(2.0))
    shares = pyro.sample("shares", dist.Dirichlet(torch.ones(3)))
    with pyro.plate("groups", 3):
        level = pyro.sample("level", dist.Normal(0.0, scale))
        pyro.sample("x", dist.Normal(level + shares.amax(-1), 1.0))


def hierarchy() -> None:
    """Draw a prior that depends on noise."""
    noise = pyro.sample("noise", dist.Normal(0.0, 1.0))
    theta = pyro.sample("theta", dist.Normal(noise, 1.0))
    pyro.sample("x", dist.Normal(theta, 1.0))


@pytest.mark.parametrize(
    ("model", "x"),
    [
        (conjugate, torch.tensor([0.3, -1.0, 2.0])),
        (slcp, torch.randn(4, 2, generator=torch.Generator().manual_seed(0))),
        (gaussian_linear_uniform, torch.linspace(-1, 1, 10)),
    ],
)
def test_is_the_density_of_the_model(model: Callable, x: Tensor) -> None:
    joint = joint_of(model)
    z = torch.randn(7, joint.space.dim)
    torch.testing.assert_close(joint.log_joint(z, x), by_hand(model, joint, z, x))


def test_is_the_prior_in_unconstrained_coordinates() -> None:
    """A uniform prior is a standard normal there."""
    joint = joint_of(gaussian_linear_uniform)
    z = torch.randn(50, 10)
    torch.testing.assert_close(joint.log_prior(z), dist.Normal(0.0, 1.0).log_prob(z).sum(-1))


@pytest.mark.parametrize("model", [heights, conjugate, slcp])
def test_many_vectors_at_once_have_the_densities_of_single_ones(model: Callable) -> None:
    wrapped, calls = counted(model)
    joint = joint_of(wrapped)
    x = torch.randn(joint.observations.shapes["x"])
    z = torch.randn(200, joint.space.dim)
    joint.log_joint(z[:2], x)
    calls.clear()
    together = joint.log_joint(z, x)
    assert len(calls) == 1
    torch.testing.assert_close(together[:5], by_hand(model, joint, z[:5], x))


def test_models_that_take_one_vector_run_for_each() -> None:
    joint = joint_of(reads_entries_wrongly)
    z = torch.randn(6, 3)
    x = torch.tensor(0.5)
    expected = dist.Normal(0.0, 1.0).log_prob(z).sum(-1) + dist.Normal(z[:, 0], 1.0).log_prob(x)
    torch.testing.assert_close(joint.log_joint(z, x), expected)


def test_batches_broadcast() -> None:
    joint = joint_of(conjugate)
    z = torch.randn(4, 1, 1)
    x = torch.randn(5, 3)
    together = joint.log_joint(z, x)
    assert together.shape == (4, 5)
    torch.testing.assert_close(together[2, 3], joint.log_joint(z[2, 0], x[3]))
    assert joint.log_joint(torch.zeros(0, 1), torch.zeros(3)).shape == (0,)


def test_is_differentiable() -> None:
    joint = joint_of(conjugate)
    z = torch.zeros(3, 1, requires_grad=True)
    (slope,) = torch.autograd.grad(joint.log_joint(z, torch.ones(3)).sum(), z)
    torch.testing.assert_close(slope, torch.full((3, 1), 3.0))


def test_zero_density_is_minus_infinity() -> None:
    def model() -> None:
        theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Uniform(theta, theta + 1.0))

    log_prob = joint_of(model).log_joint(torch.tensor([[0.0], [5.0]]), torch.tensor(0.5))
    assert log_prob[0].isfinite()
    assert log_prob[1] == -torch.inf


def test_the_prior_of_a_black_box_is_known_without_running_it() -> None:
    ran: list[int] = []

    def model() -> None:
        theta = pyro.sample("theta", dist.Uniform(-1.0, 1.0).expand([2]).to_event(1))
        ran.append(1)
        pyro.deterministic("x", torch.as_tensor(theta.detach().numpy().sum()))

    joint = joint_of(model)
    joint.log_prior(torch.zeros(1, 2))
    ran.clear()
    z = torch.randn(10, 2)
    torch.testing.assert_close(joint.log_prior(z), dist.Normal(0.0, 1.0).log_prob(z).sum(-1))
    assert not ran


def test_leaves_the_random_state_alone() -> None:
    joint = joint_of(conjugate)
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    joint.log_joint(torch.zeros(2, 1), torch.zeros(3))
    assert torch.equal(torch.rand(1), expected)


def test_intractable_likelihoods_are_refused() -> None:
    with pytest.raises(ValueError, match=r"'x' is pyro\.deterministic, which has no density"):
        joint_of(black_box).log_joint(torch.zeros(2), torch.zeros(3))
    with pytest.raises(ValueError, match=r"latent sites \['noise'\] are no parameters"):
        joint_of(hierarchy, ("theta",)).log_joint(torch.zeros(1), torch.tensor(0.0))
    with pytest.raises(ValueError, match="depends on latent sites that are no parameters"):
        joint_of(hierarchy, ("theta",)).log_prior(torch.zeros(1))
    assert joint_of(two_moons, ("theta",)).log_prior(torch.zeros(2)).isfinite()


def test_simulators_that_catch_errors_are_stopped_all_the_same() -> None:
    def careful() -> None:
        theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
        try:
            pyro.sample("x", dist.Normal(theta, 1.0))
        except Exception as error:
            raise AssertionError("the model saw an error") from error

    expected = dist.Normal(0.0, 1.0).log_prob(torch.tensor(0.0))
    log_joint = joint_of(careful).log_joint(torch.zeros(3, 1), torch.tensor(0.0))
    torch.testing.assert_close(log_joint, (2 * expected).expand(3))


def test_arrays_are_observations_too() -> None:
    joint = joint_of(conjugate)
    x = torch.tensor([0.5, -1.0, 2.0])
    z = torch.zeros(2, 1)
    assert torch.equal(joint.log_joint(z, x.numpy()), joint.log_joint(z, x))


def test_wrong_observations_are_refused() -> None:
    joint = joint_of(conjugate)
    with pytest.raises(ValueError, match=r"has shape \(3,\), got x of shape \(4,\)"):
        joint.log_joint(torch.zeros(1), torch.zeros(4))
    with pytest.raises(ValueError, match="NaN at 1 of 1"):
        joint.log_joint(torch.zeros(1), torch.tensor([0.0, torch.nan, 0.0]))
    with pytest.raises(ValueError, match=r"must hold the observed sites \['x'\], got \['y'\]"):
        joint.log_joint(torch.zeros(1), {"y": torch.zeros(3)})
