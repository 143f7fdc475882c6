"""What a sampler does to logits besides the temperature: a penalty on tokens seen before, then a cut."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gmpo.token_sets import TokenSets
from gmpo.types import Batch

FAR = -1e20  # logit of a token that can't be drawn: finite, so that p log p and gradients are 0 there and not NaN


@dataclass(frozen=True, slots=True)
class Shaping:
    """How the logits of an array of tokens were shaped.

    A logit of a seen token is divided by the penalty if positive, else multiplied by it, as arXiv:1909.05858 has it.
    """

    support: TokenSets | None  # [...], the tokens that each could be; None: all
    seen: TokenSets | None  # [...], the tokens before each; None: no penalty
    penalty: float

    def __getitem__(self, key: Any) -> "Shaping":
        """That of a part of the tokens."""
        support, seen = (None if sets is None else sets[key] for sets in (self.support, self.seen))
        return Shaping(support, seen, self.penalty)

    def slope(self, logits: Tensor) -> Tensor | None:
        """[N, V] what `apply_` multiplies the logits by before it cuts; None: 1."""
        if self.seen is None:
            return None
        factor = torch.full_like(logits, self.penalty).masked_fill_(logits > 0, 1.0 / self.penalty)
        return factor.masked_fill_(~self.seen.members(logits.shape[-1]), 1.0)

    def apply_(self, logits: Tensor) -> Tensor:
        """Shape the temperature-scaled logits [N, V] of N tokens, in place.  (The penalty commutes with a scale.)"""
        slope = self.slope(logits)
        if slope is not None:
            logits.mul_(slope)
        if self.support is not None:
            logits.masked_fill_(~self.support.members(logits.shape[-1]), FAR)
        return logits


def shaping_of(batch: Batch, penalty: float) -> Shaping | None:
    """That of all tokens of `batch`, [B, T]; None where the temperature is all there is."""
    if batch.support is None and penalty == 1.0:
        return None
    return Shaping(batch.support, None if penalty == 1.0 else tokens_before(batch), penalty)


def tokens_before(batch: Batch) -> TokenSets:
    """[B, T] the tokens of the prompt and of the completion that come before each token."""
    device, width = batch.completion_ids.device, batch.completion_ids.shape[1]
    prompts = torch.tensor(
        [len(prompt) for prompt in batch.prompt_ids], dtype=torch.int64, device=device
    )[:, None]
    rows = [torch.cat(pair) for pair in zip(batch.prompt_ids, batch.completion_ids, strict=True)]
    start = ((prompts + width).cumsum(0) - prompts - width).expand(-1, width)
    return TokenSets(
        ids=torch.cat([batch.completion_ids.new_zeros(0), *rows]).to(torch.int32),
        start=start,
        size=prompts + torch.arange(width, device=device),
        inverse=torch.zeros_like(start, dtype=torch.bool),
    )
