"""Simulations: right draws, reproducible on any executor, resumable, honest about failures."""

import random
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch

from pyroflows.sbi import SimulationError, Simulations, simulate
from tests.simulators import (
    black_box,
    conjugate,
    reads_entries_wrongly,
    slcp,
    sometimes_invalid,
    sometimes_raises,
    two_moons,
)


def same(one: Simulations, other: Simulations) -> bool:
    groups = ((one.parameters, other.parameters), (one.observations, other.observations))
    return all(torch.equal(a[name], b[name]) for a, b in groups for name in {*a, *b})


def calls(model: Callable, num_simulations: int) -> int:
    """Count how often a model runs."""
    count = 0

    def counted() -> None:
        nonlocal count
        count += 1
        model()

    simulate(counted, num_simulations, progress=False)
    return count


@pytest.mark.parametrize(
    ("model", "shape"), [(conjugate, (3,)), (two_moons, (2,)), (slcp, (4, 2)), (black_box, (3,))]
)
def test_draws_have_the_shapes_of_the_sites(model: Callable, shape: tuple[int, ...]) -> None:
    simulations = simulate(model, 50, progress=False)
    assert len(simulations) == 50
    assert simulations.observations["x"].shape == (50, *shape)
    assert all(len(values) == 50 for values in simulations.parameters.values())
    assert not any(values.requires_grad for values in simulations.parameters.values())


def test_draws_follow_the_model() -> None:
    """Means of 20 000 draws lie within 5 standard errors: a false alarm in 10^6."""
    simulations = simulate(conjugate, 20_000, progress=False)
    mean, x = simulations.parameters["mean"], simulations.observations["x"]
    assert abs(mean.mean()) < 5 / 20_000**0.5
    assert abs((x - mean.unsqueeze(-1)).mean()) < 5 / 60_000**0.5
    assert abs((x[:, 0] * x[:, 1]).mean() - 1.0) < 5 * 5**0.5 / 20_000**0.5


@pytest.mark.parametrize("model", [conjugate, two_moons])
def test_models_that_work_on_batches_run_once_a_batch(model: Callable) -> None:
    assert calls(model, 5000) < 100


@pytest.mark.parametrize("model", [black_box, reads_entries_wrongly])
def test_models_that_do_not_are_run_draw_by_draw(model: Callable) -> None:
    assert calls(model, 200) >= 200


def test_a_model_that_reads_entries_wrongly_in_batches_is_drawn_from_rightly() -> None:
    """Each x is one unit around its own parameter: the mean square of 2000 is 1 within .16."""
    simulations = simulate(reads_entries_wrongly, 2000, progress=False)
    error = simulations.observations["x"] - simulations.parameters["theta"][:, 0]
    assert error.square().mean().item() == pytest.approx(1.0, abs=5 * (2 / 2000) ** 0.5)


def test_noise_sites_are_not_parameters() -> None:
    assert set(simulate(two_moons, 5, progress=False).parameters) == {"theta", "angle", "radius"}
    simulations = simulate(two_moons, 5, parameters=["theta"], progress=False)
    assert set(simulations.parameters) == {"theta"}


def test_several_observed_sites_and_arguments() -> None:
    def model(scale: float, shift: float = 0.0) -> None:
        theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(theta, scale))
        pyro.sample("y", dist.Normal(theta + shift, scale))

    simulations = simulate(
        model, 50, ["x", "y"], args=(1e-3,), kwargs={"shift": 100.0}, progress=False
    )
    x, y = (simulations.observations[name] for name in ("x", "y"))
    torch.testing.assert_close(y - x, torch.full((50,), 100.0), rtol=0, atol=0.02)


# Reproducibility


def test_the_seed_determines_the_draws_and_nothing_else_does() -> None:
    torch.manual_seed(1)
    one = simulate(black_box, 30, seed=3, progress=False)
    states = torch.get_rng_state(), np.random.get_state()[1].sum(), random.getstate()  # noqa: NPY002
    torch.manual_seed(2)
    assert same(one, simulate(black_box, 30, seed=3, progress=False))
    assert not same(one, simulate(black_box, 30, seed=4, progress=False))
    torch.manual_seed(1)
    simulate(black_box, 30, progress=False)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert np.random.get_state()[1].sum() == states[1]  # noqa: NPY002
    assert random.getstate() == states[2]


@pytest.mark.parametrize("model", [two_moons, black_box])
def test_the_executor_makes_no_difference(model: Callable) -> None:
    alone = simulate(model, 70, batch_size=20, progress=False)
    with ThreadPoolExecutor(3) as executor:
        threads = simulate(model, 70, batch_size=20, executor=executor, progress=False)
    assert same(alone, threads)


def test_processes_make_no_difference() -> None:
    alone = simulate(black_box, 70, batch_size=20, progress=False)
    with ProcessPoolExecutor(2, get_context("spawn")) as executor:
        processes = simulate(black_box, 70, batch_size=20, executor=executor, progress=False)
    assert same(alone, processes)


def test_whole_numbers_at_first_do_not_round_what_follows() -> None:
    def rectified() -> None:
        theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
        pyro.deterministic("x", torch.as_tensor(max(theta.item(), 0)))

    seeds = (seed for seed in range(100) if _first(rectified, seed).dtype == torch.int64)
    simulations = simulate(rectified, 20, batch_size=1, seed=next(seeds), progress=False)
    theta = simulations.parameters["theta"]
    assert torch.equal(simulations.observations["x"], theta.clamp(min=0))


def _first(model: Callable, seed: int) -> torch.Tensor:
    return simulate(model, 1, seed=seed, progress=False).observations["x"]


def test_handlers_outside_do_not_see_the_runs() -> None:
    outside = pyro.poutine.trace()
    with outside:
        simulate(conjugate, 10, progress=False)
    assert not outside.trace.nodes


# Storage


def test_a_paused_simulation_goes_on(tmp_path: Path) -> None:
    whole = simulate(conjugate, 100, batch_size=30, progress=False)
    simulate(conjugate, 60, batch_size=30, path=tmp_path, progress=False)
    written = {file: file.stat().st_mtime_ns for file in tmp_path.glob("chunk-*")}
    assert len(written) == 2
    resumed = simulate(conjugate, 100, batch_size=30, path=tmp_path, progress=False)
    assert same(whole, resumed)
    assert all(file.stat().st_mtime_ns == time for file, time in written.items())


def test_a_paused_simulation_keeps_its_sites_apart(tmp_path: Path) -> None:
    """Files name their tensors in another order than the model does."""

    def model() -> None:
        width = pyro.sample("width", dist.Uniform(10.0, 11.0))
        height = pyro.sample("height", dist.Uniform(20.0, 21.0))
        pyro.sample("x", dist.Normal(width * height, 1.0))

    simulate(model, 60, batch_size=30, path=tmp_path, progress=False)
    resumed = simulate(model, 100, batch_size=30, path=tmp_path, progress=False)
    assert same(resumed, simulate(model, 100, batch_size=30, progress=False))
    assert (resumed.parameters["width"] < 12).all()
    assert (resumed.parameters["height"] > 19).all()


def test_a_folder_of_other_simulations_is_refused(tmp_path: Path) -> None:
    simulate(conjugate, 10, path=tmp_path, progress=False)
    with pytest.raises(ValueError, match="holds other simulations"):
        simulate(conjugate, 10, seed=1, path=tmp_path, progress=False)


def test_a_folder_of_other_shapes_is_refused(tmp_path: Path) -> None:
    simulate(conjugate, 10, args=(3,), path=tmp_path, progress=False)
    with pytest.raises(ValueError, match=r"holds other simulations: of .*'x': \(3,\)"):
        simulate(conjugate, 10, args=(4,), path=tmp_path, progress=False)


def test_fewer_draws_than_a_folder_holds_leave_it_as_it_is(tmp_path: Path) -> None:
    whole = simulate(conjugate, 60, batch_size=30, path=tmp_path, progress=False)
    fewer = simulate(conjugate, 40, batch_size=30, path=tmp_path, progress=False)
    assert same(fewer, whole[:40])
    assert same(whole, simulate(conjugate, 60, batch_size=30, path=tmp_path, progress=False))


def test_simulations_survive_a_file(tmp_path: Path) -> None:
    simulations = simulate(two_moons, 20, progress=False)
    simulations.save(tmp_path / "draws.safetensors")
    assert same(simulations, Simulations.load(tmp_path / "draws.safetensors"))


def test_draws_can_be_selected_and_must_agree_in_number() -> None:
    simulations = simulate(conjugate, 20, progress=False)
    assert len(simulations[5:]) == 15
    assert len(simulations[torch.tensor([1, 3])]) == 2
    with pytest.raises(ValueError, match="same number of draws"):
        Simulations({"theta": torch.zeros(3)}, {"x": torch.zeros(4)})


# Failures


def test_no_draws_are_all_valid() -> None:
    nothing = simulate(conjugate, 20, progress=False)[:0]
    assert len(nothing.valid()) == 0


def test_invalid_draws_are_left_out_and_counted() -> None:
    with pytest.warns(UserWarning, match=r"of 400 simulations hold numbers that are not finite"):
        simulations = simulate(sometimes_invalid, 400, progress=False)
    assert (simulations.parameters["theta"] > 0).all()
    assert simulations.num_invalid + len(simulations) == 400
    assert 100 < len(simulations) < 300


def test_nothing_valid_is_an_error() -> None:
    def model() -> None:
        theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
        pyro.deterministic("x", theta + torch.nan)

    with pytest.raises(ValueError, match="all 20 simulations hold numbers that are not finite"):
        simulate(model, 20, progress=False)


def test_a_simulator_that_raises_tells_where_and_keeps_the_rest() -> None:
    with pytest.raises(SimulationError, match="ValueError: theta is too large; parameters") as info:
        simulate(sometimes_raises, 2000, batch_size=10, progress=False)
    assert info.value.parameters["theta"] > 2.0
    assert info.value.simulations is not None
    assert len(info.value.simulations) > 0
    assert (info.value.simulations.parameters["theta"] <= 2.0).all()
    assert isinstance(info.value.__cause__, ValueError)


@pytest.mark.parametrize("name", ["num_simulations", "batch_size"])
def test_impossible_numbers_are_refused(name: str) -> None:
    arguments = {"num_simulations": 10, "batch_size": 10, name: 0}
    with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
        simulate(conjugate, **arguments, progress=False)


def test_unknown_observed_sites_are_refused() -> None:
    with pytest.raises(ValueError, match=r"observed \['y'\] are not sites"):
        simulate(conjugate, 10, "y", progress=False)
