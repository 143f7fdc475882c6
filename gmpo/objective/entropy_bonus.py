"""The entropy bonus's coefficient: constant, or steered toward a target."""

import math

from gmpo.objective.settings import ObjectiveSettings


class EntropyController:
    """The coefficient of the entropy bonus, between optimizer steps.

    It is constant unless `use_adaptive_entropy`.  Adaptive, it starts at `entropy_coef` moved into
    its range, goes up by `entropy_coef_delta` after a step whose mean entropy was below the target,
    and down after one above it.  It acts only while the last entropy was at or under the target,
    hence not before the first update.

    Example:
        coefficient 0.1, delta 0.01, target 0.2; entropies 0.3, 0.15, 0.18 after steps 1, 2, 3
        -> coefficient 0.09, 0.10, 0.11; in steps 2, 3, 4 it acts as 0, 0.10, 0.11

    Source: Skywork-OR1, arXiv:2505.22312.
    """

    def __init__(self, settings: ObjectiveSettings) -> None:
        self.adaptive = settings.use_adaptive_entropy
        self.low, self.high = settings.entropy_coef_min, settings.entropy_coef_max
        self.step, self.target = settings.entropy_coef_delta, settings.entropy_target
        start = settings.entropy_coef
        self.coefficient = min(max(start, self.low), self.high) if self.adaptive else start
        self.last_entropy = math.inf  # nats per token; infinite before the first measurement

    @property
    def is_on(self) -> bool:
        """True if there is a bonus, even in steps in which it does not act."""
        return self.adaptive or self.coefficient != 0.0

    @property
    def coef(self) -> float:
        """The coefficient for `Objective.loss` in this optimizer step."""
        acts = not self.adaptive or self.last_entropy <= self.target
        return self.coefficient if acts else 0.0

    def update(self, mean_entropy: float) -> None:
        """Move the coefficient after an optimizer step.

        Args:
            mean_entropy: Over the counted tokens of all ranks (with `top_entropy_quantile`, the
                selected ones), in nats; NaN changes nothing.
        """
        if not self.adaptive or math.isnan(mean_entropy):
            return
        self.last_entropy = mean_entropy
        direction = (mean_entropy < self.target) - (mean_entropy > self.target)
        self.coefficient = min(max(self.coefficient + direction * self.step, self.low), self.high)

    def state_dict(self) -> dict[str, float | None]:
        """Return what moves; JSON has no infinity, so an entropy not yet measured is None."""
        measured = None if math.isinf(self.last_entropy) else self.last_entropy
        return {"coefficient": self.coefficient, "last_entropy": measured}

    def load_state_dict(self, state: dict[str, float | None]) -> None:
        """Take what `state_dict` gave."""
        coefficient, measured = state["coefficient"], state["last_entropy"]
        assert coefficient is not None
        self.coefficient = coefficient
        self.last_entropy = math.inf if measured is None else measured
