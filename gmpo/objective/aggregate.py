"""How the losses of tokens and rows become one number.  Every denominator of the objective is in this file.

An aggregate takes values ([B, T], or [B, 1]: one value that stands for every token of its row), the mask of counted
tokens and the counts of the whole optimizer batch.  It returns this chunk's share: shares add up to the loss over
chunks, micro-batches and ranks, however the rows were cut.
"""

import torch
from torch import Tensor

from gmpo.objective.types import Denominators


def row_mean(values: Tensor, counted: Tensor) -> Tensor:
    """[B, 1]: mean of each row's values ([B, T] or [B, 1]) over its counted tokens; 0 for a row that has none."""
    return torch.where(counted, values, 0).sum(-1, keepdim=True) / counted.sum(
        -1, keepdim=True
    ).clamp(min=1)


def total(values: Tensor, counted: Tensor) -> Tensor:
    return torch.where(counted, values, 0).sum()


def mean_of_row_means(values: Tensor, mask: Tensor, denominators: Denominators) -> Tensor:
    """GMPO, GRPO, SAPO: every completion weighs the same.  A row's single value is its own mean."""
    return row_mean(values, mask).sum() / denominators.rows


def mean_over_micro_batch_tokens(
    values: Tensor, mask: Tensor, denominators: Denominators
) -> Tensor:
    """BNPO: the tokens of a micro-batch weigh the same, and so do the micro-batches."""
    return total(values, mask) / (
        max(denominators.micro_batch_tokens, 1) * denominators.micro_batches
    )


def sum_over_token_budget(values: Tensor, mask: Tensor, denominators: Denominators) -> Tensor:
    """Dr. GRPO (arXiv:2503.20783): a constant denominator, free of the completions' lengths."""
    return total(values, mask) / (denominators.rows * denominators.max_completion_length)


def mean_over_tokens(values: Tensor, mask: Tensor, denominators: Denominators) -> Tensor:
    """DAPO (arXiv:2503.14476), CISPO, VESPO: every token of the optimizer batch weighs the same."""
    return total(values, mask) / max(denominators.tokens, 1)


def mean_of_row_sums(values: Tensor, mask: Tensor, denominators: Denominators) -> Tensor:
    """LUSPO (arXiv:2602.05261): a completion weighs as much as it has tokens."""
    return total(values, mask) / denominators.rows
