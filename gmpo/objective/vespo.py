"""VESPO: REINFORCE weighted by a soft kernel of the whole completion's importance weight."""

import math

import torch
from torch import Tensor

from gmpo.objective.types import Surrogate, SurrogateInputs

LOWEST, HIGHEST = math.log(1e-8), 20.0  # range of log W


def vespo(
    x: SurrogateInputs,
    *,
    vespo_k_pos: float,
    vespo_lambda_pos: float,
    vespo_k_neg: float,
    vespo_lambda_neg: float,
) -> Surrogate:
    """Return the cost of each token, -sg(phi) A logp, where all tokens of a completion share

        phi = W^k exp( lambda (1 - W) )
        W   = product of the token ratios and of the sampler/trainer corrections

    The correction is inside W, not a factor of the loss.

    Args:
        x: Log-probs, log-ratios and selected tokens [B, T], advantages [B, 1], correction.
        vespo_k_pos, vespo_lambda_pos: k and lambda for A >= 0.
        vespo_k_neg, vespo_lambda_neg: k and lambda for A < 0.

    Source: arXiv:2602.10693.
    """
    positive = x.advantages >= 0
    k = torch.full_like(x.advantages, vespo_k_pos).where(positive, vespo_k_neg)
    decay = torch.full_like(x.advantages, vespo_lambda_pos).where(positive, vespo_lambda_neg)

    # [B, 1], or [B, T] with advantages of that shape
    log_weight = log_completion_weight(x)
    phi = (decay + k * log_weight - decay * log_weight.exp()).exp()

    nowhere = torch.zeros_like(x.select)
    return Surrogate(
        loss=torch.where(x.select, -phi * x.advantages * x.logps, 0),
        capped_low=nowhere,
        capped_high=nowhere,
        ratio=phi.mean(-1, keepdim=True),
    )


def log_completion_weight(x: SurrogateInputs) -> Tensor:
    """Return log W without its gradient, [B, 1].

    A dropped token or row (correction 0) counts as 1e-8, and all but mutes its row.
    """
    ratios = x.log_ratio.detach().clamp(-HIGHEST, HIGHEST)
    log_ratio = torch.where(x.mask, ratios, 0).sum(-1, keepdim=True)

    corrections = x.correction.log().clamp(LOWEST, HIGHEST)
    if corrections.shape[-1] == x.mask.shape[-1]:  # one per token
        corrections = torch.where(x.mask, corrections, 0)
    return (log_ratio + corrections.sum(-1, keepdim=True)).clamp(LOWEST, HIGHEST)
