"""Small simulators with known answers, for the tests of simulation-based inference."""

import numpy as np
import pyro
import pyro.distributions as dist
import torch


def conjugate(num_points: int = 3) -> None:
    """Draw a mean and noisy points around it: the posterior is normal."""
    mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
    with pyro.plate("points", num_points):
        pyro.sample("x", dist.Normal(mean, 1.0))


def two_moons() -> None:
    """Draw from the two moons of the benchmark, its noise as sites of its own."""
    theta = pyro.sample("theta", dist.Uniform(-1.0, 1.0).expand([2]).to_event(1))
    angle = pyro.sample("angle", dist.Uniform(-np.pi / 2, np.pi / 2))
    radius = pyro.sample("radius", dist.Normal(0.1, 0.01))
    first, second = theta.unbind(-1)
    x = torch.stack(
        [
            radius * angle.cos() + 0.25 - (first + second).abs() / 2**0.5,
            radius * angle.sin() + (second - first) / 2**0.5,
        ],
        -1,
    )
    pyro.deterministic("x", x, event_dim=1)


def slcp() -> None:
    """Draw the four exchangeable points of the SLCP benchmark."""
    theta = pyro.sample("theta", dist.Uniform(-3.0, 3.0).expand([5]).to_event(1))
    one, other = theta[..., 2].square(), theta[..., 3].square()
    correlation = theta[..., 4].tanh()
    covariance = torch.stack(
        [
            torch.stack([one.square(), correlation * one * other], -1),
            torch.stack([correlation * one * other, other.square()], -1),
        ],
        -2,
    )
    with pyro.plate("points", 4):
        pyro.sample("x", dist.MultivariateNormal(theta[..., :2], covariance + 1e-6 * torch.eye(2)))


def black_box() -> None:
    """Draw from a simulator outside torch, which takes one vector of parameters."""
    theta = pyro.sample("theta", dist.Uniform(-1.0, 1.0).expand([2]).to_event(1))
    x = np.random.normal(theta.numpy().sum(), 0.1, size=3)  # noqa: NPY002
    pyro.deterministic("x", torch.as_tensor(x, dtype=theta.dtype))


def reads_entries_wrongly() -> None:
    """Draw from a model that runs in a plate, but not to the same effect."""
    theta = pyro.sample("theta", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
    pyro.sample("x", dist.Normal(theta.flatten()[0], 1.0))


def sometimes_invalid() -> None:
    """Draw NaN in half of the cases."""
    theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
    pyro.deterministic("x", theta.log())


def sometimes_raises() -> None:
    """Raise where the parameter is large."""
    theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
    if theta.item() > 2.0:
        raise ValueError("theta is too large")
    pyro.sample("x", dist.Normal(theta, 1.0))


def slcp_flat() -> None:
    """Draw from SLCP, its four points as one vector of 8."""
    theta = pyro.sample("theta", dist.Uniform(-3.0, 3.0).expand([5]).to_event(1))
    one, other = theta[..., 2:3].square(), theta[..., 3:4].square()
    correlation = theta[..., 4:5].tanh()
    noise = pyro.sample("noise", dist.Normal(0.0, 1.0).expand([4, 2]).to_event(2))
    first, second = noise.unbind(-1)
    x = theta[..., 0:1] + one * first
    y = theta[..., 1:2] + other * (correlation * first + (1 - correlation**2).sqrt() * second)
    pyro.deterministic("x", torch.stack([x, y], -1).flatten(-2), event_dim=1)


def gaussian_linear() -> None:
    """Draw from the normal location model with a normal prior, both of variance .1."""
    theta = pyro.sample("theta", dist.Normal(0.0, 0.1**0.5).expand([10]).to_event(1))
    pyro.sample("x", dist.Normal(theta, 0.1**0.5).to_event(1))


def gaussian_linear_uniform() -> None:
    """Draw from the normal location model with a uniform prior."""
    theta = pyro.sample("theta", dist.Uniform(-1.0, 1.0).expand([10]).to_event(1))
    pyro.sample("x", dist.Normal(theta, 0.1**0.5).to_event(1))
