"""Ranks: who we are, sums and gathers over all of them, whole parameters and models out of shards."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def meeting_device() -> torch.device:
    """Where tensors must lie for the ranks to exchange them."""
    nccl = world_size() > 1 and "nccl" in dist.get_backend()
    return torch.device("cuda", torch.cuda.current_device()) if nccl else torch.device("cpu")


def reduced(values: Tensor, operation: str = "sum") -> Tensor:
    """`values` summed ("sum"), or their smallest ("min") or largest ("max"), over all ranks.  Every rank must call.

    They may lie anywhere, and the result lies there too.
    """
    if world_size() == 1:
        return values
    result = values.to(meeting_device(), copy=True)
    dist.all_reduce(
        result,
        op={"sum": dist.ReduceOp.SUM, "min": dist.ReduceOp.MIN, "max": dist.ReduceOp.MAX}[
            operation
        ],
    )
    return result.to(values.device)


def gathered(values: Tensor) -> Tensor:
    """[n_r, ...] of every rank, one after another in rank order; n_r may differ.  Every rank must call."""
    if world_size() == 1:
        return values
    device = meeting_device()
    sizes = [torch.zeros((), dtype=torch.int64, device=device) for _ in range(world_size())]
    dist.all_gather(sizes, torch.tensor(len(values), device=device))
    longest = max(int(size) for size in sizes)
    padded = torch.zeros((longest, *values.shape[1:]), dtype=values.dtype, device=device)
    padded[: len(values)] = values
    parts = [torch.empty_like(padded) for _ in range(world_size())]
    dist.all_gather(parts, padded)
    return torch.cat([part[: int(size)] for part, size in zip(parts, sizes, strict=True)]).to(
        values.device
    )


def gathered_objects(value: Any) -> list[Any]:
    """One picklable object per rank, in rank order, among ranks that trust each other.  Every rank must call."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def any_rank(flag: bool) -> bool:
    """Whether `flag` is true on at least one rank.  Every rank must call."""
    if world_size() == 1:
        return flag
    return bool(reduced(torch.tensor(int(flag)), "max"))


def as_many_everywhere(parts: list[Tensor]) -> list[Tensor]:
    """`parts` ([n] each), with empty ones behind them until every rank has as many.  Every rank must call."""
    most = int(reduced(torch.tensor(len(parts)), "max"))
    return parts + [torch.zeros(0, dtype=torch.int64) for _ in range(most - len(parts))]


# -- shards ----------------------------------------------------------------------------------------------------------
