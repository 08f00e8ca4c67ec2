"""What a run of simulation-based inference may cost, in full and in fast mode."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Budget:
    """Hold the numbers of simulations, training steps, draws, and replicates of the calibration."""

    num_simulations: int = 10_000
    num_steps: int | None = None
    num_draws: int = 10_000
    num_replicates: int = 500
    num_ranked: int = 200

    @classmethod
    def of(cls, fast: bool) -> Budget:
        """Return the budget of a rough or of a full run."""
        return cls(3000, 600, 1000, 100, 100) if fast else cls()

    @property
    def training(self) -> dict[str, Any]:
        """Return the settings of the training that differ from the defaults."""
        return {} if self.num_steps is None else {"num_steps": self.num_steps}
