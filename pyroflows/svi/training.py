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
WINDOW = 500  # steps averaged to see whether the loss still falls
DECAY_FRACTION = 0.5  # length of the decay, as a fraction of the steps before it
BATCH_GROWTH = (1, 2, 4)  # of each third of the decay
CHECK_INTERVAL = 50  # steps between checks, and between snapshots to go back to
CLIP_FACTOR = 3.0  # gradients are clipped at this multiple of their running norm
OUTLIER_FACTOR = 300.0  # and those of single draws at this multiple of their median
DIVERGENCE_FACTOR = 20.0  # a loss this many deviations above the best has diverged
LEAP_FACTOR = 4.0  # and one that rises by this multiple of its last change, while it is annealed
MAX_RECOVERIES = 10
NORMAL_DEVIATION = 1.4826  # of a normal variable, for a median absolute deviation of 1
WILD = 4.0  # deviations
MAX_WILD = 0.05  # share of the losses


def train(
    loss_function: Callable[[int], Tensor],
    parameters: Sequence[Tensor],
    num_steps: int,
    learning_rate: float,
    progress: bool = True,
    num_annealed: int = 0,
    stop_early: bool = True,
) -> Tensor:
    """Minimise a stochastic loss by Adam and return its values, one a step.

    The learning rate warms up, is held until the loss no longer falls by more than its Monte Carlo
    error, and then decays, while the batch grows: ``loss_function`` takes by how much to multiply
    its number of draws. ``num_steps`` bounds the whole. Gradients are clipped relative to their
    running norm. Where a step is not finite or the loss has diverged, the parameters go back to
    the best snapshot and the learning rate is halved, with a warning. An interrupt (Ctrl-C) ends
    the loop early and keeps what was learned. In the first ``num_annealed`` steps the loss itself
    is changing: it has diverged then if it leaps, and says nothing of convergence. Without
    ``stop_early`` all steps are made.

    Raises
    ------
    FloatingPointError
        If this keeps happening.
    """
    run = _Run(parameters, num_steps, learning_rate, num_annealed, stop_early)
    with torch.enable_grad(), tqdm(total=num_steps, disable=not progress, desc="fit") as bar:
        try:
            while not run.is_over():
                if run.step(loss_function):
                    bar.update()
                    if len(run.losses) % CHECK_INTERVAL == 0:
                        run.check()
                        bar.set_postfix(ELBO=f"{-_median(run.losses[-CHECK_INTERVAL:]):.3f}")
        except KeyboardInterrupt:
            warnings.warn(
                f"interrupted after {len(run.losses)} steps: the result holds what was learned "
                "so far",
                stacklevel=3,
            )
    return torch.tensor(run.losses)


class _Run:
    """Hold the state of an optimisation."""

    def __init__(
        self,
        parameters: Sequence[Tensor],
        num_steps: int,
        learning_rate: float,
        num_annealed: int,
        stop_early: bool,
    ) -> None:
        self.parameters = parameters
        self.learning_rate = learning_rate
        self.num_annealed = num_annealed
        self.schedule = Schedule(num_steps, num_annealed, stop_early)
        self.optimizer = torch.optim.Adam(parameters, learning_rate)
        self.clip = _RelativeClip()
        self.losses: list[float] = []
        self.recoveries = 0
        self.best = self.second = _Snapshot(self.parameters, self.optimizer)
        self.restored: _Snapshot | None = None

    def is_over(self) -> bool:
        """Tell whether all steps are done."""
        return self.schedule.is_over(self.losses)

    def step(self, loss_function: Callable[[int], Tensor]) -> bool:
        """Make one step; return whether it was finite and hence made."""
        rate = self.learning_rate * self.schedule.factor(len(self.losses)) * 0.5**self.recoveries
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.zero_grad()
        loss = loss_function(self.schedule.growth(len(self.losses)))
        loss.backward()
        norm = self.clip(self.parameters)
        value = float(loss.detach())
        if not (math.isfinite(value) and math.isfinite(norm)):
            self._recover("the loss or its gradient is not finite")
            return False
        self.optimizer.step()
        self.losses.append(value)
        return True

    def check(self) -> None:
        """Take a snapshot if the loss has not risen; go back to the best one if it has diverged."""
        recent = torch.tensor(self.losses[-CHECK_INTERVAL:], dtype=torch.float64)
        median = recent.median().item()
        deviation = (recent - median).abs().median().item()
        if median > self.best.loss + max(1.0, DIVERGENCE_FACTOR * self.best.deviation):
            self._recover(f"the loss has risen from {self.best.loss:.6g} to {median:.6g}")
        elif len(self.losses) <= self.num_annealed:
            # The loss moves with what is annealed: only a leap far beyond its pace is a divergence.
            leap = LEAP_FACTOR * abs(median - self.best.loss)
            self._keep(median, max(deviation, leap / DIVERGENCE_FACTOR))
        elif median <= self.best.loss + deviation:
            self._keep(min(median, self.best.loss), deviation)

    def _keep(self, loss: float, deviation: float) -> None:
        self.second = self.best
        self.best = _Snapshot(self.parameters, self.optimizer, len(self.losses), loss, deviation)

    def _recover(self, reason: str) -> None:
        self.recoveries += 1
        step = len(self.losses)
        if self.recoveries > MAX_RECOVERIES:
            raise FloatingPointError(
                f"{reason} at step {step}, after {MAX_RECOVERIES} restarts, each at half the "
                "learning rate: look for log-densities that overflow, lower learning_rate, raise "
                "num_particles, or use float64"
            )
        if self.restored is self.best:  # it led nowhere: the last of its steps were bad already
            self.best = self.second
        self.restored = self.best
        warnings.warn(
            f"{reason} at step {step}: went back to step {self.best.step} and halved the learning "
            "rate",
            stacklevel=5,
        )
        self.best.restore(self.parameters, self.optimizer)


class Schedule:
    """Say how large a step is, and its batch: warm up, hold until converged, decay and grow."""

    def __init__(self, num_steps: int, num_annealed: int = 0, stop_early: bool = True) -> None:
        self.num_steps = num_steps
        self.num_annealed = num_annealed
        self.stop_early = stop_early
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

    def growth(self, step: int) -> int:
        """Return the size of the batch at a step, relative to that at the start."""
        if step < self.decay_start:
            return 1
        done = (step - self.decay_start) / (self.end - self.decay_start)
        return BATCH_GROWTH[int(done * len(BATCH_GROWTH))]

    def is_over(self, losses: Sequence[float]) -> bool:
        """Tell whether all steps are done; begin the decay early if the loss has converged."""
        step = len(losses)
        is_held = step % CHECK_INTERVAL == 0 and step < self.decay_start
        if self.stop_early and is_held and has_converged(losses[self.num_annealed :]):
            self.decay_start = step
            self.end = min(self.num_steps, step + math.ceil(DECAY_FRACTION * step))
        return step >= self.end


def has_converged(losses: Sequence[float], window: int = WINDOW) -> bool:
    """Tell whether the mean loss fell by less than twice its Monte Carlo error over a window.

    Wild losses, further from their median than four robust standard deviations, count as so far:
    they say nothing of the trend, and would drown it. Where there are many of them of late,
    training is not steady and has not converged.

    Examples
    --------
    >>> has_converged([1.0, 0.9] * 550), has_converged([-float(i) for i in range(1100)])
    (True, False)
    """
    if len(losses) < 2 * window + WARM_UP_STEPS:
        return False
    recent = torch.tensor(losses[-2 * window :], dtype=torch.float64).view(2, window)
    middle = recent.quantile(0.5, 1, keepdim=True)
    reach = WILD * NORMAL_DEVIATION * (recent - middle).abs().quantile(0.5, 1, keepdim=True)
    if float((recent > middle + reach)[1].double().mean()) > MAX_WILD:
        return False
    tame = recent.clamp(middle - reach, middle + reach)
    before, after = tame.mean(1).tolist()
    error = math.sqrt(float(tame.var(1).sum()) / window)
    return before - after <= 2 * error


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


def clip_outliers(draws: Tensor) -> Tensor:
    """Return draws ``(S, D)`` whose gradients are clipped at 300 times the median of their norms.

    Far in the tails a log-density can be so steep that a single draw outweighs all others. It is
    steep in narrow parts of a posterior too, which a guide learns from few draws: clipped at 100
    times the median, funnels lose their necks.
    """

    def clip(gradient: Tensor) -> Tensor:
        norms = gradient.norm(dim=-1, keepdim=True)
        limit = OUTLIER_FACTOR * norms.median()
        return torch.where((norms > limit) & (limit > 0), gradient * (limit / norms), gradient)

    if draws.requires_grad:
        draws.register_hook(clip)
    return draws


class _RelativeClip:
    """Clip gradients at a multiple of their running norm, which needs no scale from the user."""

    def __init__(self) -> None:
        self.log_running: float | None = None

    def __call__(self, parameters: Sequence[Tensor]) -> float:
        limit = math.inf if self.log_running is None else CLIP_FACTOR * math.exp(self.log_running)
        norm = float(torch.nn.utils.clip_grad_norm_(parameters, limit))
        if 0 < norm < math.inf:
            log_norm = math.log(min(norm, limit))
            before = log_norm if self.log_running is None else self.log_running
            self.log_running = 0.95 * before + 0.05 * log_norm
        return norm


class _Snapshot:
    """Hold a copy of parameters and optimizer to go back to, and the loss there."""

    def __init__(
        self,
        parameters: Sequence[Tensor],
        optimizer: torch.optim.Optimizer,
        step: int = 0,
        loss: float = math.inf,
        deviation: float = math.inf,
    ) -> None:
        self.step = step
        self.loss = loss
        self.deviation = deviation
        self.parameters = [parameter.detach().clone() for parameter in parameters]
        self.optimizer = copy.deepcopy(optimizer.state_dict())

    @torch.no_grad()
    def restore(self, parameters: Sequence[Tensor], optimizer: torch.optim.Optimizer) -> None:
        """Go back to the snapshot."""
        for parameter, saved in zip(parameters, self.parameters, strict=True):
            parameter.copy_(saved)
        optimizer.load_state_dict(copy.deepcopy(self.optimizer))


def _median(values: Sequence[float]) -> float:
    return torch.tensor(values, dtype=torch.float64).median().item()
