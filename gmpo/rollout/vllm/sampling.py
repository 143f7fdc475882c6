"""Sampling options under vLLM's names, for an engine in this process and behind a server alike.

Log-probs.  vLLM reports either "raw" ones, from before the temperature and everything else, or
"processed" ones, from after penalties, top_k, top_p and min_p, renormalised over the kept tokens.
gmpo has the model's own logit scale do what the temperature would do, and samples at temperature 1.
With logps_support="full", raw log-probs then are exactly those that the trainer computes, whatever
else shapes the sampling.  With "sampled", processed ones are, if vLLM also reports which tokens it
kept, for which it needs a top_k, and a GPU.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from gmpo.data.micro_batches import mixed_seed
from gmpo.rollout.engine import Completion, Request, Sampling
from gmpo.token_sets import TokenSets

NAMES = {  # transformers' name -> vLLM's
    "max_new_tokens": "max_tokens",
    "min_new_tokens": "min_tokens",
    "stop_strings": "stop",
    "eos_token_id": "stop_token_ids",
}
KNOWN = {
    *("temperature", "top_p", "top_k", "min_p"),
    *("repetition_penalty", "presence_penalty", "frequency_penalty", "logit_bias"),
    *("max_tokens", "min_tokens", "stop", "stop_token_ids", "ignore_eos", "repetition_detection"),
    *("allowed_token_ids", "bad_words", "structured_outputs", "thinking_token_budget"),
    "extra_args",
}
# Options that change the distribution, by the values at which they don't.
PLAIN = {"top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}
GRAMMAR = "structured_outputs"
CUTS = ("top_p", "top_k", "min_p")  # those that leave some tokens only
GREEDY = {"temperature": 1.0, **PLAIN, "top_k": 1}  # the most probable token, as a cut
# Options that vLLM adds to logits, before the temperature divides them.
ADDED_TO_LOGITS = ("presence_penalty", "frequency_penalty", "logit_bias")
CLAMPED = -9999.0  # a server's word for log-probs that are not finite
SEEDS = 2**62  # vLLM adds a sample's number to the seed of its request


@dataclass(frozen=True, slots=True)
class VllmSampling:
    """The sampling options that all requests of a collection share."""

    options: dict[str, Any]  # keywords of vLLM's SamplingParams
    temperature: float  # 0: greedy
    restricted: bool  # a grammar masks the logits, and no log-prob is of use
    support: Literal["sampled", "full"]  # the distribution that the trainer scores

    @property
    def truncated(self) -> bool:
        """Return whether "processed" log-probs are of another distribution than is wanted."""
        shaped = any(self.options.get(name, value) != value for name, value in PLAIN.items())
        masked = any(
            name in self.options for name in (*ADDED_TO_LOGITS, "allowed_token_ids", "bad_words")
        )
        return shaped or masked

    @property
    def cut(self) -> bool:
        """Return whether some tokens can't be drawn, so that their sets must be known."""
        return any(self.options.get(name, PLAIN[name]) != PLAIN[name] for name in CUTS)

    @property
    def reports(self) -> dict[str, Any]:
        """Return the engine options for log-probs of the distribution that the trainer scores."""
        shaped = self.support == "sampled" and self.truncated and not self.restricted
        return {
            "logprobs_mode": "processed_logprobs" if shaped else "raw_logprobs",
            "return_sampling_mask": shaped and self.cut,
        }

    def is_reported(self, logprobs_mode: str, *, token_sets: bool) -> bool:
        """Return whether an engine's log-probs are of the distribution that the trainer scores.

        Args:
            logprobs_mode: The engine's.
            token_sets: The engine reports which tokens it drew from.

        Raises:
            ValueError: They are not, and the trainer can't score the distribution without them.
        """
        if self.restricted:
            return False
        raw = logprobs_mode == "raw_logprobs"
        if not self.truncated or self.support == "full" or self.temperature == 0:
            return raw or not self.truncated

        if raw or (self.cut and not token_sets):
            option = "--return-sampling-mask" if self.cut else "--logprobs-mode processed_logprobs"
            raise ValueError(
                "This vLLM does not report the distribution that it draws from, which "
                "logps_support='sampled' needs with options that shape it. Start the server with "
                f"`gmpo serve MODEL {option}`, or set logps_support='full'."
            )
        return True

    @property
    def logits_scale(self) -> float:
        """Return the factor for logits that does what the temperature would do."""
        return 1.0 / self.temperature if self.temperature > 0 else 1.0

    def on_scaled_logits(self) -> dict[str, Any]:
        """Return the options for an engine whose logits are scaled by `logits_scale` already.

        Example:
            A penalty a at temperature T draws from (l - a) / T = l / T - a / T: on logits that are
            scaled by 1 / T it is a / T, at temperature 1.
        """
        options = dict(self.options)
        for name in ADDED_TO_LOGITS:
            if name in options:
                options[name] = scaled(options[name], self.logits_scale)
        return {**options, "temperature": 1.0 if self.temperature > 0 else 0.0}

    def for_engine(self, *, scaled_logits: bool, token_sets: bool) -> dict[str, Any]:
        """Return the options for an engine.

        Args:
            scaled_logits: Its logits are scaled by `logits_scale` already.
            token_sets: It reports which tokens it drew from, and then refuses temperature 0.
        """
        options = self.on_scaled_logits() if scaled_logits else dict(self.options)
        if token_sets and self.temperature == 0:
            options |= GREEDY
        return options


def vllm_sampling(
    sampling: Sampling, *, eos: Sequence[int], regex: str | None = None
) -> VllmSampling:
    """Return the sampling options for vLLM; `sampling.extra` wins, under either library's names.

    Args:
        sampling: gmpo's options.
        eos: Tokens that end a completion.  `extra["eos_token_id"]` or `extra["stop_token_ids"]`
            adds to them, and `extra["ignore_eos"]` takes them away.
        regex: Completions must match it.

    Raises:
        ValueError: `extra` has an option that vLLM does not know, or that gmpo sets itself.
    """
    extra = {NAMES.get(name, name): value for name, value in sampling.extra.items()}
    greedy = extra.pop("do_sample", True) is False
    check_extra(extra, regex)
    options: dict[str, Any] = {
        "max_tokens": sampling.max_new_tokens,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "min_p": sampling.min_p or 0.0,
        "repetition_penalty": sampling.repetition_penalty,
        **extra,
    }

    # vLLM's ignore_eos knows nothing of stop tokens, which is how gmpo gives it the ends.
    ends = [] if extra.get("ignore_eos") else eos
    options["stop_token_ids"] = list(dict.fromkeys([*ends, *as_list(extra.get("stop_token_ids"))]))
    if "stop" in options:
        options["stop"] = as_list(options["stop"])
    if regex is not None:
        options[GRAMMAR] = {"regex": regex}

    temperature = 0.0 if greedy else float(options["temperature"])
    options["temperature"] = temperature
    return VllmSampling(
        options,
        temperature,
        restricted=GRAMMAR in options,
        support=sampling.logps_support,
    )


def check_extra(extra: dict[str, Any], regex: str | None) -> None:
    """Raise a ValueError for options, under vLLM's names, that can't be set."""
    unknown = sorted(extra.keys() - KNOWN)
    if unknown:
        raise ValueError(
            f"generation_kwargs has {unknown}, which can't be set with use_vllm=True. Remove it. "
            f"There are: {', '.join(sorted({*KNOWN, *NAMES}))}."
        )
    if regex is not None and "structured_outputs" in extra:
        raise ValueError(
            "vllm_structured_outputs_regex and generation_kwargs['structured_outputs'] say the "
            "same thing twice. Keep one of them."
        )


def as_list(value: object) -> list[Any]:
    """Return a list of what an option says: None is nothing, anything else but a list is one."""
    if value is None:
        return []
    return list(value) if isinstance(value, list | tuple) else [value]


def scaled(value: float | dict[str, float], scale: float) -> float | dict[str, float]:
    """Return a number, or the numbers of a table, times `scale`."""
    if isinstance(value, dict):
        return {key: bias * scale for key, bias in value.items()}
    return value * scale


def engine_seed(request: Request) -> int:
    """Return the seed of a request; vLLM draws sample i of it with the seed plus i.

    Example:
        A group of 4 with the seed 77, spread over two ranks: the second asks for 2 samples from
        `first` = 2, so for the seed 79, and vLLM draws them with 79 and 80, as it draws samples 2
        and 3 of the whole group.
    """
    seed = request.seed % SEEDS + request.first
    if request.so_far:  # else each turn of a sample would have the random numbers of its first
        seed = mixed_seed(seed, len(request.so_far)) % SEEDS
    return seed


def request_options(request: Request, shared: dict[str, Any]) -> dict[str, Any]:
    """Return vLLM's options for one request.

    Args:
        request: With its count, seed, budget and stop texts.
        shared: Those of all requests.
    """
    options = {**shared, "n": request.count, "seed": engine_seed(request), "logprobs": 0}
    if request.max_new_tokens is not None:
        options["max_tokens"] = request.max_new_tokens
    if request.stop:
        options["stop"] = [*shared.get("stop", ()), *request.stop]
    return options


def check_room(
    requests: Sequence[Request], options: dict[str, Any], longest: int, *, remedy: str
) -> None:
    """Raise a ValueError for the first request that does not fit with its longest completion.

    Args:
        requests: All that will be asked for.
        options: vLLM's, with "max_tokens".
        longest: Tokens of the longest sequence that the engine takes.
        remedy: What the user can do about `longest`.
    """
    for request in requests:
        budget = request_options(request, options)["max_tokens"]
        given = len(request.context)
        needed = given + budget
        if needed > longest:
            raise ValueError(
                f"A prompt of {given} tokens and a completion of up to "
                f"{budget} make {needed}, and vLLM takes {longest}. {remedy}, lower "
                "max_completion_length, or drop the prompt, which begins "
                f"{str(request.prompt.source)[:80]!r}."
            )


def completion(
    ids: Sequence[int],
    finish_reason: str | None,
    logps: Sequence[float],
    *,
    report: bool = True,
    kept: Sequence[Sequence[int]] | None = None,
) -> Completion:
    """Return one sample, checked.

    Args:
        ids: Its tokens.
        finish_reason: vLLM's.
        logps: One per token; always asked for, since they tell whether the weights are sound.
        report: The log-probs are of the distribution that the trainer scores: pass them on.
        kept: The tokens that each was drawn from; None stands for all.

    Raises:
        ValueError: vLLM gave up on it, or its log-probs don't fit its tokens, or are none.
    """
    if finish_reason not in ("stop", "length"):
        raise ValueError(f"a completion ended by {finish_reason!r}, not by 'stop' or 'length'")
    if len(logps) != len(ids):
        raise ValueError(f"{len(logps)} log-probs came for {len(ids)} tokens")

    for place, (token, logp) in enumerate(zip(ids, logps, strict=True)):
        if not math.isfinite(logp) or logp <= CLAMPED:
            raise ValueError(
                f"token {place} (id {token}) of a completion has the log-prob {logp}. The logits "
                "are not finite: the weights have diverged, or overflow in the engine's precision. "
                "Lower the learning rate, or let the engine compute in float32 or bfloat16"
            )
    return Completion(
        ids=list(ids),
        finish_reason=finish_reason,
        logps=list(logps) if report else None,
        support=None if kept is None else as_token_sets(ids, kept),
    )


def as_token_sets(ids: Sequence[int], kept: Sequence[Sequence[int]]) -> TokenSets | None:
    """Return the tokens that each of `ids` was drawn from.

    Raises:
        ValueError: They don't fit.
    """
    if len(kept) != len(ids):
        raise ValueError(f"{len(kept)} sets of tokens came for {len(ids)} tokens")
    for place, (token, tokens) in enumerate(zip(ids, kept, strict=True)):
        if token not in tokens:
            raise ValueError(f"token {place} (id {token}) is not among those it was drawn from")
    return TokenSets.of([(torch.tensor(tokens, dtype=torch.int32), False) for tokens in kept])
