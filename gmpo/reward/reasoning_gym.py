"""Tasks of reasoning_gym: their rows, and rewards that ask the task's own verifier.

A row carries what the verifier needs to draw the same entry again: the task, its settings and the entry's number.
"""

import functools
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from transformers.utils import logging

from gmpo.reward.text import Completion, answer_text, completion_text

logger = logging.get_logger(__name__)

PREFIX = "reasoning_gym:"
# Digits, perhaps with thousands separators, decimals or a denominator; not in the middle of a word or of a number.
NUMBER = re.compile(r"(?<![\w.])[-+−]?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?(?:/\d+)?")


def task_rows(task: str, settings: Mapping[str, Any] | None = None) -> list[dict[str, Any]]:
    """Every entry of a task: `prompt` (its question), `answer`, and `task`, `task_settings`, `task_index`.

    Args:
        settings: Of the task (`size`, `seed`, `max_terms`, ...); without `seed` it is 0, so that runs can be repeated.

    Raises:
        ImportError: If reasoning_gym is not installed.
        ValueError: If there is no such task, or it does not take the settings.
    """
    written = json.dumps({"seed": 0, **(settings or {})}, sort_keys=True)
    entries = entries_of(task, written)
    return [
        {
            "prompt": entry["question"],
            "answer": None if entry["answer"] is None else str(entry["answer"]),
            "task": task,
            "task_settings": written,
            "task_index": index,
        }
        for index, entry in enumerate(entries[index] for index in range(len(entries)))
    ]


def evaluation_settings(
    settings: Mapping[str, Any] | None, changes: Mapping[str, Any] | None
) -> dict[str, Any]:
    """Settings that draw other entries than `settings` does.

    Entry i of seed s is entry i - 1 of seed s + 1: the seed must move by as much as there are entries.
    """
    base = dict(settings or {})
    return {**base, "seed": base.get("seed", 0) + base.get("size", 500), **(changes or {})}


@functools.lru_cache(maxsize=16)
def entries_of(task: str, settings: str) -> Any:
    """The task's dataset object; `settings` is a JSON object."""
    gym = require_reasoning_gym()
    if task not in gym.factory.DATASETS:
        import difflib

        close = difflib.get_close_matches(task, gym.factory.DATASETS, n=1)
        hint = f" Did you mean {PREFIX}{close[0]}?" if close else ""
        raise ValueError(f"reasoning_gym has no task {task!r}.{hint}")
    try:
        return gym.create_dataset(task, **json.loads(settings))
    except (TypeError, AssertionError) as error:
        raise ValueError(f"The task {task!r} does not take {settings}: {error}.") from None


def require_reasoning_gym() -> Any:
    try:
        import reasoning_gym
        import reasoning_gym.factory
    except ImportError as error:
        raise ImportError(
            f"The tasks need reasoning_gym: pip install 'gmpo[tasks]' ({error})."
        ) from None
    return reasoning_gym


# -- rewards -----------------------------------------------------------------------------------------------------------


def reasoning_gym(
    completions: Sequence[Completion],
    answer: Sequence[str | None],
    task: Sequence[str],
    task_settings: Sequence[str],
    task_index: Sequence[int],
) -> list[float]:
    """What the task's own verifier gives, in [0, 1], for the answer that the completion states (`stated_answer`).

    The verifiers are made for a bare answer.  Given a sentence, most pay out the share of its characters that the right
    answer makes up, which is next to nothing ("The answer is 7." gets 0.06), and some raise; so the answer is taken out
    of the text first.  For numbers that share is worse than nothing: "170" would get two thirds for a right answer of
    "70".  It is not paid here; any other partial score of a verifier is.
    """
    rows = zip(completions, answer, task, task_settings, task_index, strict=True)
    return [
        verified(answer_text(text), gold, entries_of(name, settings), i)
        for text, gold, name, settings, i in rows
    ]


def verified(text: str, gold: str | None, entries: Any, index: int) -> float:
    """The verifier's score of entry `index` for the answer stated in `text`."""
    entry = entries[index]
    if gold is not None and str(entry["answer"]) != gold:
        raise ValueError(
            f"Entry {index} has the answer {entry['answer']!r} now and had {gold!r} when the dataset was made. "
            "The task draws differently in this process: set PYTHONHASHSEED=0, or another version is installed."
        )
    stated = stated_answer(text, gold)
    if not stated:
        return 0.0
    try:
        score = float(entries.score_answer(stated, entry))
    except (
        Exception
    ) as error:  # verifiers parse what they get, and what a model writes may not parse
        logger.warning_once(
            f"A verifier of reasoning_gym raised {type(error).__name__} ({error}): such answers get 0."
        )
        return 0.0
    contained = (
        gold is not None
        and is_number(gold)
        and gold in stated
        and score == len(gold) / len(stated) < 1
    )
    return 0.0 if contained else score


def stated_answer(text: str, gold: str | None) -> str:
    """The answer in `text`: what the last <answer> tags hold, else the last number where the right answer is a number,
    else all of it.  "" where there is none."""
    tagged = re.findall(r"<answer>(.*?)</answer>", text, re.DOTALL)
    if tagged:
        return tagged[-1].strip()
    if gold is not None and is_number(gold):
        numbers = NUMBER.findall(text)
        return numbers[-1].replace(",", "").replace("−", "-") if numbers else ""
    return text.strip()


def bare_number(completions: Sequence[Completion]) -> list[float]:
    """1 where the completion is a number and nothing else (white space aside), right or wrong; else 0.

    A small weight beside a verifier (`reward_weights: [1.0, 0.2]`) tells a model that answers in sentences, and runs
    out of tokens, what form is wanted.  It does not ask whether the number is right: keep its weight well below the
    verifier's.
    """
    return [float(is_number(completion_text(completion).strip())) for completion in completions]


def is_number(text: str) -> bool:
    return NUMBER.fullmatch(text) is not None
