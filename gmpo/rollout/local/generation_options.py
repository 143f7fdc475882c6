"""`Sampling` in the terms of transformers' GenerationConfig, and what ends a completion."""

from collections.abc import Sequence
from typing import Any

from transformers import GenerationConfig, PreTrainedTokenizerBase

from gmpo.rollout.engine import Sampling
from gmpo.rollout.local.sequence import StopCriteria


def sampling_config(sampling: Sampling, eos: Sequence[int]) -> GenerationConfig:
    """Return the sampling options as transformers names them; `sampling.extra` wins.

    Args:
        eos: Tokens that end a completion; `extra["eos_token_id"]` adds to them.
    """
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
    options["eos_token_id"] = ending_tokens(eos, options.get("eos_token_id"))
    if not options["temperature"]:
        options.update(do_sample=False, temperature=1.0)

    # Not by the config's own `update`, which warns of options that greedy decoding leaves out.
    config = GenerationConfig()
    for name, value in options.items():
        setattr(config, name, value)
    return config


def ending_tokens(eos: Sequence[int], more: int | Sequence[int] | None) -> list[int]:
    """Return the tokens that end a completion, those of generation_kwargs behind the engine's.

    Example:
        eos (2, 7) and more [7, 11] -> [2, 7, 11]
    """
    if more is None:
        more = []
    elif isinstance(more, int):
        more = [more]
    return list(dict.fromkeys([*eos, *more]))


def stop_criteria(config: GenerationConfig, tokenizer: PreTrainedTokenizerBase) -> StopCriteria:
    """Return what ends a completion, by the options of `sampling_config`."""
    stops = config.stop_strings or ()
    return StopCriteria(
        config.eos_token_id,  # pyright: ignore[reportArgumentType] (a list, by `sampling_config`)
        config.max_new_tokens,  # pyright: ignore[reportArgumentType] (a number, likewise)
        [stops] if isinstance(stops, str) else stops,
        lambda ids: str(tokenizer.decode(ids, skip_special_tokens=False)),
    )
