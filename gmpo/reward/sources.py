"""Functions, reward models and names as reward sources."""

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn

from gmpo.reward.by_name import find_reward
from gmpo.reward.check import check_weights
from gmpo.reward.functions import (
    OWN_COLUMNS,
    FunctionReward,
    PooledReward,
    is_async,
    refuse_reserved,
)
from gmpo.reward.pool import Limits, shared_pool
from gmpo.reward.reward_model import RewardModelSettings, load_model_reward, model_reward
from gmpo.reward.settings import RewardSettings
from gmpo.reward.types import RewardSource

_WALL_S = 60.0  # of a call in a worker process, unless reward_timeout says otherwise


def build_sources(
    reward_funcs: object,
    reward_processing_classes: object = None,
    *,
    settings: RewardSettings | None = None,
    model_settings: RewardModelSettings | None = None,
) -> list[RewardSource]:
    """Return the sources behind what a user gave as rewards.  The user's list stays as it is.

    Args:
        reward_funcs: One of, or a list or tuple of: a function; a sequence-classification model
            with one label, or its path or hub id; a built-in name or another specification that
            `load_reward` reads; a `RewardSource`.
        reward_processing_classes: The tokenizers of the reward models, one per reward (None takes
            the model's own).
        settings: `reward_weights` must be as many as the sources.
        model_settings: How models given by name are loaded, and all models run.

    Raises:
        ValueError: For no reward at all, a wrong type, a path or name that does not exist, or lists
            that do not match.
    """
    settings = settings or RewardSettings()
    rewards = _listed(reward_funcs)
    if not rewards:
        raise ValueError(
            "There is no reward: pass reward_funcs, a function or reward model or a list of them."
        )
    tokenizers = _listed(reward_processing_classes) or [None] * len(rewards)
    if len(tokenizers) != len(rewards):
        raise ValueError(
            f"There are {len(tokenizers)} reward_processing_classes for {len(rewards)} "
            "reward_funcs: the numbers must match. Give None for a function."
        )
    check_weights(settings.reward_weights, len(rewards))
    if settings.reward_weights and not any(settings.reward_weights):
        raise ValueError(
            f"reward_weights={settings.reward_weights!r} are all 0: no reward would train "
            "anything. Give at least one another weight."
        )

    builders = [
        _builder(reward, tokenizer, settings)
        for reward, tokenizer in zip(rewards, tokenizers, strict=True)
    ]
    _refuse_unused_timeout(rewards, settings)
    _refuse_unused_workers(rewards, settings)
    own = [id(reward) for reward in rewards if isinstance(reward, RewardSource)]
    if len(own) != len(set(own)):
        raise ValueError("reward_funcs holds the same RewardSource twice. Make one for each.")

    # Everything has been looked at by now: no model is loaded only for the next item to be refused.
    sources = [build(model_settings or RewardModelSettings()) for build in builders]
    names = distinct_names([source.name for source in sources])
    for source, name in zip(sources, names, strict=True):
        if source.name != name:
            source.name = name
    return sources


def distinct_names(names: Sequence[str]) -> list[str]:
    """Return `names` with "_2", "_3", ... after those that came before."""
    distinct: list[str] = []
    for name in names:
        candidates = (name if i == 1 else f"{name}_{i}" for i in range(1, len(names) + 2))
        distinct.append(next(candidate for candidate in candidates if candidate not in distinct))
    return distinct


def columns_of(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """Return the columns that rewards get beside prompt and completion; None where a row lacks one.

    Raises:
        ValueError: If a column has the name of another argument of a reward function.
    """
    names = dict.fromkeys(name for row in rows for name in row if name not in OWN_COLUMNS)
    refuse_reserved(names)
    return {name: [row.get(name) for row in rows] for name in names}


def function_source(function: Callable[..., Any], settings: RewardSettings) -> FunctionReward:
    """Return the source of a function: in this process, or in workers if there are any."""
    if is_async(function) or not settings.reward_workers:
        return FunctionReward(function, timeout_s=settings.reward_timeout)
    if getattr(function, "in_process", False):
        shared_pool(settings.reward_workers)
        return FunctionReward(function)
    limits = Limits(
        wall_s=settings.reward_timeout or _WALL_S,
        memory_bytes=int(settings.reward_memory_limit * 2**30),
    )
    return PooledReward(function, limits=limits, max_workers=settings.reward_workers)


def _builder(
    reward: object, tokenizer: object, settings: RewardSettings
) -> Callable[[RewardModelSettings], Any]:
    """Return what makes a source of `reward`, once models may be loaded."""
    if isinstance(reward, str | os.PathLike):
        found = find_reward(os.fspath(reward))
        if isinstance(found, str):
            return lambda options: load_model_reward(found, tokenizer, options)
        reward = found
    if isinstance(reward, nn.Module):
        return lambda options: model_reward(reward, tokenizer, options)
    if isinstance(reward, type):
        raise ValueError(
            f"reward_funcs holds the class {reward.__name__}. Pass an instance: "
            f"{reward.__name__}(...)."
        )
    if isinstance(reward, RewardSource):
        return lambda options: reward
    if callable(reward):
        source = function_source(reward, settings)
        return lambda options: source
    raise ValueError(
        f"reward_funcs holds {reward!r} ({type(reward).__name__}). A reward is a function, a "
        "sequence-classification model, or the path, hub id or name of one."
    )


def _refuse_unused_timeout(rewards: Sequence[Any], settings: RewardSettings) -> None:
    """Raise a ValueError if there is a deadline for nobody: only workers can be ended."""
    if settings.reward_timeout is None or settings.reward_workers:
        return
    if not any(callable(reward) and is_async(reward) for reward in rewards):
        raise ValueError(
            f"reward_timeout={settings.reward_timeout:g} has no effect: a function in this process "
            "can't be ended. Set reward_workers to 1 or more, or leave reward_timeout out."
        )


def _refuse_unused_workers(rewards: Sequence[Any], settings: RewardSettings) -> None:
    """Raise a ValueError if there are worker processes that nothing would use."""
    if not settings.reward_workers:
        return
    for reward in rewards:
        function: Any = reward
        if isinstance(reward, str | os.PathLike):
            function = find_reward(os.fspath(reward))
        if not callable(function) or isinstance(function, nn.Module | RewardSource):
            continue

        stays_here = is_async(function) or getattr(function, "in_process", False)
        if not stays_here or getattr(function, "uses_pool", False):
            return
    raise ValueError(
        f"reward_workers={settings.reward_workers} has no effect: none of the rewards is a sync "
        "function that a worker process could call. Leave it at 0."
    )


def _listed(value: object) -> list[Any]:
    if value is None:
        return []
    return list(value) if isinstance(value, list | tuple) else [value]
