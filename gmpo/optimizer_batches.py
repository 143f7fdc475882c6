"""The micro-batches of each optimizer step, out of collections that are made when one is due.

collection of N rows, steps_per_generation=4, gradient_accumulation_steps=2, num_iterations=1

optimizer step     |        1        |        2        |
micro-batches      |   0        1    |   2        3    |
old log-probs      |  the policy's   |  kept from     |
                   |  own, as it is  |  before step 1  |
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from gmpo import distributed
from gmpo.collect import Collection, Collector
from gmpo.config import GRPOConfig
from gmpo.data.micro_batches import (
    has_signal,
    mixed_seed,
    pack_signal_rows,
    split_into_micro_batches,
)
from gmpo.data.sampler import Rows
from gmpo.learn import Learner, MicroBatch
from gmpo.objective.types import Denominators
from gmpo.policy.logprobs import LogProbs
from gmpo.policy.reference import Reference
from gmpo.rollout.weights.version import PolicyVersion
from gmpo.token_sets import TokenSets
from gmpo.types import Batch


class OptimizerBatches:
    """Cuts collections into the micro-batches of optimizer steps, ready to be trained on.

    Args:
        args: The config.
        collector: Makes the collections.
        learner: Takes the gradients; its settings say which rows may be skipped.
        logprobs: Computes the old log-probs and the reference's.
        reference: The frozen policy of the KL term; None without one.
        policy_version: Counts the states of the policy's weights.
        report: Called with every collection that is made for training.
    """

    def __init__(
        self,
        args: GRPOConfig,
        *,
        collector: Collector,
        learner: Learner,
        logprobs: LogProbs,
        reference: Reference | None,
        policy_version: PolicyVersion,
        report: Callable[[Collection], None],
    ) -> None:
        self.args = args
        self.collector = collector
        self.learner = learner
        self.logprobs = logprobs
        self.reference = reference
        self.policy_version = policy_version
        self.report = report
        # Micro-batches of the current collection that were not trained on yet, in their order.
        self._waiting: list[Batch] = []

    def reset(self) -> None:
        """Forget what is left of the current collection."""
        self._waiting = []

    def state_dict(self) -> dict[str, Any]:
        """Return the micro-batches of the current collection that are still to be trained on.

        Tensors that they share are listed once: prompts, and the members of token sets.
        """
        prompts = distinct(ids for batch in self._waiting for ids in batch.prompt_ids)
        supports = [batch.support for batch in self._waiting if batch.support is not None]
        members = distinct(support.ids for support in supports)
        return {
            "prompts": list(prompts.values()),
            "members": list(members.values()),
            "micro_batches": [
                batch_state(batch, list(prompts), list(members)) for batch in self._waiting
            ],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on within the collection that `state_dict` returned."""
        prompts = [ids.to(self.args.device) for ids in state["prompts"]]
        members = [ids.to(self.args.device) for ids in state["members"]]
        self._waiting = [
            batch_of(kept, prompts, members).to(self.args.device) for kept in state["micro_batches"]
        ]

    def next(
        self, model: nn.Module, rows: Iterator[Rows], num_micro_batches: int, *, step: int
    ) -> list[MicroBatch]:
        """Return the micro-batches of the next optimizer step; fewer where `rows` end.

        Args:
            model: The policy, wrapped.
            rows: This rank's share of a collection, once per micro-step.
            num_micro_batches: Of the optimizer step.
            step: Optimizer steps that are done.
        """
        self.learner.begin_step(step + 1)
        with distributed.raise_on_all_ranks("read the next rows"):
            shares = list(itertools.islice(rows, num_micro_batches))

        batches: list[Batch] = []
        num_collections = 0
        for number, share in enumerate(shares):
            if share.micro_step == 0 or not self._waiting:
                # Step and number of collections seed everything random in this one.
                seed = mixed_seed(self.args.seed, step, num_collections)
                remaining = num_micro_batches - number
                self._waiting = self._collect(model, share, seed=seed, remaining=remaining)
                num_collections += 1
            batches.append(self._waiting.pop(0))

        counts = self.denominators(batches)
        return [MicroBatch(batch, of_it) for batch, of_it in zip(batches, counts, strict=True)]

    def _collect(self, model: nn.Module, rows: Rows, *, seed: int, remaining: int) -> list[Batch]:
        """Make a collection and cut it into micro-batches.

        Args:
            remaining: How many of them belong to this optimizer step, before which the policy has
                not moved.
        """
        collection = self.collector.collect(
            rows,
            group_size=self.args.num_generations,
            seed=seed,
            version=self.policy_version.current,
            resample=True,
        )
        self.report(collection)

        with distributed.raise_on_all_ranks("cut a collection into micro-batches"):
            batch = collection.batch.to(self.args.device)
            numbers = [getattr(row, "number", -1) for row in collection.rows.items]
            batch.dataset_rows = torch.tensor(numbers, dtype=torch.int64)
            indices = split_into_micro_batches(
                collection.batch.group,
                rows=self.args.per_device_train_batch_size,
                passes=self.args.num_iterations,
                seed=seed,
            )[rows.micro_step :]
            indices = self._pack_signal_rows(model, indices, batch, first=remaining)

        self.add_reference(model, batch)
        self._add_old(model, batch, indices[remaining:])

        micro_batches = [batch.rows(index) for index in indices]
        for micro_batch in micro_batches[:remaining]:
            micro_batch.old_logps = None  # the policy's own are the old ones
        return micro_batches

    def _pack_signal_rows(
        self, model: nn.Module, indices: list[Tensor], batch: Batch, *, first: int
    ) -> list[Tensor]:
        """Pack rows with signal into as few micro-batches as possible; the rest become no-ops.

        Not done where the loss depends on how the rows are cut into micro-batches.
        """
        exact = not self.learner.objective.depends_on_micro_batches
        if not exact or not self.learner.skips_silent_rows(model):
            return indices
        window = self.args.gradient_accumulation_steps
        return pack_signal_rows(indices, has_signal(batch), first=first, window=window)

    def add_reference(self, model: nn.Module, batch: Batch) -> None:
        """Fill in `ref_logps` of all rows, if there is a reference."""
        if self.reference is None:
            return
        stopwatch = self.collector.stopwatch
        with stopwatch.timed("old_logps"), self.reference.active(model) as frozen:
            batch.ref_logps = self.logprobs.compute_without_grad(frozen, batch).logps

    def _add_old(self, model: nn.Module, batch: Batch, indices: list[Tensor]) -> None:
        """Fill in `old_logps` of the rows of `indices`, which are trained on later."""
        if not indices:
            return

        rows = torch.unique(torch.cat(indices))
        # Among several ranks, each must run the model equally often.
        if distributed.world_size() == 1 and self.learner.skips_silent_rows(model):
            rows = rows[has_signal(batch)[rows]]

        with self.collector.stopwatch.timed("old_logps"):
            logps = self.logprobs.compute_without_grad(model, batch.rows(rows)).logps
        batch.old_logps = logps.new_zeros(batch.completion_ids.shape)
        batch.old_logps[rows, : logps.shape[1]] = logps

    def denominators(self, batches: list[Batch]) -> list[Denominators]:
        """Count the rows and tokens of an optimizer batch, over its micro-batches and all ranks.

        Tokens are those that are trained on: masked completions (`mask_truncated_completions`) have
        none, and count as rows only.  Every rank must call.
        """
        counts = torch.tensor(
            [
                sum(len(batch) for batch in batches),
                sum(int(batch.mask.sum()) for batch in batches),
                len(batches),
            ],
            dtype=torch.float64,
        )
        num_rows, tokens, micro_batches = distributed.all_reduce(counts).tolist()
        return [
            Denominators(
                num_rows=num_rows,
                tokens=tokens,
                micro_batch_tokens=float(batch.mask.sum()),
                micro_batches=micro_batches,
                max_completion_length=self.args.max_completion_length,
            )
            for batch in batches
        ]


def distinct(tensors: Iterable[Tensor]) -> dict[int, Tensor]:
    """Return each tensor object once, by its id."""
    return {id(tensor): tensor for tensor in tensors}


def batch_state(batch: Batch, prompts: list[int], members: list[int]) -> dict[str, Any]:
    """Return a batch as plain values and tensors.

    Args:
        prompts: Ids of the prompt tensors of all batches; the row gets its place among them.
        members: Ids of the tensors that the token sets of all batches lie in.
    """
    state = {field.name: getattr(batch, field.name) for field in dataclasses.fields(batch)}
    place = {key: i for i, key in enumerate(prompts)}
    state["prompt_ids"] = [place[id(ids)] for ids in batch.prompt_ids]
    if batch.support is not None:
        state["support"] = {
            "members": members.index(id(batch.support.ids)),
            "start": batch.support.start,
            "size": batch.support.size,
            "inverse": batch.support.inverse,
        }
    return state


def batch_of(state: dict[str, Any], prompts: list[Tensor], members: list[Tensor]) -> Batch:
    """Return the batch of a `batch_state`; rows of a group share one prompt tensor again."""
    values = dict(state)
    values["prompt_ids"] = [prompts[place] for place in state["prompt_ids"]]
    if (support := state["support"]) is not None:
        values["support"] = TokenSets(
            members[support["members"]], support["start"], support["size"], support["inverse"]
        )
    return Batch(**values)
