"""From next-token logits to sampled tokens, the same way for every engine of this process.

The distribution is the one that transformers' logits processors make, in transformers' order.  The
token is then drawn by inverting the cumulative distribution at the row's own random number, so that
it depends on nothing else in the batch.
"""

import copy
import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel
from transformers.generation import logits_process

from gmpo.rollout.local.cuts import Columns, Cuts, cut, cuts_of
from gmpo.rollout.local.draw import invert
from gmpo.rollout.local.repetition import SeenTokens, penalised
from gmpo.rollout.local.sequence import GrowingSequence, StopCriteria
from gmpo.rollout.prompts.dataset import shown
from gmpo.token_sets import TokenList

IMPOSSIBLE = -1e30  # scores below are masked: -inf, or what `remove_invalid_values` makes of it
# Processors that look at the scores only, so that rows of any length go through them together.
BLIND_PROCESSORS = (
    logits_process.TemperatureLogitsWarper,
    logits_process.TopKLogitsWarper,
    logits_process.TopPLogitsWarper,
    logits_process.MinPLogitsWarper,
    logits_process.TypicalLogitsWarper,
    logits_process.EpsilonLogitsWarper,
    logits_process.EtaLogitsWarper,
    logits_process.TopHLogitsWarper,
    logits_process.LogitNormalization,
    logits_process.InfNanRemoveLogitsProcessor,
    logits_process.SuppressTokensLogitsProcessor,
)


@dataclass(slots=True)
class Choice:
    """The next token of each row."""

    tokens: Tensor  # [R] int64
    logps: Tensor  # [R] float32; NaN where no token could be drawn
    supports: Sequence[TokenList | None]  # R, what each was drawn from; None is all, or not asked

    def record(self, rows: Sequence[GrowingSequence], stop_criteria: StopCriteria) -> None:
        """Append the tokens to the rows.

        Raises:
            FloatingPointError: If a row has no distribution to draw from.
        """
        logps = self.logps.tolist()
        broken = [row for row, logp in zip(rows, logps, strict=True) if math.isnan(logp)]
        if broken:
            raise FloatingPointError(no_distribution(broken, len(rows)))

        chosen = zip(rows, self.tokens.tolist(), logps, self.supports, strict=True)
        for row, token, logp, support in chosen:
            stop_criteria.add(row, token, logp, support)


class Sampler:
    """Chooses next tokens.

    Args:
        model: For transformers' `_get_logits_processor`.
        config: From `sampling_config`.
        device: Of the logits.
        logps_support: "sampled": log-probs are of the distribution that is drawn from, after all
            processors, and come with its support; "full": of the temperature-scaled distribution
            over the whole vocabulary.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        config: GenerationConfig,
        *,
        device: torch.device,
        logps_support: Literal["sampled", "full"] = "sampled",
    ) -> None:
        self.model = model
        self.logps_support = logps_support
        self.device = device
        self.config = copy.deepcopy(config)
        ends = torch.tensor(config.eos_token_id, device=device)
        self.config._eos_token_tensor = ends  # pyright: ignore[reportAttributeAccessIssue] (theirs)
        self.temperature = float(config.temperature or 1.0)
        self.greedy = not config.do_sample
        self.seen = SeenTokens()
        self._processors: dict[int, list[Any]] = {}  # by length of the prompt

        processors = self._for_prompt(1)
        self.head = len(processors) - len(trailing_cuts(processors))  # processors before the cuts
        self.cuts: Cuts | None = cuts_of(processors[self.head :]) if not self.greedy else None
        if self.cuts == Cuts():
            self.cuts = None

        kinds = [type(processor) for processor in processors[: self.head]]
        scaling = logits_process.TemperatureLogitsWarper
        penalty = logits_process.RepetitionPenaltyLogitsProcessor
        self.only_scales = all(kind is scaling for kind in kinds)
        self.only_penalises = penalty in kinds and set(kinds) <= {penalty, scaling}
        self.blind = all(kind in BLIND_PROCESSORS for kind in kinds)

    @torch.no_grad()
    def choose(self, logits: Tensor, rows: Sequence[GrowingSequence]) -> Choice:
        """Return the next token of each row.

        Args:
            logits: [R, V].
            rows: R rows; each gives one random number, unless the sampling is greedy.
        """
        scaled = logits.float()
        if self.temperature != 1.0:
            scaled = scaled / self.temperature

        if self.only_scales and self.cuts is None:
            probabilities = scaled.softmax(-1)
            tokens = self._pick(probabilities, rows)
            logps = probabilities.gather(-1, tokens[:, None])[:, 0].log()
            return Choice(tokens, logps, [None] * len(rows))

        processed = scaled if self.only_scales else self._processed(logits.float(), rows)
        if self.cuts is not None:
            return self._choose_among(cut(processed, self.cuts), scaled, rows)

        tokens = self._pick(processed.softmax(-1), rows)
        exact = self.logps_support == "sampled"
        masked = exact and not self.only_penalises
        supports = token_lists(processed > IMPOSSIBLE) if masked else [None] * len(rows)
        score = processed.gather(-1, tokens[:, None])[:, 0]
        logps = score - processed.logsumexp(-1) if exact else full_logps(scaled, tokens)
        return Choice(tokens, logps.masked_fill(~(score > IMPOSSIBLE), torch.nan), supports)

    def _choose_among(
        self, columns: Columns, scaled: Tensor, rows: Sequence[GrowingSequence]
    ) -> Choice:
        """Return the next token of each row out of what the cuts have left."""
        place = self._pick(columns.scores.softmax(-1), rows)[:, None]
        tokens = columns.ids.gather(-1, place)[:, 0]
        score = columns.scores.gather(-1, place)[:, 0]

        if self.logps_support == "sampled":
            logps = score - columns.scores.logsumexp(-1)
            supports = columns.token_lists(scaled.shape[-1])
        else:
            logps, supports = full_logps(scaled, tokens), [None] * len(rows)
        return Choice(tokens, logps.masked_fill(~(score > IMPOSSIBLE), torch.nan), supports)

    def _pick(self, probabilities: Tensor, rows: Sequence[GrowingSequence]) -> Tensor:
        if self.greedy:
            return probabilities.argmax(-1)
        numbers = torch.tensor([next(row.uniforms) for row in rows], dtype=torch.float64)
        return invert(probabilities, numbers)

    def _processed(self, scores: Tensor, rows: Sequence[GrowingSequence]) -> Tensor:
        """Return the scores after all processors but the cuts, [R, V].

        Processors that read tokens get rows of one length at a time, unpadded.
        """
        if self.only_penalises:
            penalty = self.config.repetition_penalty
            assert penalty is not None
            scores = penalised(scores, self.seen.of(rows, scores), penalty)
            return scores if self.temperature == 1.0 else scores / self.temperature
        if self.blind:
            nothing = torch.empty(len(rows), 0, dtype=torch.int64, device=scores.device)
            return self._through(self._for_prompt(1), nothing, scores.clone())

        alike: dict[tuple[int, int], list[int]] = defaultdict(list)
        for number, row in enumerate(rows):
            alike[len(row.request.context), len(row.ids)].append(number)

        result = torch.empty_like(scores)
        for (prompt_length, _), numbers in alike.items():
            ids = torch.tensor([rows[n].tokens_from(0) for n in numbers], device=scores.device)
            index = torch.tensor(numbers, device=scores.device)
            processors = self._for_prompt(prompt_length)
            result[index] = self._through(processors, ids, scores[index])
        return result

    def _through(self, processors: Sequence[Any], ids: Tensor, scores: Tensor) -> Tensor:
        for processor in processors[: self.head]:
            scores = processor(ids, scores)
        return scores

    def _for_prompt(self, prompt_length: int) -> list[Any]:
        """Return transformers' processors for a prompt of this length, in their order."""
        if prompt_length not in self._processors:
            self.config.max_length = prompt_length + (self.config.max_new_tokens or 0)
            make: Any = self.model._get_logits_processor
            self._processors[prompt_length] = list(
                make(self.config, input_ids_seq_length=prompt_length, device=str(self.device))
            )
        return self._processors[prompt_length]


def trailing_cuts(processors: Sequence[object]) -> list[object]:
    """Return the processors at the end that only cut, which columns can do as well."""
    cutting: list[object] = []
    for processor in reversed(processors):
        if cuts_of([processor]) is None:
            break
        cutting.insert(0, processor)
    return cutting


def full_logps(scaled: Tensor, tokens: Tensor) -> Tensor:
    """Return the log-probs [R] of tokens under the distribution of all scores, [R, V]."""
    return scaled.gather(-1, tokens[:, None])[:, 0] - scaled.logsumexp(-1)


def token_lists(kept: Tensor) -> list[TokenList | None]:
    """Return the tokens that are kept in each row of [R, V]; None for a row that keeps all."""
    inverse = kept.sum(-1) * 2 > kept.shape[-1]
    listed = kept ^ inverse[:, None]
    ids = listed.nonzero()[:, 1].to(torch.int32).cpu()
    lists = zip(ids.split(listed.sum(-1).tolist()), inverse.tolist(), strict=True)
    return [None if others and not len(tokens) else (tokens, others) for tokens, others in lists]


def no_distribution(broken: Sequence[GrowingSequence], count: int) -> str:
    """Return the message for rows whose logits leave no token to draw."""
    prompts = list(dict.fromkeys(shown(row.request.prompt.source) for row in broken))
    named = "; ".join(prompts[:3]) + ("; ..." if len(prompts) > 3 else "")
    return (
        f"No token can be drawn for {len(broken)} of {count} completions, at token "
        f"{len(broken[0].ids) + 1} of the first: the policy's logits are NaN, or generation_kwargs "
        "masks every token. If the training has diverged, go back to an earlier checkpoint and "
        f"lower learning_rate or max_grad_norm. The prompts are {named}"
    )
