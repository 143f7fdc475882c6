"""The engine that works for every model: transformers' `generate`."""

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
)

from gmpo.rollout.engine import Completion, Request, Sampling, Work, serve_in_rounds
from gmpo.rollout.generation_mode import Autocast, generating
from gmpo.rollout.local.generation_options import sampling_config, stop_criteria
from gmpo.rollout.local.sampler import Sampler
from gmpo.rollout.local.sequence import GrowingSequence, StopCriteria, new_sequences
from gmpo.rollout.sampling import LOOP_OPTIONS
from gmpo.sharding import sharded
from gmpo.types import Prompt
from gmpo.unwrap import without_adapter

ROUND = 256  # requests that are written together, at most, where they come as they are ready


class GenerateEngine:
    """Makes completions with `model.generate`.

    `generate` runs the model and its cache, and nothing else: our sampler sees the untouched
    logits, chooses every token, and tells `generate` to take it.  So both engines sample alike and
    report the same log-probs, and never more than one step's logits are held.

    Args:
        policy: Gives the trainer's model as it is now, without wrappers but PEFT's.
        tokenizer: For stop strings.
        eos: Tokens that end a completion.
        pad: Token that fills prompts on the left.
        autocast: Makes the context of mixed precision.
        cache_implementation: As transformers names it.
        gather: Make sharded parameters whole while generating.
        by_length: Call `generate` for the prompts of each length apart, so that nothing is padded:
            some models can't leave padding out.
    """

    overlaps = False  # it is the trainer's own module that writes

    def __init__(
        self,
        policy: Callable[[], PreTrainedModel],
        tokenizer: PreTrainedTokenizerBase,
        *,
        eos: Sequence[int],
        pad: int,
        autocast: Autocast | None = None,
        cache_implementation: str | None = None,
        gather: bool = True,
        by_length: bool = False,
    ) -> None:
        self.policy = policy
        self.tokenizer = tokenizer
        self.eos = tuple(eos)
        self.pad = pad
        self.autocast = autocast
        self.cache_implementation = cache_implementation
        self.gather = gather
        self.by_length = by_length
        apart = ", prompts of each length apart" if by_length else ""
        self.name = f"transformers' generate{apart}"

    def unsupported_reason(self, sampling: Sampling) -> str | None:
        """Return why the model or the options can't be served; None if they can, as far as seen."""
        if self.by_length and self._ranks_keep_step():
            return "ranks that share the parameters must call it equally often"
        return None

    def publish(self, version: int) -> None:
        """Do nothing: the module is the trainer's own."""

    def close(self) -> None:
        """Do nothing."""

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[list[Completion]]:
        """Write completions.

        Every rank must call where the policy is sharded, even with nothing to do.
        """
        config = sampling_config(sampling, self.eos)
        samples = [new_sequences(request) for request in requests]
        rows = [row for group in samples for row in group]
        meeting = self._ranks_keep_step()

        with generating(self.policy(), autocast=self.autocast, gather=self.gather):
            if meeting and not rows:  # the others need our forward passes
                idle = Request(Prompt([self.pad], ""), 1, seed=0)
                self._write(new_sequences(idle), sampling, config, meeting=True)
            for batch in self._batches(rows):
                self._write(batch, sampling, config, meeting=meeting)
        return [[sequence.completion() for sequence in group] for group in samples]

    def serve(self, work: Work, sampling: Sampling) -> None:
        """Serve until there is no more work, in rounds: what is ready is written together.

        Raises:
            ValueError: If ranks share the parameters, and would have to agree on the rounds.
        """
        if self._ranks_keep_step():
            raise ValueError(
                "Ranks that share the parameters in generation (ds3_gather_for_generation=False) "
                "can't serve requests as they come. Leave ds3_gather_for_generation at True."
            )
        serve_in_rounds(self, work, sampling, room=ROUND)

    def _ranks_keep_step(self) -> bool:
        """Return whether every forward pass meets those of other ranks."""
        return not self.gather and sharded(self.policy())

    def _batches(self, rows: Sequence[GrowingSequence]) -> list[list[GrowingSequence]]:
        """Return the rows of each call of `generate`."""
        if not self.by_length:
            return [list(rows)] if rows else []

        alike: dict[int, list[GrowingSequence]] = defaultdict(list)
        for row in rows:
            alike[row.length].append(row)
        return list(alike.values())

    def _write(
        self,
        rows: list[GrowingSequence],
        sampling: Sampling,
        config: GenerationConfig,
        *,
        meeting: bool,
    ) -> None:
        model = without_adapter(self.policy())
        sampler = Sampler(model, config, device=model.device, logps_support=sampling.logps_support)
        ends = stop_criteria(config, self.tokenizer)
        call = GenerateCall(rows, sampler, ends)
        longest = max(ends.budget(row.request) for row in rows)
        ids, mask = left_padded([row.request.context for row in rows], self.pad, model.device)
        model.generate(  # pyright: ignore[reportCallIssue] (a mixin that nn.Module hides)
            input_ids=ids,
            attention_mask=mask,
            generation_config=self._loop_config(config, longest),
            logits_processor=LogitsProcessorList([Take(call)]),
            stopping_criteria=StoppingCriteriaList([AllFinished(call)]),
            synced_gpus=meeting,
        )

    def _loop_config(self, config: GenerationConfig, longest: int) -> GenerationConfig:
        given = {name: getattr(config, name, None) for name in LOOP_OPTIONS}
        options = {name: value for name, value in given.items() if value is not None}
        if self.cache_implementation is not None:
            options.setdefault("cache_implementation", self.cache_implementation)
        return GenerationConfig(
            do_sample=False, max_new_tokens=longest, pad_token_id=self.pad, **options
        )


class GenerateCall:
    """The rows of one `generate` call, between its processor and its stopping criterion."""

    def __init__(
        self, rows: list[GrowingSequence], sampler: Sampler, stop_criteria: StopCriteria
    ) -> None:
        self.rows = rows
        self.sampler = sampler
        self.stop_criteria = stop_criteria

    def step(self, logits: Tensor) -> Tensor:
        """Choose and record the next token of every unfinished row.

        Returns:
            [R] int64, 0 for finished rows.
        """
        live = [number for number, row in enumerate(self.rows) if row.finish_reason is None]
        tokens = torch.zeros(len(self.rows), dtype=torch.int64, device=logits.device)
        if not live:
            return tokens

        index = torch.tensor(live, device=logits.device)
        rows = [self.rows[number] for number in live]
        choice = self.sampler.choose(logits[index], rows)
        tokens[index] = choice.tokens
        choice.record(rows, self.stop_criteria)
        return tokens


class Take(LogitsProcessor):
    """The token that the call chose, as the only possible one."""

    def __init__(self, call: GenerateCall) -> None:
        self.call = call

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride] (tensors of any kind)
        tokens = self.call.step(scores)
        return torch.full_like(scores, -torch.inf).scatter_(-1, tokens[:, None], 0.0)


class AllFinished(StoppingCriteria):
    """The end of the rows that are finished."""

    def __init__(self, call: GenerateCall) -> None:
        self.call = call

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride] (tensors of any kind)
        finished = [row.finish_reason is not None for row in self.call.rows]
        return torch.tensor(finished, device=input_ids.device)


def left_padded(
    rows: Sequence[Sequence[int]], pad: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Return token rows as a rectangle that ends in their last tokens: ids and mask, [R, P] int64.

    Example:
        rows [[5, 6, 7], [8]] and pad 0 -> ids [[5, 6, 7], [0, 0, 8]], mask [[1, 1, 1], [0, 0, 1]]
    """
    width = max(len(row) for row in rows)
    ids = [[pad] * (width - len(row)) + list(row) for row in rows]
    mask = [[0] * (width - len(row)) + [1] * len(row) for row in rows]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)
