"""Sampler/trainer correction: the engine that sampled computes slightly other probabilities than the trainer does.

The tokens were drawn from the engine's distribution, so a gradient that treats them as the policy's own is biased.  The
weight trainer / sampler removes the bias; bounds keep its variance in check.  No gradient flows through it.
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
    """Which ratio of old policy to sampler is taken, and what happens to one outside of its bounds."""

    mode: str  # "{token,sequence,geometric}_{truncate,mask}"
    low: float | None  # None: unbounded
    high: float | None

    @property
    def masks(self) -> bool:
        return self.mode.endswith("mask")

    def ratio(self, difference: Tensor, mask: Tensor) -> Tensor:
        """The raw ratio: [B, T] for token modes, else [B, 1].

        Args:
            difference: [B, T] from `sampler_difference`.
        """
        log_ratio = LOG_RATIOS[self.mode.split("_")[0]](difference, mask)
        return log_ratio.clamp(-EXPONENT_LIMIT, EXPONENT_LIMIT).exp()

    def outside(self, ratio: Tensor) -> Tensor:
        """Where the ratio is under its lower or over its upper bound; a ratio on the bound is inside."""
        low = 0.0 if self.low is None else self.low
        high = torch.inf if self.high is None else self.high
        return (ratio < low) | (ratio > high)

    def weight(self, ratio: Tensor) -> Tensor:
        """The ratio, clamped to its bounds ("truncate") or set to 0 outside of them ("mask")."""
        if self.masks:
            return torch.where(self.outside(ratio), 0, ratio)
        return ratio.clamp(self.low, self.high)


def reported_logps(sampler_logps: Tensor | None, old_logps: Tensor) -> Tensor:
    """[B, T]: the sampler's log-probs, and the old policy's for tokens where it reported none (None, NaN)."""
    return (
        old_logps
        if sampler_logps is None
        else torch.where(sampler_logps.isnan(), old_logps, sampler_logps)
    )


def sampler_difference(old_logps: Tensor, sampler_logps: Tensor | None, mask: Tensor) -> Tensor:
    """[B, T]: log of trainer over sampler, 0 outside of the mask and where the sampler reported nothing."""
    return torch.where(mask, old_logps - reported_logps(sampler_logps, old_logps), 0)


def correction_from(settings: ObjectiveSettings) -> Correction | None:
    """The correction that the settings ask for; None where it is switched off."""
    if not settings.vllm_importance_sampling_correction:
        return None
    cap = settings.vllm_importance_sampling_cap
    return Correction(
        mode=settings.vllm_importance_sampling_mode,
        low=settings.vllm_importance_sampling_clip_min,
        high=settings.vllm_importance_sampling_clip_max if cap is None else cap,
    )
