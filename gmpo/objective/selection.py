"""Rows and tokens that may receive a policy gradient.

A selection does not shorten a denominator, except GMPO's own L.
"""

import torch
from torch import Tensor

from gmpo.objective.aggregate import row_mean
from gmpo.objective.correction import reported_logps
from gmpo.objective.types import ObjectiveInputs


def entropy_threshold(entropies: Tensor, top_entropy_quantile: float) -> Tensor:
    """Return the entropy that the given share of tokens reaches or exceeds, a scalar.

    It is the (1 - share) quantile with linear interpolation.  `torch.quantile` refuses more than
    2^24 values; this does not.

    Args:
        entropies: [N] of the counted tokens of a micro-batch, gathered over all ranks, in nats.
            N = 0 gives infinity.
        top_entropy_quantile: Share of tokens to keep, in (0, 1].

    Example:
        entropies [4, 1, 2, 3], share 0.5: position 0.5 * 3 = 1.5 of [1, 2, 3, 4] -> 2.5

    Source: arXiv:2506.01939.
    """
    count = entropies.numel()
    if count == 0:
        return entropies.new_tensor(torch.inf)

    position = (1 - top_entropy_quantile) * (count - 1)
    rank = int(position)
    # kthvalue takes quadratic time on a CPU for values in falling order.
    ordered = entropies.sort().values
    return ordered[rank].lerp(ordered[min(rank + 1, count - 1)], position - rank)


def high_entropy_tokens(mask: Tensor, entropy: Tensor, threshold: Tensor) -> Tensor:
    """Return [B, T] bool, the counted tokens whose entropy reaches the threshold."""
    return mask & (entropy >= threshold)


def rows_on_policy(x: ObjectiveInputs, threshold: float) -> Tensor:
    """Return [B, 1] bool, false for rows to drop.

    These have a negative advantage, and the policy has left the sampler by more than the threshold.

    Args:
        x: Log-probs of policy and sampler.
        threshold: Nats per token, of the mean of sampler_logp - logp over the counted tokens.

    Source: DeepSeek-V3.2, arXiv:2512.02556.
    """
    sampler = reported_logps(x.sampler_logps, x.old_logps)
    drift = row_mean(sampler - x.logps.detach(), x.mask)
    return (x.advantages >= 0) | (drift <= threshold)
