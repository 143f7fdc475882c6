"""The sampler's changes to logits besides the temperature: a penalty on seen tokens, then a cut."""

from dataclasses import dataclass

import torch
from torch import Tensor

from gmpo.token_sets import Index, TokenSets
from gmpo.types import Batch

# Logit of a token that can't be drawn: finite, so that p log p and gradients are 0 there, not NaN.
FAR = -1e20


@dataclass(frozen=True, slots=True)
class Shaping:
    """The sampler's changes to the logits of an array of tokens.

    A logit of a seen token is divided by the penalty if positive, else multiplied by it
    (arXiv:1909.05858).

    Example:
        penalty 2, token 0 seen, tokens 0 and 1 to draw from: logits [3, 1, 2] -> [1.5, 1, FAR]
    """

    support: TokenSets | None  # [...], the tokens that each could be; None for all
    seen: TokenSets | None  # [...], the tokens before each; None for no penalty
    penalty: float

    def __getitem__(self, key: Index) -> "Shaping":
        """Return the shaping of a part of the tokens."""
        support = None if self.support is None else self.support[key]
        seen = None if self.seen is None else self.seen[key]
        return Shaping(support, seen, self.penalty)

    def slope(self, logits: Tensor) -> Tensor | None:
        """Return the factors of the logits before the cut, [N, V]; None if all are 1."""
        if self.seen is None:
            return None
        factor = torch.full_like(logits, self.penalty).masked_fill_(logits > 0, 1.0 / self.penalty)
        return factor.masked_fill_(~self.seen.members(logits.shape[-1]), 1.0)

    def apply_(self, logits: Tensor) -> Tensor:
        """Shape the temperature-scaled logits [N, V] of N tokens, in place.

        The penalty commutes with the temperature's scale.
        """
        slope = self.slope(logits)
        if slope is not None:
            logits.mul_(slope)
        if self.support is not None:
            logits.masked_fill_(~self.support.members(logits.shape[-1]), FAR)
        return logits


def shaping_of(batch: Batch, penalty: float) -> Shaping | None:
    """Return the shaping of all tokens of `batch`, [B, T]; None if there is only a temperature."""
    if batch.support is None and penalty == 1.0:
        return None
    return Shaping(batch.support, None if penalty == 1.0 else tokens_before(batch), penalty)


def tokens_before(batch: Batch) -> TokenSets:
    """Return the tokens of prompt and completion that come before each token, [B, T].

    Each row's prompt and completion lie in `ids` once; a token's set is the first part of them.

    Example:
        prompts [5, 6] and [7], completions [[8, 9], [4, 0]]
        ids [5, 6, 8, 9, 7, 4, 0], start [[0, 0], [4, 4]], size [[2, 3], [1, 2]]
    """
    device, width = batch.completion_ids.device, batch.completion_ids.shape[1]
    lengths = [len(prompt) for prompt in batch.prompt_ids]
    prompts = torch.tensor(lengths, dtype=torch.int64, device=device)[:, None]  # [B, 1]
    rows = [torch.cat(pair) for pair in zip(batch.prompt_ids, batch.completion_ids, strict=True)]

    start = ((prompts + width).cumsum(0) - prompts - width).expand(-1, width)
    return TokenSets(
        ids=torch.cat([batch.completion_ids.new_zeros(0), *rows]).to(torch.int32),
        start=start,
        size=prompts + torch.arange(width, device=device),
        inverse=torch.zeros_like(start, dtype=torch.bool),
    )
