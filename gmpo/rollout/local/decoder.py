"""The decoding loop: prompts are read once, finished rows leave, waiting rows enter."""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gmpo.rollout.engine import Request
from gmpo.rollout.local.cache import SharedPrefixCache, attention_over
from gmpo.rollout.local.sampler import Sampler
from gmpo.rollout.local.sequence import GrowingSequence, StopCriteria, new_sequences


@dataclass(frozen=True, slots=True)
class Limits:
    """What may be in the works at a time.  Where a single row or prompt is beyond them, it runs alone."""

    rows: int
    cache_tokens: int  # of the prompts, plus the token budgets of the rows
    prefill_tokens: int  # of one forward pass over prompts


class Decoder:
    """Writes the completions of some requests.

    Args:
        model: transformers model that `prefix_cache` can serve, ready to generate.
        sampler: Chooses tokens.
        ending: Says when a draft is finished.
        limits: Bounds of memory.
    """

    def __init__(
        self, model: Any, sampler: Sampler, stop_criteria: StopCriteria, limits: Limits
    ) -> None:
        self.model = model
        self.sampler = sampler
        self.stop_criteria = stop_criteria
        self.limits = limits
        self.device = model.device
        self.cache = SharedPrefixCache(
            model.config.get_text_config().num_hidden_layers, self.device
        )
        self.prompts: list[Request] = []  # in the cache, in its order
        self.rows: list[GrowingSequence] = []  # being written, in the cache's order
        self.ready: deque[GrowingSequence] = deque()  # prompt read, first token drawn, no row yet

    def write(self, requests: Sequence[Request]) -> list[list[GrowingSequence]]:
        """Finished drafts of each request."""
        samples = [new_sequences(request) for request in requests]
        # Prompts of one length are read and forgotten together, so that little of the prompts' rectangle is empty.
        waiting = deque(sorted(samples, key=lambda group: -len(group[0].request.prompt.ids)))
        with attention_over(self.model, self.cache):
            while waiting or self.ready or self.rows:
                self._admit(waiting)
                if self.rows:
                    self._step()
        return samples

    # -- rows enter and leave -----------------------------------------------------------------------------------------

    def _admit(self, waiting: deque[list[GrowingSequence]]) -> None:
        """Let rows enter while there is room, reading prompts as needed."""
        while True:
            while self.ready and (not self.rows or self._fits(0, len(self.rows) + 1)):
                self._enter(self.ready.popleft())
            batch = self._next_prompts(waiting)
            if not batch:
                return
            self._read(batch)

    def _enter(self, sequence: GrowingSequence) -> None:
        number = next(n for n, request in enumerate(self.prompts) if request is sequence.request)
        self.cache.enter([number])
        self.rows.append(sequence)

    def _leave(self) -> None:
        """Let go of finished rows."""
        finished = [number for number, row in enumerate(self.rows) if row.finish_reason is not None]
        if finished:
            self.rows = [self.rows[number] for number in self.cache.leave(finished)]
            self._forget()

    def _forget(self) -> None:
        """Let go of prompts that nobody needs any more."""
        needed = {id(sequence.request) for sequence in (*self.rows, *self.ready)}
        idle = [number for number, request in enumerate(self.prompts) if id(request) not in needed]
        if idle:
            self.prompts = [self.prompts[number] for number in self.cache.forget(idle)]

    def _fits(self, prompt_tokens: int, rows: int) -> bool:
        """Whether this many rows may be at work, with so many tokens of further prompts."""
        tokens = (
            prompt_tokens
            + sum(self.cache.prompt_lengths)
            + rows * self.stop_criteria.max_new_tokens
        )
        return rows <= self.limits.rows and tokens <= self.limits.cache_tokens

    def _next_prompts(self, waiting: deque[list[GrowingSequence]]) -> list[list[GrowingSequence]]:
        """Groups whose prompts to read now: those of which a row at least finds room."""
        batch: list[list[GrowingSequence]] = []
        tokens, rows = 0, len(self.rows)
        while waiting and not self.ready:
            length, count = len(waiting[0][0].request.prompt.ids), len(waiting[0])
            alone = not (batch or self.rows)
            fits = (
                self._fits(tokens + length, rows + 1)
                and tokens + length <= self.limits.prefill_tokens
            )
            if not (alone or fits):
                break
            batch.append(waiting.popleft())
            tokens, rows = tokens + length, rows + count
        return batch

    # -- forward passes -----------------------------------------------------------------------------------------------

    def _read(self, groups: list[list[GrowingSequence]]) -> None:
        """Run the prompts through the model, one after another in one pass, and draw the first token of each draft."""
        requests = [group[0].request for group in groups]
        lengths = [len(request.prompt.ids) for request in requests]
        ids = [token for request in requests for token in request.prompt.ids]
        positions = [position for length in lengths for position in range(length)]
        last = torch.tensor(lengths, device=self.device).cumsum(0) - 1
        with self.cache.reading(lengths):
            logits = packed_logits(self.model, self.cache, ids, positions, keep=last)  # [groups, V]
        self.prompts += requests
        rows = [sequence for group in groups for sequence in group]
        group_of = torch.tensor(
            [n for n, group in enumerate(groups) for _ in group], device=self.device
        )
        self._write(logits[group_of], rows)
        self.ready.extend(row for row in rows if row.finish_reason is None)
        self._forget()

    def _step(self) -> None:
        """One more token for every row."""
        self.cache.begin_step()
        ids, positions = [row.ids[-1] for row in self.rows], [row.length - 1 for row in self.rows]
        logits = packed_logits(self.model, self.cache, ids, positions)  # [R, V]
        self.cache.end_step()
        self._write(logits, self.rows)
        self._leave()

    def _write(self, logits: Tensor, rows: Sequence[GrowingSequence]) -> None:
        self.sampler.choose(logits, rows).record(rows, self.stop_criteria)


def packed_logits(
    model: Any,
    cache: SharedPrefixCache,
    ids: Sequence[int],
    positions: Sequence[int],
    *,
    keep: Tensor | int = 0,
) -> Tensor:
    """One forward pass over N tokens in one row: logits [n, V] at the token numbers `keep`, or at all (0)."""
    return model(
        input_ids=torch.tensor([ids], device=model.device),
        position_ids=torch.tensor([list(positions)], device=model.device),
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=keep,
    ).logits[0]
