"""The table of named rewards, and functions named by file or module.

Python (`reward_funcs="accuracy"`) and the command line (`--reward accuracy`) both read it.
"""

import ast
import hashlib
import importlib
import importlib.util
import inspect
import os
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from gmpo.option import advice
from gmpo.reward.builtin import (
    Accuracy,
    Cosine,
    NumberMatch,
    Repetition,
    RepetitionPenalty,
    RewardFunction,
    SoftOverlongPunishment,
    ThinkFormat,
)
from gmpo.reward.code import Code
from gmpo.reward.math_judge import require_math_verify
from gmpo.reward.reasoning_gym import bare_number, reasoning_gym, require_reasoning_gym


@dataclass(frozen=True, slots=True)
class Named:
    """A reward that has a name."""

    about: str  # for `gmpo train --help`
    make: Callable[..., RewardFunction] | None = None  # with settings, as name(first=1)
    function: RewardFunction | None = None  # without settings; None if it can't do without
    require: Callable[[], Any] | None = None  # raises an ImportError that says what to install


REWARDS: dict[str, Named] = {
    "accuracy": Named(
        "the right mathematical answer, compared by math-verify (columns answer or solution)",
        Accuracy,
        Accuracy(),
        require_math_verify,
    ),
    "number_match": Named(
        "the right final number (columns answer or solution)",
        function=NumberMatch(),
    ),
    "code": Named(
        "a program that passes the tests in the column tests",
        Code,
        Code(),
    ),
    "reasoning_gym": Named(
        "the verifier of a reasoning_gym task",
        function=reasoning_gym,
        require=require_reasoning_gym,
    ),
    "cosine": Named(
        "accuracy that pays short right and long wrong answers more",
        Cosine,
        require=require_math_verify,
    ),
    "think_format": Named(
        "one thought between <think> tags, then the rest",
        ThinkFormat,
        ThinkFormat(),
    ),
    "bare_number": Named("a number and nothing else", function=bare_number),
    "repetition": Named("a penalty of repeated n-grams of tokens", Repetition, Repetition()),
    "repetition_penalty": Named(
        "a penalty of repeated n-grams of words",
        RepetitionPenalty,
        RepetitionPenalty(),
    ),
    "length": Named("soft_overlong_punishment by a shorter name", SoftOverlongPunishment),
    "soft_overlong_punishment": Named(
        "a penalty that grows as a completion nears max_completion_length",
        SoftOverlongPunishment,
    ),
}


def find_reward(spec: str) -> RewardFunction | str:
    """Return the function that `spec` names, or the folder or hub id of the reward model it names.

    Nothing is looked up on the hub.

    Raises:
        ValueError: If there is no such function, or `spec` can't be a model either.
    """
    path = Path(spec).expanduser()
    if spec and path.is_dir():
        return str(path)
    if is_reward_spec(spec):
        return load_reward(spec)
    if re.fullmatch(r"[\w.-]+/[\w.-]+", spec) and not spec.startswith((".", "~")):
        return spec

    if spec.endswith(".py"):
        raise ValueError(f"The reward {spec!r} is a file without a function: write {spec}:NAME.")
    if "/" in spec or "\\" in spec or spec.startswith(("~", ".")) or not spec:
        raise ValueError(
            f"The reward {spec!r} is not a local folder, a hub id (owner/name) or a built-in name. "
            "Check the path of the reward model."
        )
    return load_reward(spec)


def is_reward_spec(text: str) -> bool:
    """Return True if `text` names a function for `load_reward`, rather than a model."""
    drive = re.match(r"[A-Za-z]:[\\/]", text) is not None  # a folder on Windows
    return text in REWARDS or text.endswith(")") or (":" in text and not drive)


def load_reward(spec: str) -> RewardFunction:
    """Return the reward function that `spec` names.

    Args:
        spec: A built-in name ("accuracy"), "file.py:function", "package.module:function" or
            "package.module.function", found from the working directory too.  With settings in
            parentheses, "length(max_completion_length=512, cache=128)" or
            "rewards.py:make(scale=2)", it is the function that this call returns.

    Raises:
        ValueError: If there is no such function, or the settings don't fit it.
        ImportError: If it needs a package that is not installed.
    """
    name, settings = _parsed(spec)
    if name in REWARDS:
        return _named(name, settings)

    if not (":" in name or re.fullmatch(r"[^\W\d]\w*(\.[^\W\d]\w*)+", name)):
        known = sorted(REWARDS)
        raise ValueError(
            f"There is no reward {name!r}.{advice(name, known)} Built in are {', '.join(known)}; "
            "your own are 'file.py:function' or 'package.module:function', and a reward model is "
            "a folder or 'owner/name'."
        )
    function = _imported(name)
    return function if settings is None else _made(function, settings, spec)


def _named(name: str, settings: Mapping[str, Any] | None) -> RewardFunction:
    entry = REWARDS[name]
    if settings is None and entry.function is None:
        assert entry.make is not None
        first = next(iter(inspect.signature(entry.make).parameters))
        raise ValueError(
            f"The reward {name!r} needs settings: {name}{_signature(entry.make)}. Write them as "
            f"'{name}({first}=..., ...)', in quotes on a command line."
        )
    if settings is not None and entry.make is None:
        raise ValueError(f"The reward {name!r} takes no settings, but got {settings!r}.")

    if entry.require is not None:
        entry.require()
    if settings is None:
        assert entry.function is not None
        return entry.function
    assert entry.make is not None
    return _made(entry.make, settings, name)


def _parsed(spec: str) -> tuple[str, dict[str, Any] | None]:
    """Return the name in `spec`, and its settings (None if it has no parentheses)."""
    name, parenthesis, rest = spec.strip().partition("(")
    if not parenthesis:
        return name, None
    try:
        call = ast.parse(f"settings({rest}", mode="eval").body
        if not isinstance(call, ast.Call) or call.args:
            raise ValueError
        settings = {str(word.arg): ast.literal_eval(word.value) for word in call.keywords}
    except (SyntaxError, ValueError):
        raise ValueError(
            f"The settings in {spec!r} can't be read. Write them as plain values: "
            "name(first=1, second='two')."
        ) from None
    return name.strip(), settings


def _made(make: Callable[..., Any], settings: Mapping[str, Any], spec: str) -> RewardFunction:
    try:
        inspect.signature(make).bind(**settings)
    except TypeError as error:
        raise ValueError(f"{spec!r}: {error}. It takes {_signature(make)}.") from None
    function = make(**settings)
    if not callable(function):
        raise ValueError(
            f"{spec!r} gives {function!r} ({type(function).__name__}), which is not a function."
        )
    return function


def _signature(make: Callable[..., Any]) -> str:
    """Return the settings of `make` as a user writes them, without annotations."""
    parameters = inspect.signature(make).parameters.values()
    plain = [parameter.replace(annotation=parameter.empty) for parameter in parameters]
    return str(inspect.Signature(plain))


def _imported(name: str) -> RewardFunction:
    module_name, _, function_name = name.rpartition(":" if ":" in name else ".")
    module = _module(module_name)
    function = getattr(module, function_name, None)
    if function is None:
        raise ValueError(
            f"{module_name!r} has no function {function_name!r}."
            f"{advice(function_name, dir(module))}"
        )
    if not callable(function):
        raise ValueError(f"{name!r} is {function!r} ({type(function).__name__}), not a function.")
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
    _find_imports_in(str(path.parent))
    return module_from_file(name, str(path))


def module_from_file(name: str, path: str) -> ModuleType:
    """Return the module `name`, run from the file `path` if it is not imported yet."""
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _find_imports_in(folder: str) -> None:
    if folder not in sys.path:
        sys.path.append(folder)  # last: it must not hide installed packages
