"""A micro-batch's share in the loss of its optimizer batch, and in the gradient, within the memory that there is."""

import contextlib
import dataclasses
import math
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from gmpo import distributed
from gmpo.data.micro_batches import carries_signal
from gmpo.objective.entropy_bonus import EntropyController
from gmpo.objective.objective import Objective
from gmpo.objective.selection import entropy_threshold, high_entropy_tokens
from gmpo.objective.types import Denominators, ObjectiveInputs
from gmpo.policy.logprobs import Scorer
from gmpo.report.metrics import Metrics, Mode
from gmpo.types import Batch, Scores, Statistics


@dataclasses.dataclass(slots=True)
class MicroBatch:
    """What `training_step` gets: rows of a collection, and the counts of the optimizer batch that they belong to."""

    batch: Batch
    denominators: Denominators
    mode: Mode | None = "train"  # whose metrics its figures go to; None: nobody's

    def __contains__(
        self, name: str
    ) -> bool:  # the Trainer asks whether its inputs hold "input_ids"
        return False


class Learner:
    """Scores micro-batches chunk by chunk, and adds up their gradients.

    Args:
        args: The config.
        accelerator: Of the Trainer.
        entropy: Gives the policy's entropy [B, T] at every token of a batch, for `top_entropy_quantile`.
        precision: Makes the context in which losses are computed.
        backward: Runs the backward pass of a loss.
        progress: Gives the share of the training that is done, in [0, 1].
        routed: Whether a load-balancing loss of experts belongs to the loss.
    """

    def __init__(
        self,
        args: Any,
        accelerator: Any,
        *,
        objective: Objective,
        entropy_bonus: EntropyController,
        scorer: Scorer,
        metrics: Metrics,
        entropy: Callable[[nn.Module, Batch], Tensor],
        precision: Callable[[], Any],
        backward: Callable[[Tensor], None],
        progress: Callable[[], float],
        routed: bool,
    ) -> None:
        self.args, self.accelerator = args, accelerator
        self.objective, self.entropy_bonus, self.scorer, self.metrics = (
            objective,
            entropy_bonus,
            scorer,
            metrics,
        )
        self.entropy, self.precision, self.backward = entropy, precision, backward
        self.progress, self.routed = progress, routed
        self.max_tokens_per_chunk: int | None = args.max_tokens_per_chunk
        self.in_step = accelerator.distributed_type.value in (
            "FSDP",
            "DEEPSPEED",
        )  # ranks make as many passes
        self._added: list[MicroBatch] = []  # those whose gradients this optimizer step has already
        self._step_entropy = (
            torch.zeros(()),
            torch.zeros(()),
        )  # sum and count over the tokens of this optimizer step

    def begin_step(self) -> None:
        """Before the first micro-batch of an optimizer step."""
        self._added = []

    def end_step(self) -> None:
        """After the optimizer's step: move the coefficient of the entropy bonus.  Every rank must call."""
        if self.entropy_bonus.adaptive:
            sums = torch.stack([torch.as_tensor(value) for value in self._step_entropy])
            total, count = distributed.reduced(sums).tolist()
            self.entropy_bonus.update(total / count if count else math.nan)
            self._step_entropy = (torch.zeros(()), torch.zeros(()))

    @property
    def skips_silent_rows(self) -> bool:
        """Whether rows with an advantage of 0 move nothing, and may stay out of the passes."""
        other_terms = self.args.beta > 0 or self.entropy_bonus.coef != 0.0 or self.routed
        return self.args.zero_signal_groups != "keep" and not other_terms

    # -- gradients -----------------------------------------------------------------------------------------------------

    def add_gradient(self, model: nn.Module, inputs: MicroBatch) -> Tensor:
        """Add the gradient of `inputs`, with smaller chunks where the accelerator's memory does not suffice.

        A failed pass may have left a part of its gradient, so the optimizer step's gradient is made anew from its first
        micro-batch on: the update is the one that more memory would have given.

        Returns:
            This rank's share of the loss of the optimizer batch, times the number of ranks (which are averaged over).
        """
        while True:
            try:
                total = self._add_chunks(model, inputs)
                self._added.append(inputs)
                return total
            except torch.OutOfMemoryError as error:
                self.make_room(error, inputs.batch)
            model.zero_grad()  # here, where the error no longer holds the failed pass
            for earlier in self._added:
                self._add_chunks(model, dataclasses.replace(earlier, mode=None))

    def make_room(self, error: Exception, batch: Batch) -> None:
        """Halve the chunks; raise `error` where that can't help."""
        if distributed.world_size() > 1:  # the others are past a collective, or wait in one
            error.add_note(
                "Set max_tokens_per_chunk to bound the memory; with one process gmpo finds the bound itself."
            )
            raise error
        chunks = (
            batch.rows(rows) for rows in self.chunks(batch, self._rows_with_gradient(batch)[0])
        )
        largest = max(chunks, key=self.scorer.tokens)
        if len(largest) == 1:
            error.add_note(
                "A single completion with its prompt does not fit. Lower max_completion_length."
            )
            raise error
        tokens = self.scorer.tokens(largest)
        self.max_tokens_per_chunk = tokens // 2
        warnings.warn(
            f"Out of memory in a chunk of {tokens} tokens: the step is repeated with at most {tokens // 2}. Set "
            f"max_tokens_per_chunk={tokens // 2} to begin there.",
            stacklevel=2,
        )

    def _add_chunks(self, model: nn.Module, inputs: MicroBatch) -> Tensor:
        batch = inputs.batch
        select = self.select(model, batch)
        carrying, counted = self._rows_with_gradient(batch)
        chunks = self.chunks(batch, carrying)
        total = torch.zeros((), device=self.args.device)
        statistics = Statistics()
        for number, rows in enumerate(chunks):
            chunk = dataclasses.replace(inputs, batch=batch.rows(rows))
            with self._synchronised_only(model, last=number == len(chunks) - 1):
                with self.precision():
                    loss, seen = self.loss(model, chunk, select[rows, : chunk.batch.mask.shape[1]])
                self.backward(loss * distributed.world_size())
            total += loss.detach() * distributed.world_size()
            statistics.update(seen)
        if not len(chunks):
            leave_zero_gradients(model)
        if inputs.mode is not None:
            self._count(batch, carrying, statistics if counted else Statistics())
        return total

    def _rows_with_gradient(self, batch: Batch) -> tuple[Tensor, bool]:
        """Indices of the rows that can move the policy, and whether they count.

        Where none can, but other ranks wait for our backward pass, one row goes through the model without counting.
        """
        everything = torch.arange(len(batch))
        if not self.skips_silent_rows:
            return everything, True
        carrying = carries_signal(batch).nonzero().flatten()
        others_wait = distributed.world_size() > 1 or self.in_step
        return (carrying, True) if len(carrying) or not others_wait else (everything[:1], False)

    def _count(self, batch: Batch, carrying: Tensor, statistics: Statistics) -> None:
        """Take what was seen in a micro-batch into the metrics, and into the controller of the entropy bonus."""
        if self.skips_silent_rows:
            statistics.means["signal/rows"] = (float(len(carrying)), float(len(batch)))
        self.metrics.add(statistics)
        if self.entropy_bonus.adaptive and "entropy" in statistics.means:
            old, new = self._step_entropy, statistics.means["entropy"]
            self._step_entropy = (old[0] + new[0], old[1] + new[1])

    @contextlib.contextmanager
    def _synchronised_only(self, model: nn.Module, *, last: bool) -> Iterator[None]:
        """Gradients of the ranks meet in the last chunk of a micro-batch alone."""
        state = self.accelerator.gradient_state
        wanted = state.sync_gradients
        state._set_sync_gradients(wanted and last)
        try:
            with contextlib.nullcontext() if last else self.accelerator.no_sync(model):
                yield
        finally:
            state._set_sync_gradients(wanted)

    # -- losses --------------------------------------------------------------------------------------------------------

    def chunks(self, batch: Batch, rows: Tensor) -> list[Tensor]:
        """`rows` ([b] int64) cut into forward chunks; as many on every rank where ranks keep step."""
        part = batch.rows(rows)
        chunks = (
            [chunk.cpu() for chunk in self.scorer.chunks(part, self.max_tokens_per_chunk)]
            if len(rows)
            else []
        )
        if self.in_step:
            chunks = distributed.as_many_everywhere(chunks)
        return [rows[chunk] for chunk in chunks]

    def select(self, model: nn.Module, batch: Batch) -> Tensor:
        """[B, T] the tokens that may receive policy gradient: those of high entropy over all ranks, or all."""
        quantile: float = self.args.top_entropy_quantile
        if quantile >= 1.0:
            return batch.mask
        entropy = self.entropy(model, batch)
        threshold = entropy_threshold(distributed.gathered(entropy[batch.mask]), quantile)
        return high_entropy_tokens(batch.mask, entropy, threshold)

    @torch.no_grad()
    def value(self, model: nn.Module, inputs: MicroBatch) -> tuple[Tensor, Statistics]:
        """The share of `inputs` in a loss, a scalar on the CPU, and what was seen; no gradient, chunk by chunk."""
        batch = inputs.batch
        total, statistics = torch.zeros(()), Statistics()
        with self.precision():
            select = self.select(model, batch)
            for rows in self.chunks(batch, torch.arange(len(batch))):
                chunk = dataclasses.replace(inputs, batch=batch.rows(rows))
                share, seen = self.loss(model, chunk, select[rows, : chunk.batch.mask.shape[1]])
                total += share.cpu()
                statistics.update(seen)
        return total, statistics

    def loss(
        self, model: nn.Module, inputs: MicroBatch, select: Tensor
    ) -> tuple[Tensor, Statistics]:
        """The differentiable share of `inputs` in the loss of its optimizer batch, a scalar, and what was seen.

        Args:
            select: [B, T] the tokens that may receive policy gradient.
        """
        batch = inputs.batch
        statistics = Statistics()

        def loss_of(scores: Scores, rows: Tensor) -> Tensor:
            part = batch.rows(rows)
            loss, seen = self.objective.loss(
                objective_inputs(part, scores, select[rows, : part.mask.shape[1]]),
                inputs.denominators,
                progress=self.progress(),
                entropy_coef=self.entropy_bonus.coef,
            )
            statistics.update(seen)
            return loss

        router_weight = self.args.router_aux_loss_coef * len(batch) / inputs.denominators.rows
        loss = self.scorer.loss(
            model,
            batch,
            loss_of,
            router_of=lambda router_loss: router_weight * router_loss,
            want_entropy_grad=self.entropy_bonus.coef != 0.0,
        )
        return loss, statistics


def leave_zero_gradients(model: nn.Module) -> None:
    """What a backward pass of rows without signal leaves: the optimizer's momentum still moves the weights."""
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)


def objective_inputs(batch: Batch, scores: Scores, select: Tensor) -> ObjectiveInputs:
    """The objective's view of scored rows.  Where no old log-probs are kept, the policy is still the old one."""
    return ObjectiveInputs(
        logps=scores.logps,
        old_logps=scores.logps.detach() if batch.old_logps is None else batch.old_logps,
        advantages=batch.advantages[:, None],
        mask=batch.mask,
        select=select,
        sampler_logps=batch.sampler_logps,
        ref_logps=batch.ref_logps,
        entropy=scores.entropy,
    )
