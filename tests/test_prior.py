"""The prior of a simulator: its parameters and nothing else, without running the rest."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoNormal

from pyroflows.sbi.model.prior import Prior, check_prior


def model() -> None:
    """Draw parameters in and out of a plate, noise between them, then fail."""
    scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
    pyro.sample("noise", dist.Normal(0.0, 1.0))
    with pyro.plate("groups", 3):
        pyro.sample("means", dist.Normal(0.0, scale))
        raise AssertionError("what comes after the parameters must not run")


def test_draws_the_parameters_only_and_stops() -> None:
    trace = poutine.trace(Prior(model, ("scale", "means"))).get_trace()
    assert set(trace.stochastic_nodes) == {"scale", "means"}
    assert trace.nodes["means"]["value"].shape == (3,)
    assert not poutine.runtime._PYRO_STACK


def test_the_values_come_back_by_name() -> None:
    values = Prior(model, ("scale", "means"))()
    assert set(values) == {"scale", "means"}
    conditioned = poutine.condition(Prior(model, ("scale", "means")), {"scale": torch.tensor(2.0)})
    assert conditioned()["scale"] == 2.0


def test_plates_can_be_used_again_afterwards() -> None:
    prior = Prior(model, ("scale", "means"))

    def repeated() -> None:
        with pyro.plate("draws", 5, dim=-2):
            prior()
        with pyro.plate("others", 7, dim=-1):
            pyro.sample("y", dist.Normal(0.0, 1.0))

    trace = poutine.trace(repeated).get_trace()
    assert trace.nodes["means"]["value"].shape == (5, 3)
    assert trace.nodes["y"]["value"].shape == (7,)


def test_guides_work_on_it() -> None:
    guide = AutoNormal(Prior(model, ("scale", "means")))
    assert set(guide()) == {"scale", "means"}


def test_priors_that_depend_on_observations_are_refused() -> None:
    def posterior_first() -> None:
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        pyro.sample("theta", dist.Normal(x.abs(), 1.0))

    with pytest.raises(ValueError, match=r"prior of \['theta'\] depends on the observed sites"):
        check_prior(posterior_first, ["theta"], ["x"])
    check_prior(posterior_first, ["x"], ["theta"])
