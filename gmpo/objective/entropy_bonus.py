"""The entropy bonus's coefficient: constant, or steered toward a target."""

import math
from typing import Any

from gmpo.objective.settings import ObjectiveSettings


class EntropyController:
    """Holds the coefficient between optimizer steps.

    Constant unless `use_adaptive_entropy`.  Adaptive: starts at `entropy_coef` moved into its range, goes up by
    `entropy_coef_delta` after a step whose mean entropy was below the target, and down after one above it.  It acts
    only while the last entropy was at or under the target, hence not before the first update.

    Source: Skywork-OR1, arXiv:2505.22312.
    """

    def __init__(self, settings: ObjectiveSettings):
        self.adaptive = settings.use_adaptive_entropy
        self.low, self.high = settings.entropy_coef_min, settings.entropy_coef_max
        self.step, self.target = settings.entropy_coef_delta, settings.entropy_target
        start = settings.entropy_coef
        self.coefficient = min(max(start, self.low), self.high) if self.adaptive else start
        self.last_entropy = math.inf  # nats per token; not measured yet

    @property
    def coef(self) -> float:
        """What to pass to `Objective.loss` in this optimizer step."""
        return self.coefficient if not self.adaptive or self.last_entropy <= self.target else 0.0

    def update(self, mean_entropy: float) -> None:
        """After an optimizer step, with its mean entropy over the counted tokens of all ranks; NaN changes nothing."""
        if not self.adaptive or math.isnan(mean_entropy):
            return
        self.last_entropy = mean_entropy
        direction = (mean_entropy < self.target) - (mean_entropy > self.target)
        self.coefficient = min(max(self.coefficient + direction * self.step, self.low), self.high)

    def state_dict(self) -> dict[str, Any]:
        return {"coefficient": self.coefficient, "last_entropy": self.last_entropy}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.coefficient, self.last_entropy = state["coefficient"], state["last_entropy"]
