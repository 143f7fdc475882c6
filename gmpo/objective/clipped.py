"""PPO's clipped ratio per token: GRPO, BNPO, Dr. GRPO, DAPO, LUSPO, and GSPO at the sequence level."""

import math

from gmpo.objective.aggregate import row_mean
from gmpo.objective.gmpo import capped
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
    """Cost of a token with weight w = exp(log_weights):

        loss = -min( min(w, delta) A, clip(w, 1 - epsilon, 1 + epsilon_high) A )
             = -A min(w, 1 + epsilon_high)               if A >= 0
               -A max(min(w, delta), 1 - epsilon)        if A <  0

    The bounds are applied to log w: the gradient of an overflowing exp would be NaN even behind a bound.

    Args:
        delta: Upper bound of w for A < 0; at least 1 + epsilon_high.

    Source: arXiv:2402.03300; sequence level: arXiv:2507.18071; delta: INTELLECT-2, arXiv:2505.07291.
    """
    log_weight = log_weights(x, importance_sampling_level)
    bounded = capped(
        log_weight,
        x.advantages,
        low=math.log1p(-epsilon) if epsilon < 1 else -math.inf,
        high=math.log1p(epsilon_high),
        ceiling=None if delta is None else math.log(delta),
    )
    ratio = bounded.exp()
    return Surrogate(
        loss=charged(x, -x.advantages * ratio),
        capped_low=x.select & (bounded > log_weight),
        capped_high=x.select & (bounded < log_weight),
        ratio=row_mean(ratio.detach(), x.select),
    )
