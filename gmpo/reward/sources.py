"""Who scores: user functions, reward models, or any object with a name and a `score`."""

import inspect
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from gmpo.reward.by_name import is_reward_spec, load_reward
from gmpo.reward.reward_model import RewardModelSettings, load_model_reward, model_reward
from gmpo.reward.settings import RewardSettings, check_weights
from gmpo.reward.types import RewardCall, RewardSource

OWN_COLUMNS = frozenset(
    {"prompt", "completion", "completion_ids"}
)  # of the dataset; rewards get the rollout's instead
OWN_KEYWORDS = frozenset({"prompts", "completions", "trainer_state", "log_extra", "log_metric"})


class FunctionReward:
    """A user's function: sync or async, a partial, or an object with `__call__`.

    It gets the keywords that its signature accepts, all of them where it takes **kwargs.
    """

    def __init__(self, function: Callable[..., Any]):
        self.name = function_name(function)
        self.asynchronous = inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(
            getattr(function, "__call__", None)  # noqa: B004 (an async __call__ is what we look for)
        )
        self._function = function
        self._parameters = _parameters(function)

    def score(self, call: RewardCall) -> Any:
        keywords = call.keywords()
        if self._parameters is not None:
            self._check_required(keywords)
            keywords = {name: value for name, value in keywords.items() if name in self._parameters}
        return self._function(**keywords)

    def check_columns(self, columns: Iterable[str]) -> None:
        """Raise a ValueError if the function needs what neither gmpo nor a dataset with these columns gives it."""
        if self._parameters is not None:
            others = [name for name in columns if name not in OWN_COLUMNS]
            self._check_required(dict.fromkeys([*others, *sorted(OWN_KEYWORDS), "completion_ids"]))

    def _check_required(self, keywords: Mapping[str, Any]) -> None:
        assert self._parameters is not None
        required = [
            name
            for name, parameter in self._parameters.items()
            if parameter.default is parameter.empty
        ]
        missing = [name for name in required if name not in keywords]
        if missing:
            raise ValueError(
                f"Reward function {self.name!r} needs {', '.join(map(repr, missing))}, which the dataset does not "
                f"have. It can get: {', '.join(keywords)}."
            )


def build_sources(
    reward_funcs: Any,
    reward_processing_classes: Any = None,
    *,
    settings: RewardSettings | None = None,
    model_settings: RewardModelSettings | None = None,
) -> list[RewardSource]:
    """The sources behind what a user gave as rewards.  The user's list stays as it is.

    Args:
        reward_funcs: One of, or a list or tuple of: a function; a sequence-classification model with one label, or
            its path or hub id; a built-in name or another specification that `load_reward` reads; a `RewardSource`.
        reward_processing_classes: The tokenizers of the reward models, one per reward (None: the model's own).
        settings: `reward_weights` must be as many as the sources.
        model_settings: How models given by name are loaded, and all models run.

    Raises:
        ValueError: For no reward at all, a wrong type, a path that does not exist, or lists that do not match.
    """
    rewards = _listed(reward_funcs)
    if not rewards:
        raise ValueError(
            "There is no reward: pass reward_funcs, a function or reward model or a list of them."
        )
    tokenizers = _listed(reward_processing_classes) or [None] * len(rewards)
    if len(tokenizers) != len(rewards):
        raise ValueError(
            f"There are {len(tokenizers)} reward_processing_classes for {len(rewards)} reward_funcs: the numbers must "
            "match. Give None for a function."
        )
    if settings is not None:
        check_weights(settings.reward_weights, len(rewards))
    builders = [
        _builder(reward, tokenizer) for reward, tokenizer in zip(rewards, tokenizers, strict=True)
    ]
    # Everything has been looked at by now: no model is loaded only for the next item to be refused.
    sources = [build(model_settings or RewardModelSettings()) for build in builders]
    for source, name in zip(
        sources, distinct_names([source.name for source in sources]), strict=True
    ):
        if source.name != name:
            source.name = name
    return sources


def function_name(function: Callable[..., Any]) -> str:
    """The name of a function in the metrics: of what a partial wraps; of its class for an object without a name."""
    while isinstance(function, partial):
        function = function.func
    return getattr(function, "__name__", type(function).__name__)


def distinct_names(names: Sequence[str]) -> list[str]:
    """`names` with "_2", "_3", ... after those that came before."""
    distinct: list[str] = []
    for name in names:
        candidates = (name if i == 1 else f"{name}_{i}" for i in range(1, len(names) + 2))
        distinct.append(next(candidate for candidate in candidates if candidate not in distinct))
    return distinct


def columns_of(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """The columns of `rows` that rewards get beside prompt and completion; None where a row lacks the key.

    Raises:
        ValueError: If a column has the name of another argument of a reward function.
    """
    names = list(dict.fromkeys(name for row in rows for name in row if name not in OWN_COLUMNS))
    clashes = sorted(OWN_KEYWORDS.intersection(names))
    if clashes:
        raise ValueError(
            f"The dataset has columns {clashes}, but reward functions get something else under these names. "
            "Rename the columns."
        )
    return {name: [row.get(name) for row in rows] for name in names}


def _builder(reward: Any, tokenizer: Any) -> Callable[[RewardModelSettings], Any]:
    """What makes a source of `reward`, once models may be loaded."""
    if isinstance(reward, str | os.PathLike):
        spec = os.fspath(reward)
        if is_reward_spec(spec) and not Path(spec).exists():
            return _function_builder(load_reward(spec))
        name = _model_name(spec)
        return lambda options: load_model_reward(name, tokenizer, options)
    if isinstance(reward, nn.Module):
        return lambda options: model_reward(reward, tokenizer, options)
    if isinstance(reward, type):
        raise ValueError(
            f"reward_funcs holds the class {reward.__name__}. Pass an instance: {reward.__name__}(...)."
        )
    if isinstance(reward, RewardSource):
        return lambda options: reward
    if callable(reward):
        return _function_builder(reward)
    raise ValueError(
        f"reward_funcs holds {reward!r} ({type(reward).__name__}). A reward is a function, a sequence-classification "
        "model, or the path, hub id or name of one."
    )


def _function_builder(
    function: Callable[..., Any],
) -> Callable[[RewardModelSettings], FunctionReward]:
    source = FunctionReward(function)
    return lambda options: source


def _model_name(spec: str) -> str:
    """The folder or hub id that `spec` names."""
    folder = Path(spec).expanduser()
    if spec and folder.is_dir():
        return str(folder)
    if spec.startswith((".", "~")) or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", spec):
        raise ValueError(
            f"reward_funcs holds {spec!r}, which is no folder here, no hub id (owner/name) and no reward's name. Check "
            "the path of the reward model."
        )
    return spec


def _listed(value: Any) -> list[Any]:
    if value is None:
        return []
    return list(value) if isinstance(value, list | tuple) else [value]


def _parameters(function: Callable[..., Any]) -> dict[str, inspect.Parameter] | None:
    """The parameters of `function`; None: it takes every keyword, or does not say."""
    try:
        # A decorated function is called through its wrapper: what the wrapper accepts is what counts.
        parameters = inspect.signature(function, follow_wrapped=False).parameters
    except (TypeError, ValueError):
        return None
    kinds = {parameter.kind for parameter in parameters.values()}
    if inspect.Parameter.POSITIONAL_ONLY in kinds:
        raise ValueError(
            f"Reward function {function_name(function)!r} has positional-only parameters, but is called with keywords "
            "(prompts, completions, ...). Remove the '/' from its signature."
        )
    if inspect.Parameter.VAR_KEYWORD in kinds:
        return None
    return {
        name: p for name, p in parameters.items() if p.kind is not inspect.Parameter.VAR_POSITIONAL
    }
