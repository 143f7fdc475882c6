"""The family of objectives in one table.

A new member is one file for its surrogate, one row here, and its name in `settings.LOSS_TYPES`.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from gmpo.objective.aggregate import (
    mean_of_row_means,
    mean_of_row_sums,
    mean_over_micro_batch_tokens,
    mean_over_tokens,
    sum_over_token_budget,
)
from gmpo.objective.cispo import cispo
from gmpo.objective.clipped import clipped
from gmpo.objective.gmpo import gmpo
from gmpo.objective.sapo import sapo
from gmpo.objective.settings import ObjectiveSettings
from gmpo.objective.types import Denominators, Surrogate
from gmpo.objective.vespo import vespo


@dataclass(frozen=True, slots=True)
class Member:
    """The cost of a ratio, and the average over rows and tokens."""

    surrogate: Callable[..., Surrogate]  # its keyword arguments are the options that it reads
    aggregate: Callable[[Tensor, Tensor, Denominators], Tensor]

    @property
    def depends_on_micro_batches(self) -> bool:
        """True if the aggregate divides by counts of the micro-batch; found by asking it."""
        one, mask = torch.ones(1, 1), torch.ones(1, 1, dtype=torch.bool)
        counts = Denominators(
            num_rows=2, tokens=3, micro_batch_tokens=5, micro_batches=7, max_completion_length=11
        )
        other = replace(counts, micro_batch_tokens=6, micro_batches=8, micro_batch_selected=9)
        return bool(self.aggregate(one, mask, counts) != self.aggregate(one, mask, other))

    @property
    def options(self) -> tuple[str, ...]:
        """Names of the options that the surrogate reads."""
        parameters = inspect.signature(self.surrogate).parameters.values()
        return tuple(p.name for p in parameters if p.kind is p.KEYWORD_ONLY)


FAMILY = {
    "gmpo": Member(gmpo, mean_of_row_means),
    "grpo": Member(clipped, mean_of_row_means),
    "bnpo": Member(clipped, mean_over_micro_batch_tokens),
    "dr_grpo": Member(clipped, sum_over_token_budget),
    "dapo": Member(clipped, mean_over_tokens),
    "luspo": Member(clipped, mean_of_row_sums),
    "cispo": Member(cispo, mean_over_tokens),
    "sapo": Member(sapo, mean_of_row_means),
    "vespo": Member(vespo, mean_over_tokens),
}


def member_name(settings: ObjectiveSettings, *, algorithm: str) -> str:
    """Return the key in `FAMILY` of the objective that a trainer minimises.

    Args:
        settings: Of the objective, or of a whole run.
        algorithm: "gmpo" (GMPOTrainer) or "grpo" (GRPOTrainer).

    Raises:
        ValueError: If `loss_type` belongs to the other trainer.
    """
    asked = settings.loss_type
    if algorithm == "grpo":
        if asked == "gmpo":
            raise ValueError(
                "loss_type='gmpo' is GMPOTrainer's. Use GMPOTrainer with GMPOConfig: "
                "epsilon is in log space there."
            )
        return asked
    if asked not in ("gmpo", "dapo"):
        raise ValueError(
            f"loss_type={asked!r} is not GMPO: GMPOTrainer takes 'gmpo' or the inherited default "
            f"'dapo'. Use GRPOTrainer with GRPOConfig for {asked!r}."
        )
    return "gmpo"
