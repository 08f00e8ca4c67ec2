"""What long work shows while it runs: its loss or ELBO, its rate and when it ends; or nothing."""

from collections.abc import Callable

import pyro
import pyro.distributions as dist
import pytest
import torch

import pyroflows as pf
from tests.models import HEIGHTS, conjugate, realnvp


def fit(progress: bool) -> None:
    pf.fit(conjugate, realnvp(conjugate), (HEIGHTS,), num_steps=100, progress=progress)


def restarts(progress: bool) -> None:
    options = {"num_restarts": 2, "num_steps": 20, "progress": progress}
    pf.fit_restarts(conjugate, realnvp, (HEIGHTS,), **options)


def cover_mass(progress: bool) -> None:
    guide = realnvp(conjugate)
    result = pf.fit(conjugate, guide, (HEIGHTS,), num_steps=20, progress=False)
    pf.cover_mass(result, num_steps=20, progress=progress)


def density(progress: bool) -> None:
    flow = pf.Flow(None, pf.flow("realnvp", 2, num_layers=2))
    flow.fit(torch.randn(100, 2), num_steps=20, progress=progress)


def simulate(progress: bool) -> None:
    def simulator() -> None:
        theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(theta, 1.0))

    pf.sbi.simulate(simulator, 200, batch_size=100, progress=progress)


@pytest.mark.filterwarnings("ignore:no better guide was found:UserWarning")
@pytest.mark.parametrize(
    ("work", "shown"),
    [
        (fit, ("fit: ", "ELBO=", "it/s", "100/100")),
        (restarts, ("restarts: ", "ELBO=", "2/2")),
        (cover_mass, ("cover mass: ", "khat=", "ess=", "20/20")),
        (density, ("fit: ", "loss=", "validation=", "it/s", "20/20")),
        (simulate, ("draws/s", "200/200")),
    ],
)
def test_progress_is_shown_or_not(
    work: Callable, shown: tuple[str, ...], capfd: pytest.CaptureFixture
) -> None:
    work(progress=True)
    seen = capfd.readouterr()
    assert seen.out == ""
    assert [part for part in shown if part not in seen.err] == []
    work(progress=False)
    assert capfd.readouterr() == ("", "")
