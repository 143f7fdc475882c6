"""SAPO: a smooth gate on the ratio in place of a clip."""

import torch

from gmpo.objective.aggregate import row_mean
from gmpo.objective.per_token import EXPONENT_LIMIT, charged, log_weights
from gmpo.objective.types import Surrogate, SurrogateInputs


def sapo(
    x: SurrogateInputs,
    *,
    sapo_temperature_pos: float,
    sapo_temperature_neg: float,
    importance_sampling_level: str = "token",
) -> Surrogate:
    """Cost of a token: -A sigmoid(tau (w - 1)) 4 / tau, with tau by the sign of A.

    Its slope in w is -A at w = 1, as GRPO's, and fades on both sides, the faster the larger tau.

    Source: arXiv:2511.20347.
    """
    # The gate is flat long before the limit; beyond it, a zero slope times an infinite ratio would be NaN.
    ratio = log_weights(x, importance_sampling_level).clamp(max=EXPONENT_LIMIT).exp()
    tau = torch.full_like(x.advantages, sapo_temperature_pos).where(
        x.advantages > 0, sapo_temperature_neg
    )
    gate = torch.sigmoid(tau * (ratio - 1)) * 4 / tau
    nowhere = torch.zeros_like(x.select)
    return Surrogate(
        loss=charged(x, -x.advantages * gate),
        capped_low=nowhere,
        capped_high=nowhere,
        ratio=row_mean(ratio.detach(), x.select),
    )
