"""The size of forward passes, and its repair where memory runs out.

One bound holds for all passes of the policy: learning, old and reference log-probs, entropies and
evaluation.  Whoever meets the limit first lowers it for all.
"""

import traceback
import warnings
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from gmpo import distributed

# Parts of messages of errors that are no torch.OutOfMemoryError, and mean the same.
OUT_OF_MEMORY = (
    "out of memory",
    "can't allocate memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_NOT_SUPPORTED",
)
SEVERAL_RANKS = (
    "Set max_tokens_per_chunk to bound the memory; with one process gmpo finds the bound itself."
)
DEEPSPEED = (
    "Set max_tokens_per_chunk to bound the memory. DeepSpeed keeps a part of the gradient of a "
    "failed pass, so that gmpo can't repeat the step with smaller chunks."
)
ONE_ROW = "A single completion with its prompt does not fit. Lower max_completion_length."


class ChunkSize(NamedTuple):
    """The size of one forward pass."""

    tokens: int
    rows: int


class ChunkMemory:
    """The bound on the tokens of a forward pass; None until one is known or given.

    Args:
        max_tokens: The bound to begin with.
        deepspeed: DeepSpeed runs the passes; nothing is repaired then.
    """

    def __init__(self, max_tokens: int | None, *, deepspeed: bool = False) -> None:
        self.max_tokens = max_tokens
        self.deepspeed = deepspeed

    def make_room(self, error: Exception, sizes: Sequence[ChunkSize]) -> None:
        """Halve the largest of the passes that failed; raise `error` where that can't help.

        Args:
            error: Of a failed pass; raised as it is if it says something else than "no memory".
            sizes: Of the passes that were to be made.
        """
        if not is_out_of_memory(error) or getattr(error, "was_met", False):
            raise error
        # The frames of the failed pass hold its tensors.
        traceback.clear_frames(error.__traceback__)

        # With several ranks, the others are past a collective, or wait in one.
        note = SEVERAL_RANKS if distributed.world_size() > 1 else DEEPSPEED
        if distributed.world_size() == 1 and not self.deepspeed:
            largest = max(sizes, default=ChunkSize(0, 0))
            if largest.rows > 1:
                self._halve(largest.tokens)
                return
            note = ONE_ROW

        error.add_note(note)
        error.was_met = True  # pyright: ignore[reportAttributeAccessIssue] (an outer loop shall not try again)
        raise error

    def _halve(self, tokens: int) -> None:
        self.max_tokens = tokens // 2
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        warnings.warn(
            f"Out of memory in a chunk of {tokens} tokens: the work is repeated with at most "
            f"{tokens // 2}. Set max_tokens_per_chunk={tokens // 2} to begin there.",
            stacklevel=2,
        )

    def run(
        self,
        rows: Tensor,
        cut: Callable[[Tensor], list[Tensor]],
        size_of: Callable[[Tensor], ChunkSize],
        work: Callable[[Tensor], None],
    ) -> None:
        """Do `work` for all rows, chunk by chunk, in smaller chunks from where memory runs out.

        A chunk that fails must leave nothing behind: this is for passes without gradients.

        Args:
            rows: [b] int64.
            cut: Cuts rows into chunks, by the bound as it is then.
            size_of: Of a chunk.
            work: Called once for every chunk that succeeds.
        """
        waiting = cut(rows)
        while waiting:
            try:
                work(waiting[0])
            except Exception as error:
                self.make_room(error, [size_of(chunk) for chunk in waiting])
            else:
                waiting = waiting[1:]
                continue
            waiting = cut(torch.cat(waiting))


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error says that memory ran out, in torch's words or a library's."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in OUT_OF_MEMORY)
