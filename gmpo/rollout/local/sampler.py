"""From next-token logits to sampled tokens, the same way for every engine of this process.

The distribution is shaped by transformers' own logits processors, in transformers' order.  The token is then drawn by
inverting the cumulative distribution at the draft's own random number, so that it depends on nothing else in the batch.
"""

import copy
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import GenerationConfig
from transformers.generation import logits_process

from gmpo.rollout.engine import Sampling
from gmpo.rollout.local.sequence import GrowingSequence, StopCriteria
from gmpo.token_sets import TokenList

# What generation_kwargs may hold: options of GenerationConfig that shape or end one sampled continuation.
SAMPLING_OPTIONS = (
    "max_new_tokens",
    "min_new_tokens",
    "min_length",
    "do_sample",
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "top_h",
    "typical_p",
    "epsilon_cutoff",
    "eta_cutoff",
    "repetition_penalty",
    "no_repeat_ngram_size",
    "bad_words_ids",
    "sequence_bias",
    "suppress_tokens",
    "begin_suppress_tokens",
    "forced_bos_token_id",
    "forced_eos_token_id",
    "exponential_decay_length_penalty",
    "remove_invalid_values",
    "renormalize_logits",
    "stop_strings",
    "eos_token_id",
    "pad_token_id",
    "bos_token_id",
)
IMPOSSIBLE = -1e30  # scores below are masked: -inf, or what `remove_invalid_values` makes of it
# Options that say how the loop of `generate` runs; they need that loop.
LOOP_OPTIONS = (
    "cache_implementation",
    "cache_config",
    "max_cache_len",
    "use_cache",
    "max_time",
    "compile_config",
    "disable_compile",
    "prefill_chunk_size",
    "low_memory",
)
# Processors that look at the scores alone, so that rows of any length go through them together.
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


def sampling_config(sampling: Sampling, eos: Sequence[int]) -> GenerationConfig:
    """The sampling options as transformers names them; `sampling.extra` wins.

    Args:
        eos: Tokens that end a completion; `extra["eos_token_id"]` adds to them.

    Raises:
        ValueError: `extra` names something else than an option of sampling or of the loop of `generate`.
    """
    refused = sorted(set(sampling.extra) - {*SAMPLING_OPTIONS, *LOOP_OPTIONS})
    if refused:
        raise ValueError(
            f"generation_kwargs has {', '.join(refused)}, which can't act: completions are independent samples of the "
            f"policy. Remove it, or correct its name: {', '.join((*SAMPLING_OPTIONS, *LOOP_OPTIONS))}."
        )
    options: dict[str, Any] = {
        "max_new_tokens": sampling.max_new_tokens,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "min_p": sampling.min_p,
        "repetition_penalty": sampling.repetition_penalty,
        "do_sample": True,
        **sampling.extra,
    }
    more = options.pop("eos_token_id", None)
    more = more if isinstance(more, list | tuple) else [] if more is None else [more]
    options["eos_token_id"] = list(dict.fromkeys([*eos, *more]))
    if not options["temperature"]:
        options.update(do_sample=False, temperature=1.0)
    config = GenerationConfig()
    for (
        name,
        value,
    ) in (
        options.items()
    ):  # not by its `update`, which warns of options that greedy decoding leaves out
        setattr(config, name, value)
    return config


@dataclass(slots=True)
class Choice:
    """The next token of each row."""

    tokens: Tensor  # [R] int64
    logps: Tensor  # [R] float32
    supports: Sequence[TokenList | None]  # R, what each was drawn from; None: all, or not asked for

    def record(self, rows: Sequence[GrowingSequence], stop_criteria: StopCriteria) -> None:
        """Append the tokens to the drafts."""
        chosen = zip(rows, self.tokens.tolist(), self.logps.tolist(), self.supports, strict=True)
        for row, token, logp, support in chosen:
            stop_criteria.add(row, token, logp, support)


class Sampler:
    """Chooses next tokens.

    Args:
        model: For transformers' `_get_logits_processor`.
        config: From `sampling_config`.
        device: Of the logits.
        logps_support: "sampled": log-probs are of the distribution that is drawn from, after all processors, and come
            with its support; "full": of the temperature-scaled distribution over the whole vocabulary.
    """

    def __init__(
        self,
        model: Any,
        config: GenerationConfig,
        *,
        device: torch.device,
        logps_support: Literal["sampled", "full"] = "sampled",
    ) -> None:
        self.model = model
        self.logps_support = logps_support
        self.device = device
        self.config = copy.deepcopy(config)
        self.config._eos_token_tensor = torch.tensor(config.eos_token_id, device=device)  # type: ignore[attr-defined]
        self.temperature = float(config.temperature or 1.0)
        self.greedy = not config.do_sample
        self._processors: dict[
            int, Any
        ] = {}  # LogitsProcessorLists, whose types know no plain tensors
        shared = self._for_prompt(1)
        self.plain = all(isinstance(p, logits_process.TemperatureLogitsWarper) for p in shared)
        self.blind: Any = shared if all(isinstance(p, BLIND_PROCESSORS) for p in shared) else None

    @torch.no_grad()
    def choose(self, logits: Tensor, rows: Sequence[GrowingSequence]) -> Choice:
        """The next token of each row.

        Args:
            logits: [R, V].
            rows: R drafts; each gives one random number, unless the sampling is greedy.
        """
        scaled = logits.float()
        if self.temperature != 1.0:
            scaled = scaled / self.temperature
        if self.plain:
            probabilities = scaled.softmax(-1)
            tokens = self._pick(probabilities, rows)
            return Choice(
                tokens, probabilities.gather(-1, tokens[:, None])[:, 0].log(), [None] * len(rows)
            )
        processed = self._processed(logits.float(), rows)
        tokens = self._pick(processed.softmax(-1), rows)
        exact = self.logps_support == "sampled"
        supports = token_lists(processed > IMPOSSIBLE) if exact else [None] * len(rows)
        scores = processed if exact else scaled
        return Choice(
            tokens, scores.gather(-1, tokens[:, None])[:, 0] - scores.logsumexp(-1), supports
        )

    def _pick(self, probabilities: Tensor, rows: Sequence[GrowingSequence]) -> Tensor:
        if self.greedy:
            return probabilities.argmax(-1)
        numbers = torch.tensor([next(row.uniforms) for row in rows], dtype=torch.float64)
        return invert(probabilities, numbers.to(probabilities.device))

    def _processed(self, scores: Tensor, rows: Sequence[GrowingSequence]) -> Tensor:
        """Scores after all processors, [R, V].  Those that read tokens get rows of one length at a time, unpadded."""
        if self.blind is not None:
            return self.blind(
                torch.empty(len(rows), 0, dtype=torch.int64, device=scores.device), scores.clone()
            )
        alike: dict[tuple[int, int], list[int]] = defaultdict(list)
        for number, row in enumerate(rows):
            alike[len(row.request.prompt.ids), len(row.ids)].append(number)
        result = torch.empty_like(scores)
        for (prompt_length, _), numbers in alike.items():
            ids = torch.tensor(
                [rows[n].request.prompt.ids + rows[n].ids for n in numbers], device=scores.device
            )
            index = torch.tensor(numbers, device=scores.device)
            result[index] = self._for_prompt(prompt_length)(ids, scores[index])
        return result

    def _for_prompt(self, prompt_length: int) -> Any:
        if prompt_length not in self._processors:
            self.config.max_length = prompt_length + (self.config.max_new_tokens or 0)
            self._processors[prompt_length] = self.model._get_logits_processor(
                self.config, input_ids_seq_length=prompt_length, device=self.device
            )
        return self._processors[prompt_length]


def token_lists(kept: Tensor) -> list[TokenList | None]:
    """The tokens that are kept in each row of [R, V]; None where all are."""
    inverse = kept.sum(-1) * 2 > kept.shape[-1]
    listed = kept ^ inverse[:, None]
    ids = listed.nonzero()[:, 1].to(torch.int32).cpu()
    lists = zip(ids.split(listed.sum(-1).tolist()), inverse.tolist(), strict=True)
    return [None if others and not len(tokens) else (tokens, others) for tokens, others in lists]


def invert(probabilities: Tensor, numbers: Tensor) -> Tensor:
    """The first token whose cumulative probability exceeds `numbers` times the whole, [R].

    Two levels, blocks of the vocabulary and tokens of one block, so that only the short sums need float64: a float32
    cumulative sum over a whole vocabulary would lose the tokens of its tail.

    Args:
        probabilities: [R, V]; need not add up to 1.
        numbers: [R] float64 in [0, 1).
    """
    rows, size = probabilities.shape
    width = next((w for w in (256, 128, 64) if size % w == 0), 0)
    if not width:
        width = 64
        probabilities = torch.nn.functional.pad(probabilities, (0, -size % width))
    blocks = probabilities.view(rows, -1, width)
    cumulative = blocks.sum(-1).double().cumsum(-1)  # [R, V / width]
    target = below(numbers * cumulative[:, -1], cumulative[:, -1])
    block = (cumulative <= target[:, None]).sum(-1)  # [R]
    before = torch.where(
        block > 0, cumulative.gather(-1, (block - 1).clamp_min(0)[:, None])[:, 0], 0.0
    )
    inner = blocks[torch.arange(rows, device=block.device), block].double().cumsum(-1)  # [R, width]
    rest = below(target - before, inner[:, -1])
    return block * width + (inner <= rest[:, None]).sum(-1)


def below(value: Tensor, bound: Tensor) -> Tensor:
    """`value`, or the greatest number under `bound` where rounding has pushed it there or beyond."""
    return torch.minimum(value, torch.nextafter(bound, torch.zeros_like(bound)))


def stop_criteria(config: GenerationConfig, tokenizer: Any) -> StopCriteria:
    """What ends a completion, by the options of `sampling_config`."""
    stops = config.stop_strings or ()
    return StopCriteria(
        config.eos_token_id,  # type: ignore[arg-type]
        config.max_new_tokens,  # type: ignore[arg-type]
        [stops] if isinstance(stops, str) else stops,
        lambda ids: tokenizer.decode(ids, skip_special_tokens=False),
    )
