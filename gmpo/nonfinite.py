"""Optimizer steps whose numbers are not finite, found before they touch the weights.

A log-prob, a loss or a gradient that is NaN or infinite would turn every weight into NaN.  So each
optimizer step is checked when its gradient is complete.  All ranks decide alike: one small
all-reduce per step.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from gmpo import distributed
from gmpo.sharding import full_tensor
from gmpo.types import Batch, Statistics

MOST_ROWS = 5  # that an error names


class _Seen(NamedTuple):
    """Rows of one chunk, and what was wrong with them."""

    batch: Batch
    broken: Tensor  # [B] bool, true where a log-prob is not finite
    loss: Tensor  # scalar, the chunk's share


class NonFiniteError(FloatingPointError):
    """The gradient of an optimizer step is not finite; the weights are as before it."""


class NonFiniteSteps:
    """Watches the numbers of each optimizer step, and ends the run or drops the step.

    Args:
        skip: Drop the step's gradient and go on; false ends the run.
        decode: Turns the tokens of a prompt into text, for the error message.
    """

    def __init__(self, *, skip: bool, decode: Callable[[list[int]], object]) -> None:
        self.skip = skip
        self.decode = decode
        self.num_skipped = 0  # since the run began
        self._seen: list[_Seen] = []

    def begin_step(self) -> None:
        """Forget what was seen.  A step whose gradient is computed again begins again."""
        self._seen = []

    def note(self, batch: Batch, broken: Tensor, loss: Tensor) -> None:
        """Take the outcome of a chunk; nothing is read from the device here."""
        self._seen.append(_Seen(batch, broken, loss.detach()))

    def check(self, model: nn.Module, grad_norm: Tensor | float | None, *, step: int) -> bool:
        """Return whether the optimizer may make its step.  Every rank must call.

        Args:
            model: Its gradients are dropped if the step is skipped.
            grad_norm: Of the whole gradient; None if it does not count, because a loss scaler looks
                after overflows.
            step: Number of the optimizer step, for the message.

        Raises:
            NonFiniteError: If the step is not finite and is not to be skipped; on every rank.
        """
        is_finite = [torch.isfinite(seen.loss).all() for seen in self._seen]
        is_finite += [~seen.broken.any() for seen in self._seen]
        if grad_norm is not None:
            norm = full_tensor(torch.as_tensor(grad_norm))
            is_finite.append(torch.isfinite(norm).all())
        ok = bool(torch.stack([flag.cpu() for flag in is_finite]).all()) if is_finite else True
        if not distributed.any_rank(not ok):
            return True

        if not self.skip:
            raise self._error(step)
        # Without gradients, the optimizer leaves weights and its own state as they are.
        model.zero_grad(set_to_none=True)
        self.num_skipped += 1
        return False

    def statistics(self) -> Statistics:
        """Return the number of steps that were skipped so far, if they may be."""
        return Statistics(maxima={"nonfinite_steps": float(self.num_skipped)} if self.skip else {})

    def _error(self, step: int) -> NonFiniteError:
        """Return the error that every rank raises, with the rows of all of them."""
        rows: list[str] = []
        losses = 0
        for seen in self._seen:
            losses += int(not torch.isfinite(seen.loss))
            for row in seen.broken.nonzero().flatten().tolist():
                rows.append(self._named(seen.batch, row))

        told = distributed.all_gather_objects((rows, losses))
        named = list(dict.fromkeys(name for of_rank, _ in told for name in of_rank))
        if named:
            more = f" and {len(named) - MOST_ROWS} more" if len(named) > MOST_ROWS else ""
            found = f"log-probs are not finite for {'; '.join(named[:MOST_ROWS])}{more}"
        elif any(number for _, number in told):
            found = "the loss is not finite, though the log-probs of all rows are"
        else:
            found = "the gradient is not finite, though the loss is"

        error = NonFiniteError(
            f"Optimizer step {step}: {found}. The step was not made: the weights are as before it. "
            "Look at the rows, lower learning_rate or max_grad_norm, or set "
            "nonfinite_steps='skip' to drop such steps and go on."
        )
        error.raised_on_all_ranks = True  # pyright: ignore[reportAttributeAccessIssue] (as raise_on_all_ranks marks them)
        return error

    def _named(self, batch: Batch, row: int) -> str:
        prompt = str(self.decode(batch.prompt_ids[row].tolist()))
        prompt = prompt if len(prompt) <= 60 else f"{prompt[:60]}..."
        number = -1 if batch.dataset_rows is None else int(batch.dataset_rows[row])
        where = f"row {number} of the dataset" if number >= 0 else "a row"
        return f"{where} ({prompt!r})"


def broken_rows(mask: Tensor, *logps: Tensor | None) -> Tensor:
    """Return [B] bool, true where one of the log-probs ([B, T]) is not finite within the mask.

    Example:
        mask [[1, 0], [1, 1]], logps [[-1, nan], [-2, -inf]] -> [false, true]
    """
    broken = torch.zeros(len(mask), dtype=torch.bool, device=mask.device)
    for values in logps:
        if values is not None:
            broken |= (mask & ~torch.isfinite(values)).any(-1)
    return broken
