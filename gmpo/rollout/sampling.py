"""From settings to `Sampling`: how to sample, and how many tokens."""

from typing import Any

from gmpo.rollout.engine import Sampling
from gmpo.rollout.settings import RolloutSettings


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
