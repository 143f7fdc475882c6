"""From the losses of tokens and rows to one number: every denominator of the objective.

An aggregate takes values ([B, T], or [B, 1]: one value that stands for every token of its row), the
mask of counted tokens and the counts of the whole optimizer batch.  It returns this chunk's share:
shares add up to the loss over chunks, micro-batches and ranks, however the rows were cut.

Example:
    token losses [[1, 1], [4, 0]], mask [[1, 1], [1, 0]], 2 rows and 3 tokens in the optimizer batch
    mean_of_row_means: (1 + 4) / 2 = 2.5      mean_over_tokens: (1 + 1 + 4) / 3 = 2
"""

import torch
from torch import Tensor

from gmpo.objective.types import Denominators


def row_mean(values: Tensor, counted: Tensor) -> Tensor:
    """Return the mean of each row's values over its counted tokens, [B, 1]; 0 over none.

    Args:
        values: [B, T] or [B, 1].
        counted: [B, T] bool.
    """
    totals = torch.where(counted, values, 0).sum(-1, keepdim=True)
    return totals / counted.sum(-1, keepdim=True).clamp(min=1)


def total(values: Tensor, counted: Tensor) -> Tensor:
    """Return the sum of the values ([B, T] or [B, 1]) over the counted tokens, a scalar."""
    return torch.where(counted, values, 0).sum()


def mean_of_row_means(values: Tensor, mask: Tensor, denominators: Denominators) -> Tensor:
    """Weigh every completion the same: GMPO, GRPO, SAPO.  A row's single value is its own mean."""
    return row_mean(values, mask).sum() / denominators.num_rows


def mean_over_micro_batch_tokens(
    values: Tensor, mask: Tensor, denominators: Denominators
) -> Tensor:
    """Weigh the tokens of a micro-batch the same, and the micro-batches too: BNPO."""
    tokens = max(denominators.micro_batch_tokens, 1)
    return total(values, mask) / (tokens * denominators.micro_batches)


def sum_over_token_budget(values: Tensor, mask: Tensor, denominators: Denominators) -> Tensor:
    """Divide by a constant, whatever the completions' lengths: Dr. GRPO (arXiv:2503.20783)."""
    return total(values, mask) / (denominators.num_rows * denominators.max_completion_length)


def mean_over_tokens(values: Tensor, mask: Tensor, denominators: Denominators) -> Tensor:
    """Weigh every token of the optimizer batch the same: DAPO (arXiv:2503.14476), CISPO, VESPO."""
    return total(values, mask) / max(denominators.tokens, 1)


def entropy_mean(
    entropy: Tensor, mask: Tensor, select: Tensor, denominators: Denominators, *, selective: bool
) -> Tensor:
    """Return the mean entropy that the bonus weighs: over all tokens of the optimizer batch.

    With a selection by entropy (`selective`) it is over the selected tokens.  Their number in the
    optimizer batch is not known before its last micro-batch, so it is the mean over micro-batches
    of each one's mean.
    """
    if not selective:
        return mean_over_tokens(entropy, mask, denominators)
    tokens = max(denominators.micro_batch_selected, 1)
    return total(entropy, select & mask) / (tokens * denominators.micro_batches)


def mean_of_row_sums(values: Tensor, mask: Tensor, denominators: Denominators) -> Tensor:
    """Weigh a completion by the number of its tokens: LUSPO (arXiv:2602.05261)."""
    return total(values, mask) / denominators.num_rows
