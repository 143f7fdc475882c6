"""The engine that works for every model: transformers' `generate`."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
)

from gmpo.rollout.engine import Completion, Request, Sampling
from gmpo.rollout.generation_mode import Autocast, generating
from gmpo.rollout.local.sampler import LOOP_OPTIONS, Sampler, sampling_config, stop_criteria
from gmpo.rollout.local.sequence import GrowingSequence, StopCriteria, new_sequences
from gmpo.sharding import sharded
from gmpo.types import Prompt
from gmpo.unwrap import without_adapter


class GenerateEngine:
    """Makes completions with `model.generate`, all requests in one call.

    `generate` runs the model and its cache, and nothing else: our sampler sees the untouched logits, chooses every
    token, and tells `generate` to take it.  So both engines sample alike and report the same log-probs, and never more
    than one step's logits are held.

    Args:
        policy: Gives the trainer's model as it is now, without wrappers but PEFT's.
        tokenizer: For stop strings.
        eos: Tokens that end a completion.
        pad: Token that fills prompts on the left.
        autocast: Makes the context of mixed precision.
        cache_implementation: As transformers names it.
        gather: Make sharded parameters whole while generating.
    """

    def __init__(
        self,
        policy: Callable[[], Any],
        tokenizer: Any,
        *,
        eos: Sequence[int],
        pad: int,
        autocast: Autocast | None = None,
        cache_implementation: str | None = None,
        gather: bool = True,
    ) -> None:
        self.policy = policy
        self.tokenizer = tokenizer
        self.eos = tuple(eos)
        self.pad = pad
        self.autocast = autocast
        self.cache_implementation = cache_implementation
        self.gather = gather

    def publish(self, version: int) -> None:
        """Nothing to do: the module is the trainer's own."""

    def close(self) -> None:
        """Nothing to do."""

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[list[Completion]]:
        """Every rank must call where the policy is sharded, be it with nothing to do."""
        config = sampling_config(sampling, self.eos)
        policy = self.policy()
        meeting = not self.gather and sharded(policy)
        with generating(policy, autocast=self.autocast, gather=self.gather):
            if meeting and not requests:  # the others need our forward passes
                self._generate(
                    [Request(Prompt([self.pad], ""), 1, seed=0)], sampling, config, meeting=True
                )
            return self._generate(requests, sampling, config, meeting=meeting) if requests else []

    def _generate(
        self,
        requests: Sequence[Request],
        sampling: Sampling,
        config: GenerationConfig,
        *,
        meeting: bool,
    ) -> list[list[Completion]]:
        model = without_adapter(self.policy())
        device = model.device
        samples = [new_sequences(request) for request in requests]
        rows = [sequence for group in samples for sequence in group]
        sampler = Sampler(model, config, device=device, logps_support=sampling.logps_support)
        turn = GenerateCall(rows, sampler, stop_criteria(config, self.tokenizer))
        ids, mask = left_padded([row.request.prompt.ids for row in rows], self.pad, device)
        model.generate(
            input_ids=ids,
            attention_mask=mask,
            generation_config=self._loop_config(config),
            logits_processor=LogitsProcessorList([Take(turn)]),
            stopping_criteria=StoppingCriteriaList([AllFinished(turn)]),
            synced_gpus=meeting,
        )
        return [[sequence.completion() for sequence in group] for group in samples]

    def _loop_config(self, config: GenerationConfig) -> GenerationConfig:
        options = {
            name: value
            for name in LOOP_OPTIONS
            if (value := getattr(config, name, None)) is not None
        }
        if self.cache_implementation is not None:
            options.setdefault("cache_implementation", self.cache_implementation)
        return GenerationConfig(
            do_sample=False, max_new_tokens=config.max_new_tokens, pad_token_id=self.pad, **options
        )


class GenerateCall:
    """The rows of one `generate` call, between the processor that chooses and the criterion that ends."""

    def __init__(
        self, rows: list[GrowingSequence], sampler: Sampler, stop_criteria: StopCriteria
    ) -> None:
        self.rows = rows
        self.sampler = sampler
        self.stop_criteria = stop_criteria

    def step(self, logits: Tensor) -> Tensor:
        """Choose and record the next token of every unfinished row; [R], 0 for finished ones."""
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
    """Makes the token that the turn chose the only possible one."""

    def __init__(self, turn: GenerateCall) -> None:
        self.turn = turn

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        tokens = self.turn.step(scores)
        return torch.full_like(scores, -torch.inf).scatter_(-1, tokens[:, None], 0.0)


class AllFinished(StoppingCriteria):
    def __init__(self, turn: GenerateCall) -> None:
        self.turn = turn

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        finished = [row.finish_reason is not None for row in self.turn.rows]
        return torch.tensor(finished, device=input_ids.device)


def left_padded(
    rows: Sequence[Sequence[int]], pad: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Token rows as a rectangle that ends in their last tokens: ids and mask, both [R, P] int64."""
    width = max(len(row) for row in rows)
    ids = [[pad] * (width - len(row)) + list(row) for row in rows]
    mask = [[0] * (width - len(row)) + [1] * len(row) for row in rows]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)
