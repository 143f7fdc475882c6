"""SAPO: a smooth gate on the ratio instead of a clip."""

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
    """Return the cost of each token, with weight w = exp(log_weights) and tau by the sign of A:

        loss = -A sigmoid( tau (w - 1) ) 4 / tau

    At w = 1 its slope in w is -A, as GRPO's.  It fades on both sides, faster for a larger tau.

    Args:
        x: Log-ratios and selected tokens [B, T], advantages [B, 1], correction.
        sapo_temperature_pos: tau for A > 0.
        sapo_temperature_neg: tau for A <= 0.
        importance_sampling_level: "token" or "sequence", as for `log_weights`.

    Source: arXiv:2511.20347.
    """
    # The gate is flat long before the limit; beyond it, a zero slope times an infinite ratio would
    # be NaN.
    log_weight = log_weights(x, importance_sampling_level).clamp(max=EXPONENT_LIMIT)
    ratio = log_weight.exp()  # [B, T]

    tau = torch.full_like(x.advantages, sapo_temperature_pos)
    tau = tau.where(x.advantages > 0, sapo_temperature_neg)
    gate = torch.sigmoid(tau * (ratio - 1)) * 4 / tau

    nowhere = torch.zeros_like(x.select)
    return Surrogate(
        loss=charged(x, -x.advantages * gate),
        capped_low=nowhere,
        capped_high=nowhere,
        ratio=row_mean(ratio.detach(), x.select),
    )
