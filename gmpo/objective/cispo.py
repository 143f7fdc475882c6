"""CISPO: REINFORCE on every token, weighted by a capped ratio that carries no gradient."""

import torch

from gmpo.objective.aggregate import row_mean
from gmpo.objective.per_token import charged, log_weights
from gmpo.objective.types import Surrogate, SurrogateInputs


def cispo(
    x: SurrogateInputs, *, epsilon_high: float, importance_sampling_level: str = "token"
) -> Surrogate:
    """Return the cost of each token, with weight w = exp(log_weights) and sg for "no gradient":

        loss = -sg( min(w, epsilon_high) ) A logp

    Capped tokens keep a gradient, so no token is ever dropped.

    Args:
        x: Log-probs, log-ratios and selected tokens [B, T], advantages [B, 1], correction.
        epsilon_high: Cap of the ratio itself, not of its distance from 1; for example 5.0.
        importance_sampling_level: "token" or "sequence", as for `log_weights`.

    Source: MiniMax-M1, arXiv:2506.13585; a cap of 5: ScaleRL, arXiv:2510.13786.
    """
    uncapped = log_weights(x, importance_sampling_level).detach().exp()  # [B, T]
    weight = uncapped.clamp(max=epsilon_high)

    return Surrogate(
        loss=charged(x, -weight * x.advantages * x.logps),
        capped_low=torch.zeros_like(x.select),
        capped_high=x.select & (uncapped > epsilon_high),
        ratio=row_mean(weight, x.select),
    )
