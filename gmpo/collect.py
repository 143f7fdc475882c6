"""Dataset rows in, a batch to train on out: generate, reward, advantages, old and reference log-probs."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from gmpo import distributed, sharding
from gmpo.data.micro_batches import mixed_seed
from gmpo.data.resample import SpareRows, prompt_key
from gmpo.data.sampler import Rows
from gmpo.policy.logprobs import Scorer
from gmpo.report.metrics import Stopwatch
from gmpo.reward.advantages import Advantages, group_advantages
from gmpo.reward.score import Scored, score
from gmpo.reward.settings import RewardSettings
from gmpo.reward.types import RewardSource
from gmpo.rollout.engine import Engine, Request, Sampling
from gmpo.rollout.prompts.encoder import PromptEncoder
from gmpo.rollout.rollouts import roll_out
from gmpo.token_sets import TokenSets
from gmpo.types import Batch, Rollout, Scores


@dataclass(slots=True)
class Collection:
    """One collection's rows on this rank, and everything that is worth reporting about them."""

    rows: Rows  # what the completions answer
    rollouts: list[Rollout]
    scored: Scored  # of this rank's rows
    all_rewards: Tensor  # [N, F] over all ranks, NaN = not scored
    advantages: Advantages  # [N] over all ranks
    batch: Batch
    dropped: list[Rollout] = field(default_factory=list)  # of prompts that others were drawn for


@dataclass(slots=True)
class Collector:
    """Makes collections.  Holds the stages; every rank calls `collect` at the same time."""

    engine: Engine
    encoder: PromptEncoder
    sources: Sequence[RewardSource]
    scorer: Scorer
    reward_settings: RewardSettings
    mask_truncated: bool
    stopwatch: Stopwatch
    precision: Callable[[], Any]  # makes the context of mixed precision
    rows_per_forward: int  # of a scoring pass without a gradient
    max_tokens_per_chunk: int | None
    trainer_state: Any = None  # what reward functions get as `trainer_state`

    def collect(
        self,
        rows: Rows,
        *,
        sampling: Sampling,
        group_size: int,
        seed: int,
        version: int,
        spare: SpareRows | None = None,
        max_resamples: int = 0,
    ) -> Collection:
        """Generate, score and take advantages.  Old and reference log-probs come later, where they are needed.

        Args:
            spare: Where prompts come from that are put in the place of those whose groups carry no signal.
            max_resamples: How often to look for better ones, at most.
        """
        write = partial(self._written, sampling=sampling, group_size=group_size, version=version)
        collection = write(rows, seed=seed)
        for attempt in range(1, max_resamples + 1):
            if spare is None:
                break
            chosen = replacements(collection, group_size, spare, seed=mixed_seed(seed, attempt, 0))
            if not chosen:
                break
            part = replaced_rows(collection.rows, chosen, group_size)
            again = write(part, seed=mixed_seed(seed, attempt, 1))
            collection = self._merged(collection, again, chosen, group_size)
        return collection

    def _written(
        self, rows: Rows, *, sampling: Sampling, group_size: int, seed: int, version: int
    ) -> Collection:
        rollouts = self._generate(
            rows, sampling=sampling, group_size=group_size, seed=seed, version=version
        )
        with self.stopwatch.timed("reward"):
            scored = together(
                lambda: score(self.sources, rollouts, rows.rows, trainer_state=self.trainer_state)
            )
        return self._weighed(rows, rollouts, scored, group_size)

    def _weighed(
        self, rows: Rows, rollouts: list[Rollout], scored: Scored, group_size: int
    ) -> Collection:
        """With advantages, which take the rewards of all ranks."""
        all_rewards = distributed.gathered(scored.rewards)
        advantages = group_advantages(all_rewards, group_size, self.reward_settings)
        offset = sum(distributed.gathered_objects(len(rollouts))[: distributed.rank()])
        mine = advantages.advantages[offset : offset + len(rollouts)]
        batch = as_batch(
            rollouts, mine, group=group_indices(rows.rows), mask_truncated=self.mask_truncated
        )
        return Collection(rows, rollouts, scored, all_rewards, advantages, batch)

    def _merged(
        self, old: Collection, new: Collection, chosen: dict[int, dict[str, Any]], group_size: int
    ) -> Collection:
        """`old` with the rows of `new` in the place of the groups that `chosen` names."""
        places = places_of(old.rows, chosen, group_size)
        rows, rollouts = list(old.rows.rows), list(old.rollouts)
        for place, row, rollout in zip(places, new.rows.rows, new.rollouts, strict=True):
            rows[place], rollouts[place] = row, rollout
        merged = self._weighed(
            replace(old.rows, rows=rows),
            rollouts,
            old.scored.replaced(places, new.scored),
            group_size,
        )
        merged.dropped = old.dropped + [old.rollouts[place] for place in places]
        return merged

    def _generate(
        self, rows: Rows, *, sampling: Sampling, group_size: int, seed: int, version: int
    ) -> list[Rollout]:
        with self.stopwatch.timed("publish"):
            self.engine.publish(version)
        groups = group_indices(rows.rows)
        starts = [i for i in range(len(groups)) if i == 0 or groups[i] != groups[i - 1]]
        prompts = together(lambda: self.encoder.encode([rows.rows[i] for i in starts]))
        ends = [*starts[1:], len(groups)]
        requests = []
        for prompt, start, end in zip(prompts, starts, ends, strict=True):
            group, first = divmod(rows.first + start, group_size)
            requests.append(Request(prompt, end - start, mixed_seed(seed, group), first))
        with self.stopwatch.timed("generate"):
            rollouts = together(
                lambda: roll_out(self.engine, requests, sampling, self.encoder, version=version)
            )
            self.stopwatch.count_tokens("generate", sum(len(rollout.ids) for rollout in rollouts))
        return rollouts

    def add_reference(self, reference: Any, model: Any, batch: Batch) -> None:
        """Fill in `ref_logps`."""
        with self.stopwatch.timed("old_logps"), reference.scoring(model) as frozen:
            batch.ref_logps = self._scored(frozen, batch).logps

    def add_old(self, model: Any, batch: Batch, rows: Tensor) -> None:
        """Fill in `old_logps` of `rows` ([b] int64), those that are trained on after the policy has moved."""
        with self.stopwatch.timed("old_logps"):
            width = batch.completion_ids.shape[1]
            part = self._scored(model, batch.rows(rows)).logps
            batch.old_logps = part.new_zeros(len(batch), width)
            batch.old_logps[rows, : part.shape[1]] = part

    def entropy(self, model: Any, batch: Batch) -> Tensor:
        """[B, T] entropy of the policy as it is."""
        with self.stopwatch.timed("old_logps"):
            return self._scored(model, batch).entropy

    @torch.no_grad()
    def _scored(self, model: Any, batch: Batch) -> Scores:
        """Log-probs and entropy of all rows, chunk by chunk, without a gradient."""
        training = model.training
        model.eval()
        parts = []
        for rows in self._passes(model, batch):
            with self.precision():
                parts.append((rows, self.scorer.scores(model, batch.rows(rows))))
        model.train(training)
        dtype = parts[0][1].logps.dtype if parts else torch.float32
        logps, entropy = (
            torch.zeros(batch.mask.shape, dtype=dtype, device=batch.mask.device) for _ in range(2)
        )
        for rows, scores in parts:
            width = scores.logps.shape[1]
            logps[rows, :width], entropy[rows, :width] = scores.logps, scores.entropy
        return Scores(logps=logps, entropy=entropy)

    def _passes(self, model: Any, batch: Batch) -> list[Tensor]:
        """Rows ([b] int64) of each forward pass; as many passes on every rank where the model is sharded."""
        passes = [
            rows[chunk.cpu()]
            for rows in torch.arange(len(batch)).split(self.rows_per_forward)
            for chunk in self.scorer.chunks(batch.rows(rows), self.max_tokens_per_chunk)
        ]
        return distributed.as_many_everywhere(passes) if sharding.sharded(model) else passes


def replacements(
    collection: Collection, group_size: int, spare: SpareRows, *, seed: int
) -> dict[int, dict[str, Any]]:
    """A row for each group without signal, by the group's number over all ranks.  Every rank must call."""
    silent = (
        collection.advantages.zero_signal.view(-1, group_size).all(1).nonzero().flatten().tolist()
    )
    if not silent:
        return {}
    here = {prompt_key(row) for row in collection.rows.rows}
    at_hand = set().union(*distributed.gathered_objects(here))
    drawn = together(lambda: spare.draw(len(silent), without=at_hand, seed=seed))
    return dict(zip(silent, drawn, strict=False))


def replaced_rows(rows: Rows, chosen: dict[int, dict[str, Any]], group_size: int) -> Rows:
    """This rank's share of the rows of the groups that `chosen` names, with the rows that it gives them."""
    mine = [
        chosen[(rows.first + place) // group_size] for place in places_of(rows, chosen, group_size)
    ]
    before = sum(1 for row in range(rows.first) if row // group_size in chosen)
    return Rows(position=rows.position, first=before, rows=mine)


def places_of(rows: Rows, chosen: dict[int, dict[str, Any]], group_size: int) -> list[int]:
    """Which of this rank's rows belong to the groups that `chosen` names."""
    return [
        place for place in range(len(rows.rows)) if (rows.first + place) // group_size in chosen
    ]


def group_indices(rows: Sequence[dict[str, Any]]) -> list[int]:
    """The number of each row's group: rows of a group are one object and stand next to each other."""
    numbers: list[int] = []
    for i, row in enumerate(rows):
        same = i > 0 and row is rows[i - 1]
        numbers.append(numbers[-1] + (not same) if numbers else 0)
    return numbers


def as_batch(
    rollouts: Sequence[Rollout], advantages: Tensor, *, group: Sequence[int], mask_truncated: bool
) -> Batch:
    """Pad rollouts over their completion tokens."""
    lengths = torch.tensor([len(rollout.ids) for rollout in rollouts], dtype=torch.int64)
    width = max([1, *lengths.tolist()])
    completion_ids = torch.zeros(len(rollouts), width, dtype=torch.int64)
    written = torch.zeros(len(rollouts), width, dtype=torch.bool)
    sampler_logps = torch.zeros(len(rollouts), width)
    shared = {
        id(rollout.prompt): torch.tensor(rollout.prompt.ids, dtype=torch.int64)
        for rollout in rollouts
    }
    for i, rollout in enumerate(rollouts):
        size = len(rollout.ids)
        completion_ids[i, :size] = torch.tensor(rollout.ids, dtype=torch.int64)
        written[i, :size] = torch.tensor(rollout.trained) if rollout.trained is not None else True
        if rollout.sampler_logps is not None:
            sampler_logps[i, :size] = torch.tensor(rollout.sampler_logps)
    truncated = torch.tensor([rollout.truncated for rollout in rollouts], dtype=torch.bool)
    reported = len(rollouts) > 0 and all(rollout.sampler_logps is not None for rollout in rollouts)
    return Batch(
        prompt_ids=[shared[id(rollout.prompt)] for rollout in rollouts],
        completion_ids=completion_ids,
        lengths=lengths,
        mask=written & ~truncated[:, None] if mask_truncated else written,
        num_written=written.sum(1),
        advantages=advantages.to(torch.float32),
        group=torch.tensor(group, dtype=torch.int64),
        sampler_logps=sampler_logps if reported else None,
        support=TokenSets.padded(
            [rollout.support for rollout in rollouts], lengths.tolist(), width
        ),
        policy_version=rollouts[0].policy_version if rollouts else 0,
    )


def together(work: Callable[[], Any]) -> Any:
    """`work()`, which may fail on one rank alone: then every rank raises, so that none waits for it for ever."""
    error: Exception | None = None
    result = None
    try:
        result = work()
    except Exception as caught:
        error = caught
    if distributed.any_rank(error is not None):
        if error is None:
            error = RuntimeError(
                "Another rank failed while it made or scored completions; its own error tells why."
            )
        error.raised_on_every_rank = True  # pyright: ignore[reportAttributeAccessIssue]
        raise error
    return result
