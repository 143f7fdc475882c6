"""Collectives: who we are, sums and gathers over all ranks, and errors that every rank raises."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def world_size() -> int:
    """Return the number of ranks; 1 without torch.distributed."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Return the number of this rank."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def collective_device() -> torch.device:
    """Return the device on which tensors must be for the ranks to exchange them."""
    nccl = world_size() > 1 and "nccl" in dist.get_backend()
    return torch.device("cuda", torch.cuda.current_device()) if nccl else torch.device("cpu")


def all_reduce(values: Tensor, operation: str = "sum") -> Tensor:
    """Return the sum of `values` over all ranks, or their smallest ("min") or largest ("max").

    Every rank must call.  The result is on the device of `values`.
    """
    if world_size() == 1:
        return values
    operations = {"sum": dist.ReduceOp.SUM, "min": dist.ReduceOp.MIN, "max": dist.ReduceOp.MAX}
    result = values.to(collective_device(), copy=True)
    dist.all_reduce(result, op=operations[operation])
    return result.to(values.device)


def all_gather(values: Tensor) -> Tensor:
    """Return the values of every rank, [n_r, ...] each, one after another in rank order.

    Every rank must call.  n_r may differ from rank to rank.

    Example:
        rank 0 has [1, 2], rank 1 has [3] -> [1, 2, 3] on both
    """
    if world_size() == 1:
        return values

    # Tensors that are gathered must have one shape: pad them to the longest.
    device = collective_device()
    sizes = [torch.zeros((), dtype=torch.int64, device=device) for _ in range(world_size())]
    dist.all_gather(sizes, torch.tensor(len(values), device=device))
    longest = max(int(size) for size in sizes)
    padded = torch.zeros((longest, *values.shape[1:]), dtype=values.dtype, device=device)
    padded[: len(values)] = values
    parts = [torch.empty_like(padded) for _ in range(world_size())]
    dist.all_gather(parts, padded)

    unpadded = [part[: int(size)] for part, size in zip(parts, sizes, strict=True)]
    return torch.cat(unpadded).to(values.device)


def all_gather_objects(value: object) -> list[Any]:
    """Return one picklable object per rank, in rank order, among ranks that trust each other.

    Every rank must call.
    """
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def all_gather_as_objects(values: Tensor) -> Tensor:
    """Gather tensors of any dtype and length as `all_gather` does, by way of pickled objects."""
    parts = all_gather_objects(values.cpu())
    return torch.cat([part.to(values.device) for part in parts])


def any_rank(flag: bool) -> bool:
    """Return whether `flag` is true on at least one rank.  Every rank must call."""
    if world_size() == 1:
        return flag
    return bool(all_reduce(torch.tensor(int(flag)), "max"))


def pad_to_max_count(parts: list[Tensor]) -> list[Tensor]:
    """Return `parts` ([n] each), followed by empty ones until every rank has as many.

    Every rank must call.
    """
    most = int(all_reduce(torch.tensor(len(parts)), "max"))
    missing = most - len(parts)
    return parts + [torch.zeros(0, dtype=torch.int64) for _ in range(missing)]


class RankError(RuntimeError):
    """An error of other ranks, raised on a rank that has none itself.

    Args:
        message: Which ranks failed, at what, with which errors.
        lost: The error may be gone if the work is done again: it is so on every rank that failed.
    """

    def __init__(self, message: str, *, lost: bool = False) -> None:
        super().__init__(message)
        self.lost = lost


@contextmanager
def raise_on_all_ranks(doing: str) -> Iterator[None]:
    """Turn an error that some ranks meet within the block into an error of every rank.

    Every rank must enter.  The block itself must hold no collective: a rank that fails before it
    would leave the others waiting.  Work that does hold collectives goes on after an error, and
    raises it here at the end (`FirstError`).

    Args:
        doing: What the block does, for the message: "score the completions".

    Raises:
        Exception: This rank's own error.  Its `lost`, if it has one, becomes false unless the
            errors of all ranks that failed are lost, so that all ranks decide alike.
        RankError: If only other ranks failed.
    """
    error: Exception | None = None
    try:
        yield
    except Exception as caught:
        error = caught

    if not any_rank(error is not None):
        return

    failure = None if error is None else (repr_of(error), getattr(error, "lost", False))
    failures = {
        number: found
        for number, found in enumerate(all_gather_objects(failure))
        if found is not None
    }
    lost = all(was_lost for _, was_lost in failures.values())

    if error is None:
        told = "; ".join(f"rank {number}: {message}" for number, (message, _) in failures.items())
        error = RankError(f"Another rank failed to {doing}. {told}", lost=lost)
    elif hasattr(error, "lost"):
        error.lost = lost  # pyright: ignore[reportAttributeAccessIssue] (a mark for who catches it)
    error.raised_on_all_ranks = True  # pyright: ignore[reportAttributeAccessIssue] (the same)
    raise error


def is_raised_on_all_ranks(error: BaseException) -> bool:
    """Return whether every rank is raising, so that collectives may follow."""
    return world_size() == 1 or getattr(error, "raised_on_all_ranks", False)


def repr_of(error: BaseException) -> str:
    """Return an error's type and message in one line."""
    return f"{type(error).__name__}: {error}"


class FirstError:
    """Runs steps until one fails, and none after it, where other ranks wait for what comes next."""

    def __init__(self) -> None:
        self.error: Exception | None = None

    def run(self, step: Callable[..., Any], *arguments: Any) -> Any:
        """Return what the step returns, or None if it or one before it failed."""
        if self.error is None:
            try:
                return step(*arguments)
            except Exception as error:
                self.error = error
        return None

    def note(self, error: Exception) -> None:
        """Count an error that happened elsewhere."""
        if self.error is None:
            self.error = error

    def raise_if_any(self) -> None:
        """Raise the first error, if there is one."""
        if self.error is not None:
            raise self.error
