"""The optimisation loop of maximum likelihood."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ...transforms.solve import ConvergenceError
from .checkpoint import Checkpoint, State
from .data import Rows, generator, mix
from .density_fit import DensityFit
from .settings import Settings

Penalty: TypeAlias = Callable[[Tensor, Tensor | None], Tensor]

WARM_UP_STEPS = 100
FINAL_RATE = 0.01  # of the learning rate, relative to its peak
MIN_INTERVAL = 50  # steps between validations, at least
VALIDATION_SHARE = 7  # a validation may take a seventh of the steps that see as many rows
AVERAGE_INTERVAL = 5  # steps between weights that are averaged, at most
AVERAGE_SPAN = 0.02  # length of the average, as a fraction of all steps
CLIP_FACTOR = 3.0  # gradients are clipped at this multiple of their usual norm
VALIDATION_BATCHES = 4  # rows validated at a time, in batches
MAX_RECOVERIES = 10


class Density(Protocol):
    """Say what the loop asks of a density: see :class:`LearnedDensity`."""

    @property
    def module(self) -> nn.Module: ...

    def score(self, value: Tensor, context: Any, /) -> Tensor: ...

    def train(self) -> Any: ...

    def eval(self) -> Any: ...


def maximize_likelihood(
    density: Density,
    training: Rows,
    validation: Rows,
    settings: Settings,
    penalty: Penalty | None,
    progress: bool,
    path: str | Path | None,
    prepare: Callable[[], None] | None = None,
) -> DensityFit:
    """Fit a density to rows of data; see :meth:`LearnedDensity.fit`.

    What ``prepare`` does to the density comes after all that may be refused.
    """
    checkpoint = None if path is None else Checkpoint(path, settings, training, validation)
    state = None if checkpoint is None else checkpoint.read()
    torch.manual_seed(mix(settings.seed, 3))
    if prepare is not None:
        prepare()
    run = _Run(density, training, validation, settings, penalty)
    if state is not None:
        run.restore(state)
    if checkpoint is not None:
        checkpoint.write(run.state, at_once=True)
    interrupted = False
    try:
        with tqdm(
            total=settings.num_steps, initial=run.state.step, disable=not progress, desc="fit"
        ) as bar:
            while not run.is_over():
                run.round(bar)
                if checkpoint is not None:
                    checkpoint.write(run.state, at_once=run.is_over())
    except KeyboardInterrupt:
        interrupted = True
        if checkpoint is not None:
            checkpoint.write(run.state, at_once=True)
        warnings.warn(
            f"interrupted: the density has its best weights, those after {run.state.best_step} "
            f"of {settings.num_steps} steps",
            stacklevel=3,
        )
    finally:
        run.finish()
    return run.result(interrupted)


class _Run:
    """Train a density round by round; a round ends with a validation and a state to go back to."""

    def __init__(
        self,
        density: Density,
        training: Rows,
        validation: Rows,
        settings: Settings,
        penalty: Penalty | None,
    ) -> None:
        self.density = density
        self.validation = validation
        self.settings = settings
        self.penalty = penalty
        self.batches = _Batches(training, settings.batch_size, settings.seed)
        self.interval = max(MIN_INTERVAL, VALIDATION_SHARE * len(validation) // self.batches.size)
        self.parameters = {
            name: p for name, p in density.module.named_parameters() if p.requires_grad
        }
        self.optimizer = torch.optim.AdamW(
            self.parameters.values(),
            settings.learning_rate,
            weight_decay=settings.weight_decay,
            fused=True,  # several times faster where there are many small tensors
        )
        self.average = _copy(self.parameters)
        self.average_interval = AVERAGE_INTERVAL if settings.num_steps > WARM_UP_STEPS else 1
        weights, none = _copy(density.module.state_dict()), torch.zeros(0, dtype=torch.float64)
        self.state = State(weights, weights, _copy(self.average), {}, none, none, none.long())

    def is_over(self) -> bool:
        """Tell whether all steps are done, or none has been of use for a long time."""
        waited = self.state.step - self.state.best_step
        has_stalled = len(self.validation) > 0 and waited >= self.settings.steps_to_wait
        return has_stalled or self.state.step >= self.settings.num_steps

    def round(self, bar: tqdm) -> None:
        """Make the steps up to the next validation, or go back to the last one."""
        start, first = time.monotonic(), self.state.step
        last = min(first + self.interval, self.settings.num_steps)
        # What is drawn depends on where the training is, not on how it came there.
        torch.manual_seed(mix(self.settings.seed, 2, first, self.state.recoveries))
        self.density.train()
        try:
            steps = []
            for step in range(first, last):
                steps.append(self._step(step))
                bar.update()
            losses, norms = torch.stack(steps, 1).cpu().double()
            if not bool((losses + norms).isfinite().all()):
                raise FloatingPointError("the loss or its gradient is not finite")
            self._advance(losses, norms, start)
        except (ConvergenceError, FloatingPointError) as error:
            self._recover(error)
            bar.n = first
        bar.set_postfix(self._summary())

    def _step(self, step: int) -> Tensor:
        """Make one step; return the loss and the norm of its gradient, left on their device."""
        for group in self.optimizer.param_groups:
            group["lr"] = self._learning_rate(step)
        self.optimizer.zero_grad()
        rows = self.batches(step)
        loss = -self.density.score(rows.data, rows.context).mean()
        if self.penalty is not None:
            loss = loss + self.penalty(rows.data, rows.context)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.parameters.values(), self.state.clip)
        self.optimizer.step()
        if (step + 1) % self.average_interval == 0:
            self._update_average((step + 1) // self.average_interval)
        return torch.stack([loss.detach(), norm])

    def _learning_rate(self, step: int) -> float:
        warm_up = min(WARM_UP_STEPS, self.settings.num_steps // 10)
        rate = self.settings.learning_rate * 0.5**self.state.recoveries
        if step < warm_up:
            return rate * (step + 1) / warm_up
        done = (step - warm_up) / (self.settings.num_steps - warm_up)
        return rate * (FINAL_RATE + (1 - FINAL_RATE) * 0.5 * (1 + math.cos(math.pi * done)))

    @torch.no_grad()
    def _update_average(self, count: int) -> None:
        span = max(1.0, AVERAGE_SPAN * self.settings.num_steps / self.average_interval)
        for name, parameter in self.parameters.items():
            self.average[name].lerp_(parameter, 1 / min(count, span))

    def _advance(self, losses: Tensor, norms: Tensor, start: float) -> None:
        """Validate the averaged weights and take the state to go back to."""
        before = self.state
        state = dataclasses.replace(
            before,
            losses=torch.cat([before.losses, losses]),
            weights=_copy(self.density.module.state_dict()),
            average=_copy(self.average),
            optimizer=_flatten(self.optimizer),
            clip=CLIP_FACTOR * norms.median().item(),
        )
        with self._averaged():
            loss = self._validate()
            if not loss > before.best_loss:  # always without validation, where it is NaN
                best = _copy(self.density.module.state_dict())
                state = dataclasses.replace(state, best=best, best_step=state.step, best_loss=loss)
        if len(self.validation):
            state = dataclasses.replace(
                state,
                validation_losses=_append(before.validation_losses, loss),
                validation_steps=_append(before.validation_steps, state.step),
            )
        seconds = before.seconds + time.monotonic() - start
        self.state = dataclasses.replace(state, seconds=seconds)

    @torch.no_grad()
    def _validate(self) -> float:
        """Return the mean negative log-likelihood of the rows held out; NaN if there are none."""
        if not len(self.validation):
            return math.nan
        self.density.eval()
        total = sum(
            self.density.score(rows.data, rows.context).sum(dtype=torch.float64)
            for rows in self.validation.chunks(VALIDATION_BATCHES * self.batches.size)
        )
        loss = -float(total) / len(self.validation)
        if not math.isfinite(loss):
            raise FloatingPointError("the validation loss is not finite")
        return loss

    @contextlib.contextmanager
    def _averaged(self) -> Iterator[None]:
        """Put the averaged weights into the density for the length of a ``with`` block."""
        weights = _copy(self.parameters)
        try:
            self._load(self.average)
            yield
        finally:
            self._load(weights)

    @torch.no_grad()
    def _load(self, weights: Mapping[str, Tensor]) -> None:
        for name, parameter in self.parameters.items():
            parameter.copy_(weights[name])

    def _recover(self, error: Exception) -> None:
        """Go back to the last state with half the learning rate."""
        state = self.state
        if state.recoveries == MAX_RECOVERIES:
            raise FloatingPointError(
                f"{error} after step {state.step}, after {MAX_RECOVERIES} restarts, each at half "
                "the learning rate: look for outliers in the data, lower learning_rate, or use "
                "float64"
            ) from error
        warnings.warn(
            f"{error}: went back to step {state.step} and halved the learning rate",
            stacklevel=5,
        )
        self.restore(dataclasses.replace(state, recoveries=state.recoveries + 1))

    def restore(self, state: State) -> None:
        """Go on from a state."""
        expected = {name: value.shape for name, value in self.state.weights.items()}
        if {name: value.shape for name, value in state.weights.items()} != expected:
            raise ValueError("checkpoint holds the state of another density")
        self.density.module.load_state_dict(state.weights)
        for name, average in self.average.items():
            average.copy_(state.average[name])
        _unflatten(state.optimizer, self.optimizer)
        self.state = state

    def finish(self) -> None:
        """Keep the best weights."""
        self.density.module.load_state_dict(self.state.best)
        self.density.eval()

    def result(self, interrupted: bool) -> DensityFit:
        """Return what the fit says of itself."""
        state = self.state
        return DensityFit(
            state.losses,
            state.validation_losses,
            state.validation_steps,
            state.best_step,
            state.seconds,
            interrupted,
        )

    def _summary(self) -> dict[str, str]:
        state, summary = self.state, {}
        if state.step:
            summary["loss"] = f"{state.losses[-self.interval :].mean().item():.4f}"
        if len(state.validation_losses):
            summary["validation"] = f"{state.validation_losses[-1].item():.4f}"
        return summary


class _Batches:
    """Give the rows of each step: every epoch goes through them in a new random order."""

    def __init__(self, rows: Rows, size: int, seed: int) -> None:
        self.rows = rows
        self.size = min(size, len(rows))
        self.seed = seed
        self.epoch, self.order = -1, torch.empty(0)

    def __call__(self, step: int) -> Rows:
        epoch, position = divmod(step, len(self.rows) // self.size)
        if epoch != self.epoch:
            order = torch.randperm(len(self.rows), generator=generator(self.seed, 1, epoch))
            self.epoch, self.order = epoch, order.to(self.rows.data.device)
        return self.rows.select(self.order[position * self.size : (position + 1) * self.size])


def _copy(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def _append(values: Tensor, value: float) -> Tensor:
    return torch.cat([values, torch.tensor([value], dtype=values.dtype)])


def _flatten(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return a copy of what an optimizer remembers, as tensors by name."""
    return {
        f"{index}.{key}": value.detach().clone()
        for index, memory in optimizer.state_dict()["state"].items()
        for key, value in memory.items()
    }


def _unflatten(tensors: Mapping[str, Tensor], optimizer: torch.optim.Optimizer) -> None:
    """Give an optimizer a copy of what :func:`_flatten` has returned."""
    memory: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        index, key = name.split(".")
        memory.setdefault(int(index), {})[key] = value.clone()
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": memory, "param_groups": groups})
