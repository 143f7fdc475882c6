"""Rewards that have a name, for the command line and for anyone: plain functions, called as a user's own would be.

`BUILTIN` holds those that work as they are, `FACTORIES` makes them with settings, `load_reward` finds either and the
functions of users' files and packages.
"""

import ast
import difflib
import hashlib
import importlib
import importlib.util
import inspect
import os
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from types import ModuleType
from typing import Any

from gmpo.reward.math_judge import require_math_verify, shared_judge

RewardFunction = Callable[..., Any]
Completion = str | Sequence[Mapping[str, Any]]

# Digits, perhaps with thousands separators, a fraction part or a denominator.  Not within a word or another number.
_NUMBER = re.compile(r"(?<![\w.])[-+−]?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)?(?:\.\d+)?(?<=\d)(?:/\d+)?")
_FRACTION = re.compile(r"\\[dt]?frac\s*\{\s*(\d+)\s*\}\s*\{\s*(\d+)\s*\}")
_THINK = re.compile(r"<think>(?:(?!</?think>).)*</think>(?:(?!</?think>).)*", re.DOTALL)


# -- the rewards -------------------------------------------------------------------------------------------------------


def accuracy(
    completions: Sequence[Completion],
    answer: Sequence[Any] | None = None,
    solution: Sequence[Any] | None = None,
) -> list[float | None]:
    """1 where the completion gives the right mathematical answer, else 0; None where the gold answer can't be read.

    math-verify compares, so 0.5 equals \\frac{1}{2}.  A \\boxed{} answer wins over other mathematics in the text; what
    a model thinks between <think> and </think> does not count.  What can't be verified within 5 s is wrong.

    Args:
        answer, solution: Columns with the gold answer, as LaTeX or text; `answer` where a row has both.  In text with
            "####" (GSM8K) it is what follows.

    Raises:
        ImportError: If math-verify is not installed (`pip install 'gmpo[math]'`).
        ValueError: If the dataset has neither column.
    """
    golds = gold_answers("accuracy", answer, solution)
    verdict = shared_judge().verdict
    return [
        None if gold is None else _as_reward(verdict(gold, spoken(completion)))
        for gold, completion in zip(golds, completions, strict=True)
    ]


def number_match(
    completions: Sequence[Completion],
    answer: Sequence[Any] | None = None,
    solution: Sequence[Any] | None = None,
) -> list[float | None]:
    """1 where the final number of the completion equals that of the gold answer exactly, else 0.

    The final number is the last one in the last \\boxed{}, else the last one after "####", else the last one of the
    text; 1,000 and 1000.0 are equal, 1/2 and 0.5 too.  None where the gold answer has no number.  Needs no other
    package and is faster than `accuracy` by more than ten times: the right choice for answers like GSM8K's.

    Args:
        answer, solution: As for `accuracy`.
    """
    golds = [
        None if gold is None else final_number(gold)
        for gold in gold_answers("number_match", answer, solution)
    ]
    return [
        None if gold is None else float(final_number(spoken(completion)) == gold)
        for gold, completion in zip(golds, completions, strict=True)
    ]


def think_format(completions: Sequence[Completion]) -> list[float]:
    """1 where the completion is one <think>...</think> and what follows, else 0.

    Nothing but white space may come before, and neither tag a second time.
    """
    return [
        float(_THINK.fullmatch(completion_text(completion).lstrip()) is not None)
        for completion in completions
    ]


def soft_overlong_punishment(max_completion_length: int, cache: int) -> RewardFunction:
    """A reward of 0 for completions up to max_completion_length - cache tokens, falling to -1 at max_completion_length.

    Source: arXiv:2503.14476 (DAPO), equation 13.

    Args:
        max_completion_length: Tokens at which the punishment is full.
        cache: Tokens over which it grows; 0: it sets in at once.
    """
    if not 0 <= cache <= max_completion_length:
        raise ValueError(
            f"cache={cache} must lie between 0 and max_completion_length={max_completion_length}."
        )
    free = max_completion_length - cache

    def punishment(length: int) -> float:
        if length <= free:
            return 0.0
        return -1.0 if length >= max_completion_length else (free - length) / cache

    def soft_overlong_punishment(completion_ids: Sequence[Sequence[int]]) -> list[float]:
        return [punishment(len(ids)) for ids in completion_ids]

    return soft_overlong_punishment


def repetition_penalty(ngram_size: int = 3, max_penalty: float = -1.0) -> RewardFunction:
    """A reward of max_penalty * (1 - distinct n-grams / n-grams) over lower-case words; 0 below `ngram_size` words.

    Source: after arXiv:2502.03373, whose penalty falls on the repeated tokens rather than on the completion.

    Args:
        ngram_size: Words of an n-gram.
        max_penalty: What a completion of nothing but repetition gets; at most 0.
    """
    if ngram_size < 1:
        raise ValueError(f"ngram_size={ngram_size} must be at least 1.")
    if max_penalty > 0:
        raise ValueError(
            f"max_penalty={max_penalty} would reward repetition. Use a number of at most 0."
        )

    def penalty(words: list[str]) -> float:
        ngrams = [tuple(words[i : i + ngram_size]) for i in range(len(words) - ngram_size + 1)]
        return max_penalty * (1 - len(set(ngrams)) / len(ngrams)) if ngrams else 0.0

    def repetition_penalty(completions: Sequence[Completion]) -> list[float]:
        return [penalty(completion_text(completion).lower().split()) for completion in completions]

    return repetition_penalty


BUILTIN: dict[str, RewardFunction] = {
    "accuracy": accuracy,
    "number_match": number_match,
    "think_format": think_format,
    "repetition_penalty": repetition_penalty(),
}
FACTORIES: dict[str, Callable[..., RewardFunction]] = {
    "repetition_penalty": repetition_penalty,
    "soft_overlong_punishment": soft_overlong_punishment,
}
_REQUIREMENTS: dict[str, Callable[[], None]] = {"accuracy": require_math_verify}


# -- what is read in texts ---------------------------------------------------------------------------------------------


def completion_text(completion: Completion) -> str:
    """The text of a completion; of a conversation, that of its last assistant message."""
    if isinstance(completion, str):
        return completion
    content = (
        next((m.get("content") for m in reversed(completion) if m.get("role") == "assistant"), None)
        or ""
    )
    if isinstance(content, str):
        return content
    return "".join(block.get("text", "") for block in content if block.get("type") == "text")


def spoken(completion: Completion) -> str:
    """What a completion says after it has thought: all of it without <think>; "" while it still thinks."""
    text = completion_text(completion)
    still_thinking = "<think>" in text and "</think>" not in text
    return "" if still_thinking else text.rpartition("</think>")[2]


def gold_answers(
    reward: str, answer: Sequence[Any] | None, solution: Sequence[Any] | None
) -> list[str | None]:
    """The gold answer of each row as text, from the column `answer` or else `solution`; None where a row has none."""
    if answer is None and solution is None:
        raise ValueError(
            f"The reward {reward!r} needs the gold answer in a dataset column 'answer' or 'solution'."
        )
    columns = [column for column in (answer, solution) if column is not None]
    rows = (
        next((value for value in values if value is not None), None)
        for values in zip(*columns, strict=True)
    )
    return [None if value is None else str(value).rpartition("####")[2].strip() for value in rows]


def final_number(text: str) -> Fraction | None:
    """The last number of the last \\boxed{} of `text`, else after its last "####", else of all of it; None: none."""
    boxed = last_boxed(text)
    text = text.rpartition("####")[2] if boxed is None else boxed
    found = _NUMBER.findall(_FRACTION.sub(r"\1/\2", text))
    try:
        return Fraction(found[-1].replace(",", "").replace("−", "-")) if found else None
    except (ValueError, ZeroDivisionError):  # thousands of digits, or a denominator of 0
        return None


def last_boxed(text: str) -> str | None:
    """What the last \\boxed{...} holds, with its braces balanced; None: there is none."""
    start = text.rfind("\\boxed{")
    depth = 0
    for i in range(start + len("\\boxed"), len(text) if start >= 0 else 0):
        depth += {"{": 1, "}": -1}.get(text[i], 0)
        if depth == 0:
            return text[start + len("\\boxed{") : i]
    return None


def _as_reward(verdict: bool | None) -> float | None:
    return None if verdict is None else float(verdict)


# -- rewards by name ---------------------------------------------------------------------------------------------------


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
