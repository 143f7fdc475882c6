"""Rewards by name: the table of built-in ones, and functions named by file or module."""

import ast
import difflib
import hashlib
import importlib
import importlib.util
import inspect
import os
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from gmpo.reward.builtin import (
    RewardFunction,
    accuracy,
    number_match,
    repetition_penalty,
    soft_overlong_punishment,
    think_format,
)
from gmpo.reward.math_judge import require_math_verify
from gmpo.reward.reasoning_gym import bare_number, reasoning_gym, require_reasoning_gym

BUILTIN: dict[str, RewardFunction] = {
    "accuracy": accuracy,
    "number_match": number_match,
    "think_format": think_format,
    "repetition_penalty": repetition_penalty(),
    "reasoning_gym": reasoning_gym,
    "bare_number": bare_number,
}


FACTORIES: dict[str, Callable[..., RewardFunction]] = {
    "repetition_penalty": repetition_penalty,
    "soft_overlong_punishment": soft_overlong_punishment,
}


_REQUIREMENTS: dict[str, Callable[[], None]] = {
    "accuracy": require_math_verify,
    "reasoning_gym": require_reasoning_gym,
}


def is_reward_spec(text: str) -> bool:
    """Whether `text` names a function for `load_reward`, rather than a model."""
    return text in BUILTIN or text in FACTORIES or ":" in text or text.endswith(")")


def load_reward(spec: str) -> RewardFunction:
    """The reward function that `spec` names.

    Args:
        spec: A built-in name ("accuracy"), "file.py:function", "package.module:function" or
            "package.module.function", found from the working directory too.  With settings in parentheses,
            "soft_overlong_punishment(max_completion_length=512, cache=128)" or "rewards.py:make(scale=2)", it is the
            function that this call gives.

    Raises:
        ValueError: If there is no such function, or the settings don't fit it.
    """
    name, settings = _parsed(spec)
    function = (BUILTIN if settings is None else FACTORIES).get(name)
    if function is None:
        function = _imported(name) if ":" in name or "." in name else _refuse(name, settings)
    if settings is not None:
        return _made(function, settings, spec)
    _REQUIREMENTS.get(name, lambda: None)()
    return function


def _parsed(spec: str) -> tuple[str, dict[str, Any] | None]:
    """The name in `spec`, and its settings; None: it has no parentheses."""
    name, opened, rest = spec.strip().partition("(")
    if not opened:
        return name, None
    try:
        call = ast.parse(f"settings({rest}", mode="eval").body
        assert isinstance(call, ast.Call) and not call.args
        return name.strip(), {
            str(keyword.arg): ast.literal_eval(keyword.value) for keyword in call.keywords
        }
    except (SyntaxError, ValueError, AssertionError):
        raise ValueError(
            f"The settings in {spec!r} can't be read. Write them as plain values: name(first=1, second='two')."
        ) from None


def _made(factory: Callable[..., Any], settings: Mapping[str, Any], spec: str) -> RewardFunction:
    try:
        inspect.signature(factory).bind(**settings)
    except TypeError as error:
        raise ValueError(f"{spec!r}: {error}. It takes {inspect.signature(factory)}.") from None
    function = factory(**settings)
    if not callable(function):
        raise ValueError(
            f"{spec!r} gives {function!r} ({type(function).__name__}), which is no function."
        )
    return function


def _refuse(name: str, settings: Mapping[str, Any] | None) -> Any:
    if name in FACTORIES:
        raise ValueError(
            f"The reward {name!r} needs settings: {name}{inspect.signature(FACTORIES[name])}."
        )
    if name in BUILTIN:
        raise ValueError(f"The reward {name!r} takes no settings, but got {settings!r}.")
    known = sorted(BUILTIN | FACTORIES)
    raise ValueError(
        f"There is no reward {name!r}.{_closest(name, known)} Built in are {', '.join(known)}; your own are "
        "'file.py:function' or 'package.module:function'."
    )


def _imported(name: str) -> RewardFunction:
    module_name, _, function_name = name.rpartition(":" if ":" in name else ".")
    module = _module(module_name)
    function = getattr(module, function_name, None)
    if function is None:
        raise ValueError(
            f"{module_name!r} has no function {function_name!r}.{_closest(function_name, dir(module))}"
        )
    if not callable(function):
        raise ValueError(
            f"{name!r} is {function!r} ({type(function).__name__}), which is no function."
        )
    return function


def _module(name: str) -> ModuleType:
    if name.endswith(".py"):
        return _module_of_file(Path(name).expanduser().resolve())
    _find_imports_in(os.getcwd())
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise  # the module is there, but not what it imports
        raise ValueError(
            f"There is no module {name!r} (looked up from {os.getcwd()!r} too)."
        ) from None


def _module_of_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise ValueError(f"There is no file {str(path)!r} to take a reward function from.")
    name = f"{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
    if name not in sys.modules:
        _find_imports_in(str(path.parent))
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None and spec.loader is not None
        sys.modules[name] = module = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[name]
            raise
    return sys.modules[name]


def _find_imports_in(folder: str) -> None:
    if folder not in sys.path:
        sys.path.append(folder)  # last: it must not hide installed packages


def _closest(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    return f" Did you mean {close[0]!r}?" if close else ""
