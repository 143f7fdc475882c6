"""Sampler/trainer correction: the engine's probabilities differ slightly from the trainer's.

The tokens were drawn from the engine's distribution, so a gradient that treats them as the policy's
own is biased.  The weight trainer / sampler removes the bias; bounds keep its variance in check.
No gradient flows through it.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from gmpo.objective.aggregate import row_mean
from gmpo.objective.per_token import EXPONENT_LIMIT
from gmpo.objective.settings import ObjectiveSettings

LOG_RATIOS = {  # of [B, T] log differences over the mask
    "token": lambda difference, mask: difference,
    "sequence": lambda difference, mask: difference.sum(-1, keepdim=True),
    "geometric": lambda difference, mask: row_mean(difference, mask),
}


@dataclass(frozen=True, slots=True)
class Correction:
    """The weight of old policy over sampler: how it is taken, and what happens outside its bounds.

    Example:
        log differences [[0.7, 0.4]], bounds None and 2, exp(0.7) = 2.01, exp(0.4) = 1.49
        token_truncate -> [[2.0, 1.49]]      token_mask -> [[0, 1.49]]
        sequence_truncate: exp(1.1) = 3.00 -> [[2.0]]      geometric_mask: exp(0.55) -> [[1.73]]
    """

    mode: str  # "{token,sequence,geometric}_{truncate,mask}"
    low: float | None  # None for no lower bound
    high: float | None  # None for no upper bound

    @property
    def masks(self) -> bool:
        """True if a ratio outside the bounds drops its token or row; false if it is clamped."""
        return self.mode.endswith("mask")

    def ratio(self, difference: Tensor, mask: Tensor) -> Tensor:
        """Return the ratio before its bounds: [B, T] for token modes, else [B, 1].

        Args:
            difference: [B, T] from `sampler_difference`.
            mask: [B, T] bool, the counted tokens.
        """
        log_ratio = LOG_RATIOS[self.mode.split("_")[0]](difference, mask)
        return log_ratio.clamp(-EXPONENT_LIMIT, EXPONENT_LIMIT).exp()

    def outside(self, ratio: Tensor) -> Tensor:
        """Return where the ratio is outside its bounds; a ratio on a bound is inside."""
        low = 0.0 if self.low is None else self.low
        high = torch.inf if self.high is None else self.high
        return (ratio < low) | (ratio > high)

    def weight(self, ratio: Tensor) -> Tensor:
        """Return the ratio, clamped to its bounds ("truncate") or 0 outside them ("mask")."""
        if self.masks:
            return torch.where(self.outside(ratio), 0, ratio)
        return ratio.clamp(self.low, self.high)


def reported_logps(sampler_logps: Tensor | None, old_logps: Tensor) -> Tensor:
    """Return the sampler's log-probs, [B, T]; the old policy's where it reported none."""
    if sampler_logps is None:
        return old_logps
    return torch.where(sampler_logps.isnan(), old_logps, sampler_logps)


def sampler_difference(old_logps: Tensor, sampler_logps: Tensor | None, mask: Tensor) -> Tensor:
    """Return the log of trainer over sampler, [B, T].

    It is 0 outside the mask, and where the sampler reported nothing.
    """
    return torch.where(mask, old_logps - reported_logps(sampler_logps, old_logps), 0)


def correction_from(settings: ObjectiveSettings) -> Correction | None:
    """Return the correction that the settings ask for; None if it is off."""
    if not settings.vllm_importance_sampling_correction:
        return None
    cap = settings.vllm_importance_sampling_cap
    return Correction(
        mode=settings.vllm_importance_sampling_mode,
        low=settings.vllm_importance_sampling_clip_min,
        high=settings.vllm_importance_sampling_clip_max if cap is None else cap,
    )
