"""Divergence of the policy from the frozen reference."""

import torch
from torch import Tensor

from gmpo.objective.types import ObjectiveInputs


def kl_k3(x: ObjectiveInputs, *, bias_correction: bool) -> Tensor:
    """Return the k3 estimate of KL(policy || reference) per counted token, [B, T]; 0 elsewhere.

        k3_t = exp(q) - q - 1,    q = ref_logp_t - logp_t

    Args:
        x: Log-probs of the policy and of the reference.
        bias_correction: Multiply by exp(logp_t - old_logp_t), with its gradient.  The tokens were
            drawn from the old policy, and k3 is unbiased only under the current one
            (DeepSeek-V3.2, arXiv:2512.02556).

    Source: John Schulman, "Approximating KL divergence", 2020.
    """
    assert x.ref_logps is not None, "beta > 0 needs ref_logps"
    q = torch.where(x.mask, x.ref_logps - x.logps, 0)
    k3 = q.expm1() - q
    if not bias_correction:
        return k3
    return k3 * torch.where(x.mask, x.logps - x.old_logps, 0).exp()
