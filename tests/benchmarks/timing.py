"""Times calls in turn."""

import time
from collections.abc import Callable

import torch

SLOW_SECONDS, SLOW_ROUNDS = 1.0, 2


def interleave(
    calls: dict[str, Callable[[], object]], repeats: int, budget: float
) -> dict[str, list[float]]:
    """Time the calls in turn, so that a drift of the machine meets all of them alike."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(1 + repeats):
        for name, call in calls.items():
            if affordable(times[name], budget):
                times[name].append(seconds(call))
    # The first round warms up.
    return {name: taken[1:] for name, taken in times.items()}


def affordable(times: list[float], budget: float) -> bool:
    """Decide whether a call that took these times may run once more."""
    if not times:
        return True
    slow = max(times) > SLOW_SECONDS and len(times) > SLOW_ROUNDS
    return not slow and sum(times) + times[-1] <= budget


def seconds(call: Callable[[], object]) -> float:
    """Time one call."""
    synchronise()
    start = time.perf_counter()
    call()
    synchronise()
    return time.perf_counter() - start


def synchronise() -> None:
    """Wait for the device to finish."""
    if torch.get_default_device().type == "cuda":
        torch.cuda.synchronize()
