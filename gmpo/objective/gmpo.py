"""Geometric-Mean Policy Optimization: one ratio per completion.

It is the geometric mean of the clipped ratios of its tokens.
"""

import torch
from torch import Tensor

from gmpo.objective.aggregate import row_mean
from gmpo.objective.types import Surrogate, SurrogateInputs

# Below this |power| the power mean is taken as geometric: rounding, divided by so small a power,
# would be larger than the difference.
SMALLEST_POWER = 1e-3


def gmpo(
    x: SurrogateInputs,
    *,
    epsilon: float,
    epsilon_high: float,
    delta: float | None = None,
    importance_sampling_level: str = "token",
    mean_power: float = 0.0,
) -> Surrogate:
    """Return the cost of each completion, with advantage A and L selected tokens:

        d_t  = logp_t - old_logp_t
        c_t  = min(d_t, epsilon_high)    if A >= 0
               max(d_t, -epsilon)        if A <  0    (and at most delta, where that is set)
        rho  = exp( sum_t c_t / L )
        loss = -A rho

    The gradient in logp_t is -A rho / L where c_t = d_t and 0 where the token is capped.  All
    tokens share the weight rho, and a capped token still counts in it.  While the policy has not
    moved (d = 0), this is the gradient of GRPO with a mean over rows.

    Args:
        x: Log-ratios [B, T], advantages [B, 1], selected tokens and correction.
        epsilon: Lower clip bound of d_t, in nats, for A < 0.
        epsilon_high: Upper clip bound of d_t, in nats, for A >= 0.
        delta: Upper bound of d_t for A < 0, in nats; without it one runaway token can inflate its
            whole row.
        importance_sampling_level: "sequence" clips the sum of the d_t instead of each of them (the
            paper's ablation).
        mean_power: p of the power mean ( mean_t exp(p c_t) )^(1/p); 0 is the geometric mean.

    Returns:
        One loss per completion, [B, 1].

    Source: arXiv:2507.20673, equation 4 and algorithm 1; the power mean: arXiv:2605.12058.
    """
    log_ratio = x.log_ratio  # d, [B, T]
    if importance_sampling_level == "sequence":
        log_ratio = torch.where(x.select, log_ratio, 0).sum(-1, keepdim=True)  # [B, 1]

    # Clip only the side on which the objective would gain.  A token on its bound has a gradient.
    # A = 0 takes the upper bound: 0 * exp(large) would be NaN.
    clipped = torch.where(
        x.advantages >= 0,
        log_ratio.clamp(max=epsilon_high),
        log_ratio.clamp(min=-epsilon, max=delta),
    )

    # One ratio per completion: the geometric mean of its clipped token ratios.  1 for an empty row.
    if importance_sampling_level == "sequence":
        log_rho = clipped / x.select.sum(-1, keepdim=True).clamp(min=1)
    elif abs(mean_power) < SMALLEST_POWER:
        log_rho = row_mean(clipped, x.select)
    else:
        log_rho = log_power_mean(clipped, x.select, mean_power)
    rho = log_rho.exp()  # [B, 1]

    # The sampler/trainer correction of a completion: a geometric mean too, over the same tokens.
    correction = row_mean(torch.where(x.select, x.correction, 1).log(), x.select).exp()  # [B, 1]

    has_tokens = x.select.any(-1, keepdim=True)
    return Surrogate(
        loss=torch.where(has_tokens, -x.advantages * rho * correction, 0),
        capped_low=x.select & (clipped > log_ratio),
        capped_high=x.select & (clipped < log_ratio),
        ratio=rho.detach(),
    )


def log_power_mean(logs: Tensor, counted: Tensor, power: float) -> Tensor:
    """Return log( mean_t exp(power * logs_t) ) / power over the counted tokens, [B, 1].

    Powers 1 and -1 are the arithmetic and harmonic mean of exp(logs); near 0, where this is the
    geometric mean, rounding spoils it.

    Args:
        logs: [B, T].
        counted: [B, T] bool; a row without any gives 0.
        power: Not 0.
    """
    # The gradient of logsumexp over nothing but -inf is NaN: an empty row gets zeros instead.
    empty = ~counted.any(-1, keepdim=True)
    logs = torch.where(counted, power * logs, torch.where(empty, 0.0, -torch.inf))
    length = (counted | empty).sum(-1, keepdim=True, dtype=logs.dtype)
    return (logs.logsumexp(-1, keepdim=True) - length.log()) / power
