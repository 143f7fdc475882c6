"""The rows of a collection that each micro-step trains on."""

import torch
from torch import Tensor

from gmpo.types import Batch


def split_into_micro_batches(group: Tensor, *, rows: int, passes: int, seed: int) -> list[Tensor]:
    """Return the row indices of every micro-batch of a collection.

    Each pass goes over all rows once, in a fresh order of whole groups: a group is never torn
    further apart than the size of a micro-batch makes it.

    Args:
        group: [N] int64, the group of each row; rows of a group are contiguous.
        rows: Rows of one micro-batch; divides N.
        passes: num_iterations.
        seed: Names the order.

    Returns:
        passes * N / rows tensors of `rows` int64 indices.

    Example:
        group [0, 0, 1, 1, 2, 2], micro-batches of 3 rows, one pass in the order 1, 0, 2:
        [2, 3, 0], [1, 4, 5]
    """
    assert len(group) % rows == 0, f"{len(group)} rows don't fill micro-batches of {rows} rows"
    generator = torch.Generator().manual_seed(seed)
    _, sizes = torch.unique_consecutive(group, return_counts=True)
    groups = torch.split(torch.arange(len(group)), sizes.tolist())

    micro_batches: list[Tensor] = []
    for _ in range(passes):
        order = torch.randperm(len(groups), generator=generator).tolist()
        micro_batches += torch.cat([groups[i] for i in order]).split(rows)
    return micro_batches


def pack_signal_rows(
    micro_batches: list[Tensor], signal: Tensor, *, first: int, window: int
) -> list[Tensor]:
    """Move rows with signal into as few micro-batches of each optimizer step as possible.

    Args:
        micro_batches: Row indices [b] each.
        signal: [N] bool, rows that can move the policy.
        first: How many micro-batches belong to the first optimizer step.
        window: How many belong to each later one.

    Example:
        micro-batches [0, 1], [2, 3] of one optimizer step, signal in rows 1 and 2:
        [1, 2], [0, 3]
    """
    result: list[Tensor] = []
    while len(result) < len(micro_batches):
        size = window if result else first
        of_step = micro_batches[len(result) : len(result) + size]

        rows = torch.cat(of_step)
        rows = torch.cat([rows[signal[rows]], rows[~signal[rows]]])
        result += rows.split([len(micro_batch) for micro_batch in of_step])
    return result


def mixed_seed(*parts: int) -> int:
    """Return one seed in [0, 2**63) for several numbers; other numbers give an unrelated one."""
    state = 0x9E3779B97F4A7C15
    for part in parts:
        state = (state ^ (part & 0xFFFFFFFFFFFFFFFF)) * 0xBF58476D1CE4E5B9 % 2**64
        state = (state ^ (state >> 31)) * 0x94D049BB133111EB % 2**64
        state ^= state >> 29
    return state % 2**63


def has_signal(batch: Batch) -> Tensor:
    """Return [B] bool, on the CPU: rows whose policy gradient is not 0; the others are silent."""
    return ((batch.advantages != 0) & batch.mask.any(1)).cpu()
