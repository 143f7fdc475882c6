"""Geometric-Mean Policy Optimization: one ratio per completion, the geometric mean of its clipped token ratios."""

from functools import partial

import torch
from torch import Tensor

from gmpo.objective.aggregate import row_mean
from gmpo.objective.power_mean import log_power_mean
from gmpo.objective.types import Surrogate, SurrogateInputs


def gmpo(
    x: SurrogateInputs,
    *,
    epsilon: float,
    epsilon_high: float,
    delta: float | None = None,
    importance_sampling_level: str = "token",
    mean_power: float = 0.0,
) -> Surrogate:
    """Cost of a completion with advantage A and L selected tokens:

        d_t  = logp_t - old_logp_t
        c_t  = min(d_t, epsilon_high)    if A >= 0
               max(d_t, -epsilon)        if A <  0    (and at most delta, where that is set)
        rho  = exp( sum_t c_t / L )
        loss = -A rho

    The gradient in logp_t is -A rho / L where c_t = d_t and 0 where the token is capped: all tokens share the weight
    rho, and a capped token still counts in it.  While the policy has not moved (d = 0), this is GRPO's with a row mean.

    Args:
        delta: Upper bound of d_t for A < 0, in nats; without it one runaway token can inflate its whole row.
        importance_sampling_level: "sequence" clips the sum of the d_t instead of each (the paper's ablation).
        mean_power: p of the power mean ( mean_t exp(p c_t) )^(1/p); 0 is the geometric mean.

    Source: arXiv:2507.20673, equation 4 and algorithm 1; the power mean: arXiv:2605.12058.
    """
    clip = partial(capped, advantages=x.advantages, low=-epsilon, high=epsilon_high, ceiling=delta)
    if importance_sampling_level == "token":
        log_ratio = x.log_ratio  # d, [B, T]
        clipped = clip(log_ratio)
        log_rho = log_power_mean(clipped, x.select, mean_power)
    else:
        log_ratio = torch.where(x.select, x.log_ratio, 0).sum(-1, keepdim=True)  # [B, 1]
        clipped = clip(log_ratio)
        log_rho = clipped / x.select.sum(-1, keepdim=True).clamp(min=1)
    rho = log_rho.exp()  # [B, 1]; 1 for a row without selected tokens
    loss = -x.advantages * rho * row_weight(x)
    return Surrogate(
        loss=torch.where(x.select.any(-1, keepdim=True), loss, 0),
        capped_low=x.select & (clipped > log_ratio),
        capped_high=x.select & (clipped < log_ratio),
        ratio=rho.detach(),
    )


def capped(
    log_ratio: Tensor, advantages: Tensor, *, low: float, high: float, ceiling: float | None = None
) -> Tensor:
    """The log-ratio, bounded on the side where the objective would gain from moving on.

    On its bound it keeps its gradient.  A = 0 is bounded from above, since 0 * exp(large) would be NaN.
    """
    return torch.where(
        advantages >= 0, log_ratio.clamp(max=high), log_ratio.clamp(min=low, max=ceiling)
    )


def row_weight(x: SurrogateInputs) -> Tensor:
    """[B, 1]: the geometric mean of the sampler/trainer correction, over the same tokens as rho."""
    return row_mean(torch.where(x.select, x.correction, 1).log(), x.select).exp()
