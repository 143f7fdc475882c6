"""The decoding loop: prompts are read once, finished rows leave, waiting rows enter."""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from gmpo.rollout.engine import Request, Work
from gmpo.rollout.local.cache import SharedPrefixCache, attention_over
from gmpo.rollout.local.sampler import Sampler
from gmpo.rollout.local.sequence import GrowingSequence, StopCriteria, new_sequences


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds of concurrent work.  A prompt or completion beyond them runs on its own."""

    rows: int
    cache_tokens: int  # of the prompts, plus the token budgets of the rows
    prefill_tokens: int  # of one forward pass over prompts


class Decoder:
    """Writes completions of requests as they come.

    Args:
        model: One that `SharedPrefixCache` can serve, ready to generate.
        sampler: Chooses tokens.
        stop_criteria: Says when a sequence is finished.
        limits: Bounds of memory.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        sampler: Sampler,
        stop_criteria: StopCriteria,
        limits: Limits,
    ) -> None:
        self.model = model
        self.sampler = sampler
        self.stop_criteria = stop_criteria
        self.limits = limits
        self.device = model.device
        layers = model.config.get_text_config().num_hidden_layers
        self.cache = SharedPrefixCache(layers, self.device)
        self.prompts: list[Request] = []  # in the cache, in its order
        self.rows: list[GrowingSequence] = []  # being written, in the cache's order
        self.ready: deque[GrowingSequence] = deque()  # prompt read, first token drawn, no row yet
        self.waiting: deque[list[GrowingSequence]] = deque()  # groups whose prompts are not read
        self.finished: list[GrowingSequence] = []  # not given back yet

    def serve(self, work: Work) -> None:
        """Write completions until there is no more work; each is given back as it is finished."""
        over = False
        with attention_over(self.model, self.cache):
            while not (over and self._idle()):
                over = over or self._take(work)
                self._admit()
                if self.rows:
                    self._step()
                self._give(work)

    # -- work comes and goes ---------------------------------------------------------------------

    def _idle(self) -> bool:
        return not (self.waiting or self.ready or self.rows)

    def _take(self, work: Work) -> bool:
        """Take requests for the rows that are free, and return whether there will be no more."""
        open_rows = len(self.rows) + len(self.ready) + sum(map(len, self.waiting))
        room = self.limits.rows - open_rows
        if room < 1 and not self._idle():
            return False

        taken = work.take(max(1, room), wait=self._idle())
        if taken is None:
            return True
        groups = [*self.waiting, *(new_sequences(request) for request in taken)]
        # Prompts of one length are read and forgotten together, so that little of the prompts'
        # rectangle is empty.
        groups.sort(key=lambda group: -len(group[0].request.context))
        self.waiting = deque(groups)
        return False

    def _give(self, work: Work) -> None:
        for row in self.finished:
            work.give(row.request, row.number, row.completion())
        self.finished = []

    # -- rows enter and leave --------------------------------------------------------------------

    def _admit(self) -> None:
        """Let rows enter while there is room, reading prompts as needed."""
        while True:
            while self.ready and self._has_room():
                self._enter(self.ready.popleft())
            batch = self._next_prompts()
            if not batch:
                return
            self._read(batch)

    def _has_room(self) -> bool:
        """Return whether the next row that is ready may enter."""
        return not self.rows or self._fits(0, [*self.rows, self.ready[0]])

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

    def _fits(self, prompt_tokens: int, rows: Sequence[GrowingSequence]) -> bool:
        """Return whether these rows may be at work, with so many tokens of further prompts."""
        budgets = sum(self.stop_criteria.budget(row.request) for row in rows)
        tokens = prompt_tokens + sum(self.cache.prompt_lengths) + budgets
        return len(rows) <= self.limits.rows and tokens <= self.limits.cache_tokens

    def _next_prompts(self) -> list[list[GrowingSequence]]:
        """Return the groups whose prompts to read now: at least one row of each finds room."""
        batch: list[list[GrowingSequence]] = []
        tokens, rows = 0, list(self.rows)
        while self.waiting and not self.ready:
            group = self.waiting[0]
            length = len(group[0].request.context)
            alone = not (batch or self.rows)
            fits = self._fits(tokens + length, [*rows, group[0]])
            if not (alone or (fits and tokens + length <= self.limits.prefill_tokens)):
                break
            batch.append(self.waiting.popleft())
            tokens += length
            rows += group
        return batch

    # -- forward passes --------------------------------------------------------------------------

    def _read(self, groups: list[list[GrowingSequence]]) -> None:
        """Read prompts, one after another in one pass, and draw the first token of each sequence.

        Example:
            Prompts of 3 and 2 tokens with 2 and 1 samples: positions [0, 1, 2, 0, 1], logits at
            tokens [2, 4], of which the rows take [0, 0, 1].
        """
        requests = [group[0].request for group in groups]
        lengths = [len(request.context) for request in requests]
        ids = [token for request in requests for token in request.context]
        positions = [position for length in lengths for position in range(length)]
        last = torch.tensor(lengths, device=self.device).cumsum(0) - 1
        with self.cache.reading(lengths):
            logits = packed_logits(self.model, self.cache, ids, positions, keep=last)  # [groups, V]

        self.prompts += requests
        rows = [sequence for group in groups for sequence in group]
        group_of = [number for number, group in enumerate(groups) for _ in group]
        self._write(logits[torch.tensor(group_of, device=self.device)], rows)
        self.ready.extend(row for row in rows if row.finish_reason is None)
        self._forget()

    def _step(self) -> None:
        """Write one more token of every row."""
        self.cache.begin_step()
        ids, positions = [row.ids[-1] for row in self.rows], [row.length - 1 for row in self.rows]
        logits = packed_logits(self.model, self.cache, ids, positions)  # [R, V]
        self.cache.end_step()
        self._write(logits, self.rows)
        self._leave()

    def _write(self, logits: Tensor, rows: Sequence[GrowingSequence]) -> None:
        self.sampler.choose(logits, rows).record(rows, self.stop_criteria)
        self.finished += [row for row in rows if row.finish_reason is not None]


def packed_logits(
    model: PreTrainedModel,
    cache: SharedPrefixCache,
    ids: Sequence[int],
    positions: Sequence[int],
    *,
    keep: Tensor | int = 0,
) -> Tensor:
    """Run one forward pass over N tokens in one row, and return logits.

    Args:
        keep: The token numbers whose logits to return; 0 for all.

    Returns:
        [n, V].
    """
    return model(
        input_ids=torch.tensor([ids], device=model.device),
        position_ids=torch.tensor([list(positions)], device=model.device),
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=keep,
    ).logits[0]
