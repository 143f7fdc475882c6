"""From settings to `Sampling`: how to sample, and how many tokens; options of generation_kwargs."""

from typing import Any

from gmpo.rollout.engine import Sampling
from gmpo.rollout.settings import RolloutSettings

# Options of GenerationConfig that shape or end one sampled continuation.
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
)
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


def sampling_from(settings: RolloutSettings, *, greedy: bool = False) -> Sampling:
    """Return how the settings say to sample; `greedy` takes the most probable token instead."""
    return Sampling(
        max_new_tokens=settings.max_completion_length,
        temperature=0.0 if greedy else settings.temperature,
        top_p=settings.top_p,
        top_k=settings.top_k,
        min_p=settings.min_p,
        repetition_penalty=settings.repetition_penalty,
        extra=dict(further_options(settings)),
        logps_support=settings.logps_support,  # pyright: ignore[reportArgumentType] (has choices)
    )


def completion_budget(settings: RolloutSettings) -> int:
    """Return the most tokens that a completion may have."""
    extra = further_options(settings)
    for name in ("max_new_tokens", "max_tokens"):  # transformers' name, and vLLM's
        if extra.get(name) is not None:
            return int(extra[name])
    return settings.max_completion_length


def further_options(settings: RolloutSettings) -> dict[str, Any]:
    """Return generation_kwargs, which JSON strings have been read from."""
    extra: Any = settings.generation_kwargs
    return extra or {}
