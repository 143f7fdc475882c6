"""Dataset rows in, a batch to train on out: generate, reward, advantages.

No forward pass of the policy is made here, but those of the engine.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from gmpo import distributed
from gmpo.data.micro_batches import mixed_seed
from gmpo.data.resample import ReplacementPrompts, prompt_key
from gmpo.data.sampler import Rows
from gmpo.distributed import raise_on_all_ranks
from gmpo.report.completions import CompletionRecords
from gmpo.report.metrics import Stopwatch, rollout_statistics
from gmpo.reward.advantages import Advantages, group_advantages, reward_statistics
from gmpo.reward.score import Scored, score
from gmpo.reward.settings import RewardSettings
from gmpo.reward.types import RewardSource
from gmpo.rollout.engine import Engine, Request, Sampling
from gmpo.rollout.prompts.encoder import PromptEncoder
from gmpo.token_sets import TokenSets
from gmpo.types import Batch, Rollout, Statistics


@dataclass(slots=True)
class Collection:
    """One collection's rows on this rank, and everything that is worth reporting about them."""

    rows: Rows  # what the completions answer
    rollouts: list[Rollout]
    scored: Scored  # of this rank's rows
    all_rewards: Tensor  # [N, F] over all ranks, NaN = not scored
    advantages: Advantages  # [N] over all ranks
    batch: Batch
    dropped: list[Rollout] = field(default_factory=list)  # of prompts that others replaced

    def statistics(self, source_names: Sequence[str]) -> Statistics:
        """Return the figures of this rank's rows, with those of the rewards over all ranks."""
        statistics = rollout_statistics(self.rollouts)
        statistics.update(reward_statistics(source_names, self.all_rewards, self.advantages))
        statistics.update(Statistics(means={**self.scored.metrics}))
        return statistics

    def records(self, source_names: Sequence[str]) -> CompletionRecords:
        """Return this rank's rows for the completion log."""
        rewards = self.scored.rewards.T.tolist()  # [F][N]
        return CompletionRecords(
            prompts=[rollout.prompt.source for rollout in self.rollouts],
            completions=[rollout.completion for rollout in self.rollouts],
            rewards=dict(zip(source_names, rewards, strict=True)),
            advantages=self.batch.advantages.tolist(),
            extras=self.scored.extra,
        )

    def prompts_for_metrics(self) -> Tensor:
        """Return the prompts, [n, P] int64, with -100 on the padding at the left."""
        if not self.rollouts:  # a rank without rows: pad_sequence takes no empty list
            return torch.zeros(0, 1, dtype=torch.int64)
        prompts = [torch.tensor(rollout.prompt.ids) for rollout in self.rollouts]
        return nn.utils.rnn.pad_sequence(prompts, True, -100, "left")

    def predictions_for_metrics(self) -> Tensor:
        """Return the completions, [n, T] int64, with -100 on the padding at the right."""
        columns = torch.arange(self.batch.completion_ids.shape[1])
        padding = columns >= self.batch.lengths[:, None]
        return self.batch.completion_ids.masked_fill(padding, -100)


@dataclass
class Collector:
    """Maker of collections out of the stages; every rank calls `collect` at the same time."""

    engine: Engine
    encoder: PromptEncoder
    sources: Sequence[RewardSource]
    sampling: Sampling
    reward_settings: RewardSettings
    mask_truncated: bool
    stopwatch: Stopwatch
    replacements: ReplacementPrompts | None = None  # for prompts whose groups carry no signal
    max_resamples: int = 0  # how often to look for better ones, at most
    trainer_state: Any = None  # what reward functions get as `trainer_state`

    def collect(
        self, rows: Rows, *, group_size: int, seed: int, version: int, resample: bool = False
    ) -> Collection:
        """Generate, score and take advantages.

        Args:
            rows: This rank's share of the collection.
            group_size: Completions per prompt.
            seed: Names all random numbers of the collection.
            version: Of the policy's weights.
            resample: Draw other prompts for groups without signal.
        """
        collection = self._collect_once(rows, group_size, seed=seed, version=version)
        if not resample or self.replacements is None:
            return collection

        for attempt in range(1, self.max_resamples + 1):
            drawn = self._draw(collection, group_size, seed=mixed_seed(seed, attempt, 0))
            if not drawn:
                break
            part = replaced_rows(collection.rows, drawn, group_size)
            part_seed = mixed_seed(seed, attempt, 1)
            new = self._collect_once(part, group_size, seed=part_seed, version=version)
            collection = self._merge(collection, new, drawn, group_size)
        return collection

    def _collect_once(self, rows: Rows, group_size: int, *, seed: int, version: int) -> Collection:
        rollouts = self._generate(rows, group_size, seed=seed, version=version)
        with self.stopwatch.timed("reward"), raise_on_all_ranks("score the completions"):
            scored = score(self.sources, rollouts, rows.items, trainer_state=self.trainer_state)
        return self._with_advantages(rows, rollouts, scored, group_size)

    def _generate(self, rows: Rows, group_size: int, *, seed: int, version: int) -> list[Rollout]:
        with self.stopwatch.timed("publish"):
            self.engine.publish(version)

        with raise_on_all_ranks("encode the prompts"):
            requests = self._requests(rows, group_size, seed=seed)

        with self.stopwatch.timed("generate"):
            with raise_on_all_ranks("generate completions"):
                rollouts = roll_out(self.engine, requests, self.sampling, self.encoder)
            num_tokens = sum(len(rollout.ids) for rollout in rollouts)
            self.stopwatch.count_tokens("generate", num_tokens)
        return rollouts

    def _requests(self, rows: Rows, group_size: int, *, seed: int) -> list[Request]:
        """Return one request per prompt of this rank; no request if it has no rows.

        A group may begin on another rank: `first` is the number of its first sample here.

        Example:
            rows [a, a, b, b] at offset 2 with groups of 4:
            Request(a, count 2, first 2) of group 0, Request(b, count 2, first 0) of group 1
        """
        groups = group_indices(rows.items)
        starts = [i for i in range(len(groups)) if i == 0 or groups[i] != groups[i - 1]]
        prompts = self.encoder.encode([rows.items[i] for i in starts])

        requests = []
        for number, (prompt, start) in enumerate(zip(prompts, starts, strict=True)):
            group, first = divmod(rows.offset + start, group_size)
            count = groups.count(number)
            requests.append(Request(prompt, count, mixed_seed(seed, group), first))
        return requests

    def _with_advantages(
        self, rows: Rows, rollouts: list[Rollout], scored: Scored, group_size: int
    ) -> Collection:
        """Take the advantages of this rank's rows, relative to the rewards of all ranks."""
        all_rewards = distributed.all_gather(scored.rewards)
        rows_of_ranks = distributed.all_gather_objects(len(rollouts))
        offset = sum(rows_of_ranks[: distributed.rank()])

        with raise_on_all_ranks("take the advantages"):
            advantages = group_advantages(all_rewards, group_size, self.reward_settings)
            batch = as_batch(
                rollouts,
                advantages.advantages[offset : offset + len(rollouts)],
                group=group_indices(rows.items),
                mask_truncated=self.mask_truncated,
            )
        return Collection(rows, rollouts, scored, all_rewards, advantages, batch)

    # -- other prompts for groups without signal -------------------------------------------------

    def _draw(
        self, collection: Collection, group_size: int, *, seed: int
    ) -> dict[int, dict[str, Any]]:
        """Return a row for each group without signal, by its number over all ranks.

        Every rank must call, and gets the same.
        """
        assert self.replacements is not None
        silent = collection.advantages.zero_signal.view(-1, group_size).all(1)  # [groups]
        numbers = silent.nonzero().flatten().tolist()
        if not numbers:
            return {}

        with raise_on_all_ranks("compare the prompts of a collection"):
            here = {prompt_key(row) for row in collection.rows.items}
        at_hand = set().union(*distributed.all_gather_objects(here))
        with raise_on_all_ranks("draw other prompts"):
            drawn = self.replacements.draw(len(numbers), without=at_hand, seed=seed)
        return dict(zip(numbers, drawn, strict=False))

    def _merge(
        self,
        old: Collection,
        new: Collection,
        drawn: dict[int, dict[str, Any]],
        group_size: int,
    ) -> Collection:
        """Return `old` with the rows of `new` in the place of the groups that `drawn` names."""
        with raise_on_all_ranks("put other prompts in the place of groups without signal"):
            places = places_of(old.rows, drawn, group_size)
            rows, rollouts = list(old.rows.items), list(old.rollouts)
            for place, row, rollout in zip(places, new.rows.items, new.rollouts, strict=True):
                rows[place], rollouts[place] = row, rollout
            scored = old.scored.replaced(places, new.scored)

        merged = self._with_advantages(replace(old.rows, items=rows), rollouts, scored, group_size)
        merged.dropped = old.dropped + [old.rollouts[place] for place in places]
        return merged


def roll_out(
    engine: Engine,
    requests: Sequence[Request],
    sampling: Sampling,
    encoder: PromptEncoder,
) -> list[Rollout]:
    """Have the engine write the completions: groups contiguous, in the order of the requests."""
    rollouts: list[Rollout] = []
    groups = engine.generate(requests, sampling)
    for request, completions in zip(requests, groups, strict=True):
        for completion in completions:
            rollout = Rollout(
                prompt=request.prompt,
                ids=completion.ids,
                finish_reason=completion.finish_reason,
                sampler_logps=completion.logps,
                support=completion.support,
                completion=encoder.decode(request.prompt, completion.ids),
            )
            rollouts.append(rollout)
    return rollouts


def replaced_rows(rows: Rows, drawn: dict[int, dict[str, Any]], group_size: int) -> Rows:
    """Return this rank's share of the rows that `drawn` puts in the place of groups.

    Example:
        Groups of 4 and two ranks of 6 rows; group 1 is replaced by row y.  The first rank has two
        rows of it, rows 4 and 5: it gets [y, y] at offset 0.  The second has rows 6 and 7: it gets
        [y, y] at offset 2.
    """
    mine = [
        drawn[(rows.offset + place) // group_size] for place in places_of(rows, drawn, group_size)
    ]
    before = sum(1 for row in range(rows.offset) if row // group_size in drawn)
    return Rows(micro_step=rows.micro_step, offset=before, items=mine)


def places_of(rows: Rows, drawn: dict[int, dict[str, Any]], group_size: int) -> list[int]:
    """Return which of this rank's rows belong to the groups that `drawn` names."""
    return [
        place for place in range(len(rows.items)) if (rows.offset + place) // group_size in drawn
    ]


def group_indices(rows: Sequence[dict[str, Any]]) -> list[int]:
    """Number the groups of `rows`: rows of a group are one object and stand next to each other.

    Example:
        [a, a, b, a] -> [0, 0, 1, 2]
    """
    numbers: list[int] = []
    for i, row in enumerate(rows):
        if i == 0:
            numbers.append(0)
        else:
            numbers.append(numbers[-1] + (row is not rows[i - 1]))
    return numbers


def as_batch(
    rollouts: Sequence[Rollout],
    advantages: Tensor,
    *,
    group: Sequence[int],
    mask_truncated: bool,
) -> Batch:
    """Pad rollouts over their completion tokens.

    Args:
        advantages: [B].
        group: Number of each row's prompt within the collection.
        mask_truncated: Train on no token of a truncated completion.
    """
    lengths = torch.tensor([len(rollout.ids) for rollout in rollouts], dtype=torch.int64)
    width = max([1, *lengths.tolist()])
    completion_ids = torch.zeros(len(rollouts), width, dtype=torch.int64)
    written = torch.zeros(len(rollouts), width, dtype=torch.bool)
    sampler_logps = torch.zeros(len(rollouts), width)

    for i, rollout in enumerate(rollouts):
        size = len(rollout.ids)
        completion_ids[i, :size] = torch.tensor(rollout.ids, dtype=torch.int64)
        written[i, :size] = True if rollout.trained is None else torch.tensor(rollout.trained)
        if rollout.sampler_logps is not None:
            sampler_logps[i, :size] = torch.tensor(rollout.sampler_logps)

    mask = written
    if mask_truncated:
        truncated = torch.tensor([rollout.truncated for rollout in rollouts], dtype=torch.bool)
        mask = written & ~truncated[:, None]

    # Rows of a group keep one tensor, by which layouts know that they share their prompt.
    prompts = {id(rollout.prompt): rollout.prompt for rollout in rollouts}
    prompt_ids = {
        key: torch.tensor(prompt.ids, dtype=torch.int64) for key, prompt in prompts.items()
    }
    reported = len(rollouts) > 0 and all(r.sampler_logps is not None for r in rollouts)
    supports = [rollout.support for rollout in rollouts]

    return Batch(
        prompt_ids=[prompt_ids[id(rollout.prompt)] for rollout in rollouts],
        completion_ids=completion_ids,
        lengths=lengths,
        mask=mask,
        num_completion_tokens=written.sum(1),
        advantages=advantages.to(torch.float32),
        group=torch.tensor(group, dtype=torch.int64),
        sampler_logps=sampler_logps if reported else None,
        support=TokenSets.padded(supports, lengths.tolist(), width),
    )
