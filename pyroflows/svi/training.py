"""The optimisation loop of variational inference."""

from __future__ import annotations

import contextlib
import copy
import math
import warnings
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor
from tqdm.auto import tqdm

WARM_UP_STEPS = 100
WINDOW = 250  # steps averaged to see whether the loss still falls
DECAY_FRACTION = 0.5  # length of the decay, as a fraction of the steps before it
SNAPSHOT_INTERVAL = 50
CLIP_FACTOR = 3.0  # gradients are clipped at this multiple of their running norm
MAX_RECOVERIES = 10


def train(
    loss_function: Callable[[], Tensor],
    parameters: Sequence[Tensor],
    num_steps: int,
    learning_rate: float,
    progress: bool = True,
) -> Tensor:
    """Minimise a stochastic loss by Adam and return its values, one a step.

    The learning rate warms up, is held until the loss no longer falls by more than its Monte Carlo
    error, and then decays; ``num_steps`` bounds the whole. Gradients are clipped relative to their
    running norm. A step that is not finite is undone: the parameters go back to the last snapshot
    and the learning rate is halved, with a warning. An interrupt (Ctrl-C) ends the loop early and
    keeps what was learned.

    Raises
    ------
    FloatingPointError
        If the loss keeps being not finite.
    """
    schedule = Schedule(num_steps)
    optimizer = torch.optim.Adam(parameters, learning_rate)
    snapshot = _Snapshot(parameters, optimizer)
    clip = _RelativeClip()
    losses: list[float] = []
    recoveries = 0
    with torch.enable_grad(), tqdm(total=num_steps, disable=not progress, desc="fit") as bar:
        try:
            while not schedule.is_over(losses):
                rate = learning_rate * schedule.factor(len(losses)) * 0.5**recoveries
                for group in optimizer.param_groups:
                    group["lr"] = rate
                optimizer.zero_grad()
                loss = loss_function()
                loss.backward()
                norm = clip(parameters)
                value = float(loss.detach())
                if not (math.isfinite(value) and math.isfinite(norm)):
                    recoveries += 1
                    snapshot.restore(parameters, optimizer, len(losses), recoveries)
                    continue
                optimizer.step()
                losses.append(value)
                if len(losses) % SNAPSHOT_INTERVAL == 0:
                    snapshot = _Snapshot(parameters, optimizer, len(losses))
                    bar.set_postfix(
                        ELBO=f"{-sum(losses[-SNAPSHOT_INTERVAL:]) / SNAPSHOT_INTERVAL:.3f}"
                    )
                bar.update()
        except KeyboardInterrupt:
            warnings.warn(
                f"interrupted after {len(losses)} steps: the result holds what was learned so far",
                stacklevel=3,
            )
    return torch.tensor(losses)


class Schedule:
    """Say how large a step is: warm up, hold until converged, decay."""

    def __init__(self, num_steps: int) -> None:
        self.num_steps = num_steps
        self.warm_up = min(WARM_UP_STEPS, num_steps // 10)
        self.decay_start = math.ceil(num_steps / (1 + DECAY_FRACTION))
        self.end = num_steps

    def factor(self, step: int) -> float:
        """Return the learning rate at a step, relative to its peak."""
        if step < self.warm_up:
            return (step + 1) / self.warm_up
        if step < self.decay_start:
            return 1.0
        remaining = (self.end - step) / (self.end - self.decay_start)
        return 0.01 + 0.99 * 0.5 * (1 - math.cos(math.pi * remaining))

    def is_over(self, losses: Sequence[float]) -> bool:
        """Tell whether all steps are done; begin the decay early if the loss has converged."""
        step = len(losses)
        if step % SNAPSHOT_INTERVAL == 0 and step < self.decay_start and has_converged(losses):
            self.decay_start = step
            self.end = min(self.num_steps, step + math.ceil(DECAY_FRACTION * step))
        return step >= self.end


def has_converged(losses: Sequence[float], window: int = WINDOW) -> bool:
    """Tell whether the mean loss fell by less than twice its Monte Carlo error over a window.

    Examples
    --------
    >>> has_converged([1.0, 0.9] * 300), has_converged([-float(i) for i in range(600)])
    (True, False)
    """
    if len(losses) < 2 * window + WARM_UP_STEPS:
        return False
    recent = torch.tensor(losses[-2 * window :], dtype=torch.float64).view(2, window)
    before, after = recent.mean(1).tolist()
    error = math.sqrt(float(recent.var(1).sum()) / window)
    return before - after < 2 * error


@contextlib.contextmanager
def frozen(parameters: Sequence[Tensor]) -> Iterator[None]:
    """Treat parameters as constants within a ``with`` block."""
    learned = [parameter for parameter in parameters if parameter.requires_grad]
    try:
        for parameter in learned:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in learned:
            parameter.requires_grad_(True)


class _RelativeClip:
    """Clip gradients at a multiple of their running norm, which needs no scale from the user."""

    def __init__(self) -> None:
        self.running: float | None = None

    def __call__(self, parameters: Sequence[Tensor]) -> float:
        limit = math.inf if self.running is None else CLIP_FACTOR * self.running
        norm = float(torch.nn.utils.clip_grad_norm_(parameters, limit))
        if math.isfinite(norm):
            clipped = min(norm, limit)
            self.running = clipped if self.running is None else 0.95 * self.running + 0.05 * clipped
        return norm


class _Snapshot:
    """Hold a copy of parameters and optimizer to go back to."""

    def __init__(
        self, parameters: Sequence[Tensor], optimizer: torch.optim.Optimizer, step: int = 0
    ) -> None:
        self.step = step
        self.parameters = [parameter.detach().clone() for parameter in parameters]
        self.optimizer = copy.deepcopy(optimizer.state_dict())

    @torch.no_grad()
    def restore(
        self,
        parameters: Sequence[Tensor],
        optimizer: torch.optim.Optimizer,
        step: int,
        recoveries: int,
    ) -> None:
        """Go back to the snapshot, with a warning."""
        if recoveries > MAX_RECOVERIES:
            raise FloatingPointError(
                f"the ELBO or its gradient was not finite {recoveries} times, last at step {step}, "
                "each time at half the learning rate: look for log-densities that overflow, "
                "lower learning_rate, raise num_particles, or use float64"
            )
        warnings.warn(
            f"the ELBO or its gradient is not finite at step {step}: went back to step "
            f"{self.step} and halved the learning rate",
            stacklevel=5,
        )
        for parameter, saved in zip(parameters, self.parameters, strict=True):
            parameter.copy_(saved)
        optimizer.load_state_dict(copy.deepcopy(self.optimizer))
