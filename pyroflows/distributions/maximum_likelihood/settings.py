"""The settings of a fit."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Settings:
    """Hold the numbers that determine a fit, checked."""

    num_steps: int
    batch_size: int
    learning_rate: float
    weight_decay: float
    validation_fraction: float
    patience: int | None
    standardize: bool
    seed: int

    def __post_init__(self) -> None:
        counts = {"num_steps": 1, "batch_size": 1, "patience": 1, "seed": 0}
        for name, minimum in counts.items():
            value = getattr(self, name)
            if value is None and name == "patience":
                continue
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"{name} must be an integer, got {value!r}")
            if value < minimum:
                raise ValueError(f"{name} must be at least {minimum}, got {value}")
        if not 0 < self.learning_rate < float("inf"):
            raise ValueError(f"learning_rate must be positive, got {self.learning_rate}")
        if not 0 <= self.weight_decay < float("inf"):
            raise ValueError(f"weight_decay must not be negative, got {self.weight_decay}")
        if not 0 <= self.validation_fraction < 1:
            raise ValueError(
                f"validation_fraction must lie in [0, 1), got {self.validation_fraction}"
            )

    @property
    def steps_to_wait(self) -> int:
        """Return the number of steps after which training stops if nothing gets better."""
        return max(1, self.num_steps // 5) if self.patience is None else self.patience
