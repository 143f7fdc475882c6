"""Loss and gradient of a micro-batch, computed in chunks that fit in memory."""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from gmpo import distributed
from gmpo.config import GRPOConfig
from gmpo.data.micro_batches import has_signal
from gmpo.nonfinite import NonFiniteSteps, broken_rows
from gmpo.objective.entropy_bonus import EntropyController
from gmpo.objective.objective import Objective
from gmpo.objective.selection import entropy_threshold, high_entropy_tokens
from gmpo.objective.types import Denominators, ObjectiveInputs
from gmpo.policy.logprobs import LogProbs, scatter
from gmpo.policy.memory import ChunkSize
from gmpo.report.metrics import Metrics, Mode, Stopwatch
from gmpo.types import Batch, Statistics


@dataclasses.dataclass(slots=True)
class MicroBatch:
    """Rows of a collection, and the counts of the optimizer batch that they belong to."""

    batch: Batch
    denominators: Denominators
    mode: Mode | None = "train"  # whose metrics its figures go to; None for nobody's

    def __contains__(self, name: str) -> bool:  # the Trainer asks if its inputs hold "input_ids"
        return False


class ChunkLoss:
    """The loss of a chunk's rows, called once per tile while the tile's logits are there.

    It is all that stands between the vocabulary head and the objective.

    Args:
        objective: Pure.
        batch: The chunk.
        select: [B, T] the tokens that may receive policy gradient.
        denominators: Counts of the whole optimizer batch.
        progress: Share of the training that is done, in [0, 1].
        entropy_coef: Weight of the entropy bonus; None without one.
        router_coef: Weight of the load-balancing loss of a mixture of experts.

    Attributes:
        statistics: Of the rows that were seen so far.
        broken: [B] bool, true for rows with a log-prob that is not finite.
    """

    def __init__(
        self,
        objective: Objective,
        batch: Batch,
        select: Tensor,
        denominators: Denominators,
        *,
        progress: float,
        entropy_coef: float | None,
        router_coef: float,
    ) -> None:
        self.objective = objective
        self.batch = batch
        self.select = select
        self.denominators = denominators
        self.progress = progress
        self.entropy_coef = entropy_coef
        self.router_coef = router_coef
        self.statistics = Statistics()
        self.broken = torch.zeros(len(batch), dtype=torch.bool, device=batch.mask.device)

    def __call__(self, rows: Tensor, logps: Tensor, entropy: Tensor) -> Tensor:
        """Return the share of `rows` ([b] int64) in the loss; log-probs and entropies are [M]."""
        batch = self.batch.rows(rows)
        logps = scatter(logps, batch.mask)  # [b, T]

        # Where no old log-probs are kept, the policy is still the old one.
        old_logps = logps.detach() if batch.old_logps is None else batch.old_logps
        inputs = ObjectiveInputs(
            logps=logps,
            old_logps=old_logps,
            advantages=batch.advantages[:, None],
            mask=batch.mask,
            select=self.select[rows, : batch.mask.shape[1]],
            sampler_logps=batch.sampler_logps,
            ref_logps=batch.ref_logps,
            entropy=scatter(entropy, batch.mask),
        )

        loss, seen = self.objective.loss(
            inputs,
            self.denominators,
            progress=self.progress,
            entropy_coef=self.entropy_coef,
        )
        self.statistics.update(seen)
        self.broken[rows] = broken_rows(batch.mask, logps.detach(), old_logps, batch.ref_logps)
        return loss

    def router_share(self, router_loss: Tensor) -> Tensor:
        """Return the share of the chunk's load-balancing loss, a scalar, in the loss."""
        weight = len(self.batch) / self.denominators.num_rows
        figure = (weight * router_loss.detach(), weight)
        self.statistics.update(Statistics(means={"aux_loss": figure}))
        return self.router_coef * weight * router_loss


class Learner:
    """Takes the gradient of micro-batches, chunk by chunk.

    Args:
        args: The config.
        accelerator: The Trainer's own.
        objective: The loss of log-probs and advantages.
        entropy_bonus: Gives the weight of the entropy bonus in each step.
        logprobs: Runs the model.
        metrics: Gets the figures of each optimizer step.
        stopwatch: Counts the seconds of a selection by entropy.
        nonfinite_steps: Checks the gradient of each optimizer step.
        backward: Runs the backward pass of a loss.
    """

    def __init__(
        self,
        args: GRPOConfig,
        accelerator: Accelerator,
        *,
        objective: Objective,
        entropy_bonus: EntropyController,
        logprobs: LogProbs,
        metrics: Metrics,
        stopwatch: Stopwatch,
        nonfinite_steps: NonFiniteSteps,
        backward: Callable[[Tensor], None],
    ) -> None:
        self.args = args
        self.accelerator = accelerator
        self.objective = objective
        self.entropy_bonus = entropy_bonus
        self.logprobs = logprobs
        self.metrics = metrics
        self.stopwatch = stopwatch
        self.nonfinite_steps = nonfinite_steps
        self.backward = backward

        self.memory = logprobs.memory
        # Under FSDP and DeepSpeed each forward pass gathers weights from all ranks: a rank that
        # makes fewer passes than the others would leave them waiting.
        self.equal_passes = accelerator.distributed_type.value in ("FSDP", "DEEPSPEED")
        # DeepSpeed makes the optimizer's step at the end of the last backward pass.
        self.steps_in_backward = accelerator.distributed_type.value == "DEEPSPEED"
        # Micro-batches whose gradients this optimizer step has already.
        self._added: list[tuple[MicroBatch, float]] = []
        self._number = 0  # of this optimizer step
        # Figures of this optimizer step, which count only if it is made.
        self._of_step = Statistics()
        self._forget_entropy()

    def begin_step(self, number: int) -> None:
        """Forget the micro-batches of the last optimizer step; `number` counts from 1."""
        self._number = number
        self._added = []
        self._of_step = Statistics()
        self.nonfinite_steps.begin_step()

    def is_finite(self, model: nn.Module, grad_norm: Tensor | float | None) -> bool:
        """Return whether the optimizer may make its step, as `NonFiniteSteps.check` does."""
        if self.accelerator.scaler is not None:  # it skips steps that overflow, and scales less
            grad_norm = None
        if self.nonfinite_steps.check(model, grad_norm, step=self._number):
            return True
        self._of_step = Statistics()
        self._forget_entropy()
        return False

    def end_step(self) -> None:
        """Count the figures of an optimizer step, and move the coefficient of the entropy bonus.

        Every rank must call.
        """
        self.metrics.add(self._of_step)
        self.metrics.add(self.nonfinite_steps.statistics())
        self._of_step = Statistics()
        if not self.entropy_bonus.adaptive:
            return
        sums = torch.stack([torch.as_tensor(value) for value in self._step_entropy])
        total, count = distributed.all_reduce(sums).tolist()
        self.entropy_bonus.update(total / count if count else math.nan)
        self._forget_entropy()

    def _forget_entropy(self) -> None:
        # Sum and count over the tokens of this optimizer step.
        self._step_entropy = (torch.zeros(()), torch.zeros(()))

    def state_dict(self) -> dict[str, Any]:
        """Return the number of skipped steps, and the size that a lack of memory left to chunks."""
        return {
            "max_tokens_per_chunk": self.memory.max_tokens,
            "num_skipped": self.nonfinite_steps.num_skipped,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on with the chunks of `state`, unless the options ask for smaller ones."""
        self.nonfinite_steps.num_skipped = state["num_skipped"]
        known = [self.args.max_tokens_per_chunk, state["max_tokens_per_chunk"]]
        self.memory.max_tokens = min((size for size in known if size is not None), default=None)

    def skips_silent_rows(self, model: nn.Module) -> bool:
        """Return whether rows with an advantage of 0 move nothing, so that passes may skip them."""
        if self.args.zero_signal_groups == "keep" or self.logprobs.is_routed(model):
            return False
        # The controller steers by the entropy of all rows, in steps without a bonus too.
        if self.entropy_bonus.adaptive:
            return False
        return self.objective.zero_advantage_is_inert(self.entropy_bonus.coef)

    # -- gradients -------------------------------------------------------------------------------

    def add_gradient(self, model: nn.Module, inputs: MicroBatch, *, progress: float) -> Tensor:
        """Add the gradient of `inputs`, with smaller chunks where the memory does not suffice.

        A failed pass may have left a part of its gradient, so the gradient of the optimizer step is
        computed again from its first micro-batch on: the update is the one that more memory would
        have given.

        Args:
            progress: Share of the training that is done, in [0, 1].

        Returns:
            This rank's share of the loss of the optimizer batch, times the number of ranks (which
            are averaged over).
        """
        repeated: list[tuple[MicroBatch, float]] = []
        while True:
            try:
                for earlier, its_progress in repeated:
                    self._add_chunks(model, dataclasses.replace(earlier, mode=None), its_progress)
                total = self._add_chunks(model, inputs, progress)
                self._added.append((inputs, progress))
                return total
            except Exception as error:
                batches = [inputs.batch, *[earlier.batch for earlier, _ in repeated]]
                self.memory.make_room(error, self._sizes(model, batches))

            model.zero_grad()
            self.nonfinite_steps.begin_step()
            repeated = self._added

    def _sizes(self, model: nn.Module, batches: list[Batch]) -> list[ChunkSize]:
        """Return the sizes of the chunks of some micro-batches; none among several ranks."""
        if distributed.world_size() > 1:  # cutting may be a collective
            return []
        sizes = []
        for batch in batches:
            rows, _ = self._rows_with_gradient(model, batch)
            sizes += map(self.logprobs.sizes_of(batch), self.aligned_chunks(batch, rows))
        return sizes

    def _add_chunks(self, model: nn.Module, inputs: MicroBatch, progress: float) -> Tensor:
        """Run forward and backward passes over the rows of `inputs` that can move the policy."""
        batch = inputs.batch
        inputs, select = self.with_selection(model, inputs)
        rows, counted = self._rows_with_gradient(model, batch)
        chunks = self.aligned_chunks(batch, rows)
        total = torch.zeros((), device=self.args.device)
        statistics = Statistics()

        for number, chunk_rows in enumerate(chunks):
            chunk = dataclasses.replace(inputs, batch=batch.rows(chunk_rows))
            chunk_select = select[chunk_rows, : chunk.batch.mask.shape[1]]
            with self._synchronised_only(model, last=number == len(chunks) - 1):
                loss, seen = self.loss(model, chunk, chunk_select, progress=progress)
                if self.steps_in_backward:
                    self.nonfinite_steps.check(model, None, step=self._number)
                self.backward(loss * distributed.world_size())
            total += loss.detach() * distributed.world_size()
            statistics.update(seen)

        if not chunks:
            fill_missing_gradients(model)
        if inputs.mode is not None:
            self.count(model, inputs, len(rows), statistics if counted else Statistics())
        return total

    def _rows_with_gradient(self, model: nn.Module, batch: Batch) -> tuple[Tensor, bool]:
        """Return the indices of the rows that can move the policy, and whether they count.

        Where none can, but other ranks wait for our backward pass, one row goes through the model
        without counting.
        """
        everything = torch.arange(len(batch))
        if not self.skips_silent_rows(model):
            return everything, True

        rows = has_signal(batch).nonzero().flatten()
        others_wait = distributed.world_size() > 1 or self.equal_passes
        return (rows, True) if len(rows) or not others_wait else (everything[:1], False)

    def count(
        self, model: nn.Module, inputs: MicroBatch, num_rows: int, statistics: Statistics
    ) -> None:
        """Add what was seen in a micro-batch to the step's figures and to the bonus's controller.

        Args:
            num_rows: Rows that went through the model.
        """
        if inputs.mode == "eval":
            self.metrics.add(statistics, mode="eval")
            return

        num_of_batch = len(inputs.batch)
        if self.skips_silent_rows(model):
            statistics.means["signal/rows"] = (float(num_rows), float(num_of_batch))
        if self.entropy_bonus.is_on:
            weight = num_of_batch / inputs.denominators.num_rows
            statistics.means["entropy_coef"] = (weight * self.entropy_bonus.coefficient, weight)
        self._of_step.update(statistics)

        # With a selection by entropy, the bonus is of the selected tokens, and so is its control.
        seen = statistics.means
        of_step = seen.get("entropy/selected", seen.get("entropy"))
        if self.entropy_bonus.adaptive and of_step is not None:
            total, count = self._step_entropy
            self._step_entropy = (total + of_step[0], count + of_step[1])

    @contextlib.contextmanager
    def _synchronised_only(self, model: nn.Module, *, last: bool) -> Iterator[None]:
        """Let the ranks' gradients meet in the last chunk of a micro-batch only."""
        state = self.accelerator.gradient_state
        wanted = state.sync_gradients
        state._set_sync_gradients(wanted and last)
        try:
            with contextlib.nullcontext() if last else self.accelerator.no_sync(model):
                yield
        finally:
            state._set_sync_gradients(wanted)

    # -- losses ----------------------------------------------------------------------------------

    def loss(
        self, model: nn.Module, inputs: MicroBatch, select: Tensor, *, progress: float
    ) -> tuple[Tensor, Statistics]:
        """Return the differentiable share of `inputs` in the loss of its optimizer batch, a scalar.

        Args:
            select: [B, T] the tokens that may receive policy gradient.
            progress: Share of the training that is done, in [0, 1].

        Returns:
            The loss, and the figures of these rows.
        """
        batch = inputs.batch
        chunk_loss = ChunkLoss(
            self.objective,
            batch,
            select,
            inputs.denominators,
            progress=progress,
            entropy_coef=self.entropy_bonus.coef if self.entropy_bonus.is_on else None,
            router_coef=self.args.router_aux_loss_coef,
        )
        loss = self.logprobs.loss(
            model,
            batch,
            chunk_loss,
            router_share=chunk_loss.router_share,
            want_entropy_grad=self.entropy_bonus.coef != 0.0,
        )
        if torch.is_grad_enabled():
            self.nonfinite_steps.note(batch, chunk_loss.broken, loss)
        return loss, chunk_loss.statistics

    @torch.no_grad()
    def value(
        self, model: nn.Module, inputs: MicroBatch, *, progress: float
    ) -> tuple[Tensor, Statistics]:
        """Return the loss of `inputs`, a scalar on the CPU, and its figures, without gradients."""
        batch = inputs.batch
        total, statistics = torch.zeros(()), Statistics()
        inputs, select = self.with_selection(model, inputs)

        def add(rows: Tensor) -> None:
            chunk = dataclasses.replace(inputs, batch=batch.rows(rows))
            chunk_select = select[rows, : chunk.batch.mask.shape[1]]
            share, seen = self.loss(model, chunk, chunk_select, progress=progress)
            total.add_(share.cpu())
            statistics.update(seen)

        self.memory.run(
            torch.arange(len(batch)),
            lambda rows: self.aligned_chunks(batch, rows),
            self.logprobs.sizes_of(batch),
            add,
        )
        return total, statistics

    def aligned_chunks(self, batch: Batch, rows: Tensor) -> list[Tensor]:
        """Cut `rows` ([b] int64) into chunks; as many on every rank with `equal_passes`."""
        chunks = self.logprobs.chunks_that_fit(batch, rows.cpu())
        return distributed.pad_to_max_count(chunks) if self.equal_passes else chunks

    def with_selection(self, model: nn.Module, inputs: MicroBatch) -> tuple[MicroBatch, Tensor]:
        """Return `inputs` with the count of its selected tokens, and these, [B, T]."""
        select = self.select(model, inputs.batch)
        if not self.objective.selects_by_entropy:
            return inputs, select
        denominators = dataclasses.replace(
            inputs.denominators, micro_batch_selected=float(select.sum())
        )
        return dataclasses.replace(inputs, denominators=denominators), select

    def select(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return [B, T], the tokens that may receive policy gradient.

        These are all of them, or those whose entropy is high among the tokens of all ranks.
        """
        if not self.objective.selects_by_entropy:
            return batch.mask
        with self.stopwatch.timed("old_logps"):
            entropy = self.logprobs.compute_without_grad(model, batch).entropy
        threshold = entropy_threshold(
            distributed.all_gather(entropy[batch.mask]), self.objective.top_entropy_quantile
        )
        return high_entropy_tokens(batch.mask, entropy, threshold)


def fill_missing_gradients(model: nn.Module) -> None:
    """Fill missing gradients with zeros, as rows without advantage would.

    Then the optimizer's momentum still applies.
    """
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
