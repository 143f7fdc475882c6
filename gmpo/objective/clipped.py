"""PPO's clipped ratio per token: GRPO, BNPO, Dr. GRPO, DAPO, LUSPO, GSPO."""

import math

import torch

from gmpo.objective.aggregate import row_mean
from gmpo.objective.per_token import charged, log_weights
from gmpo.objective.types import Surrogate, SurrogateInputs


def clipped(
    x: SurrogateInputs,
    *,
    epsilon: float,
    epsilon_high: float,
    delta: float | None = None,
    importance_sampling_level: str = "token",
) -> Surrogate:
    """Return the cost of each token, with weight w = exp(log_weights):

        loss = -min( min(w, delta) A, clip(w, 1 - epsilon, 1 + epsilon_high) A )
             = -A min(w, 1 + epsilon_high)               if A >= 0
               -A max(min(w, delta), 1 - epsilon)        if A <  0

    The bounds are applied to log w: the gradient of an overflowing exp would be NaN even behind a
    bound.

    Args:
        x: Log-ratios and selected tokens [B, T], advantages [B, 1], correction.
        epsilon: Distance of the lower bound of w from 1, for A < 0.
        epsilon_high: Distance of the upper bound of w from 1, for A >= 0.
        delta: Upper bound of w for A < 0; at least 1 + epsilon_high.
        importance_sampling_level: "token" or "sequence", as for `log_weights`.

    Source: arXiv:2402.03300; sequence level (GSPO): arXiv:2507.18071; delta: INTELLECT-2,
    arXiv:2505.07291.
    """
    log_weight = log_weights(x, importance_sampling_level)  # [B, T]

    # Bound only the side on which the objective would gain; A = 0 takes the upper bound.
    low = math.log1p(-epsilon) if epsilon < 1 else -math.inf
    bounded = torch.where(
        x.advantages >= 0,
        log_weight.clamp(max=math.log1p(epsilon_high)),
        log_weight.clamp(min=low, max=None if delta is None else math.log(delta)),
    )

    ratio = bounded.exp()
    return Surrogate(
        loss=charged(x, -x.advantages * ratio),
        capped_low=x.select & (bounded > log_weight),
        capped_high=x.select & (bounded < log_weight),
        ratio=row_mean(ratio.detach(), x.select),
    )
