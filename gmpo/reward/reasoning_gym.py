"""Tasks of reasoning_gym: their rows, and rewards that ask the task's own verifier.

A row carries what the verifier needs to draw the same entry again: the task, its settings and the
entry's number.
"""

import functools
import json
import logging
from collections.abc import Mapping, Sequence
from typing import Any

from gmpo.option import advice
from gmpo.reward.text import NUMBER, Completion, answer_text, completion_text, texts_opened

logger = logging.getLogger(__name__)

PREFIX = "reasoning_gym:"


def task_rows(task: str, settings: Mapping[str, Any] | None = None) -> list[dict[str, Any]]:
    """Return the entries of a task as rows.

    A row has `prompt` (the question), `answer`, `task`, `task_settings` and `task_index`.

    Args:
        settings: Of the task (`size`, `seed`, `max_terms`, ...).  Without `seed` it is 0, so that
            runs can be repeated.

    Raises:
        ImportError: If reasoning_gym is not installed.
        ValueError: If there is no such task, or it does not take the settings.
    """
    written = json.dumps({"seed": 0, **(settings or {})}, sort_keys=True)
    entries = entries_of(task, written)

    rows = []
    for index in range(len(entries)):
        entry = entries[index]
        row = {
            "prompt": entry["question"],
            "answer": None if entry["answer"] is None else str(entry["answer"]),
            "task": task,
            "task_settings": written,
            "task_index": index,
        }
        rows.append(row)
    return rows


def evaluation_settings(
    settings: Mapping[str, Any] | None, changes: Mapping[str, Any] | None
) -> dict[str, Any]:
    """Return settings that draw other entries than `settings` does.

    Entry i of seed s is entry i - 1 of seed s + 1: the seed must move by as much as there are
    entries.

    Example:
        {"seed": 3, "size": 10} draws from 3 to 12; the result, {"seed": 13, "size": 10}, from 13
    """
    base = dict(settings or {})
    return {**base, "seed": base.get("seed", 0) + base.get("size", 500), **(changes or {})}


@functools.lru_cache(maxsize=16)
def entries_of(task: str, settings: str) -> Any:
    """Return the task's dataset object; `settings` is a JSON object."""
    gym = require_reasoning_gym()
    if task not in gym.factory.DATASETS:
        hint = advice(task, gym.factory.DATASETS, prefix=PREFIX)
        raise ValueError(f"reasoning_gym has no task {task!r}.{hint}")
    try:
        return gym.create_dataset(task, **json.loads(settings))
    except (TypeError, AssertionError) as error:
        raise ValueError(f"The task {task!r} does not take {settings}: {error}.") from None


def require_reasoning_gym() -> Any:
    """Return the package; raise an ImportError that says what to install if it is not there."""
    try:
        import reasoning_gym
        import reasoning_gym.factory
    except ImportError as error:
        raise ImportError(
            f"The tasks need reasoning_gym: pip install 'gmpo[tasks]' ({error})."
        ) from None
    return reasoning_gym


# -- rewards ---------------------------------------------------------------------------------------


def reasoning_gym(
    completions: Sequence[Completion],
    answer: Sequence[str | None],
    task: Sequence[str],
    task_settings: Sequence[str],
    task_index: Sequence[int],
    opened: Sequence[str] | None = None,
    **_: Any,
) -> list[float]:
    """Return what the task's own verifier gives, in [0, 1], for the answer that is stated.

    The verifiers are made for a bare answer.  Given a sentence, most pay out the share of its
    characters that the right answer makes up, which is next to nothing ("The answer is 7." gets
    0.06), and some raise; so the answer is taken out of the text first (`stated_answer`).  For
    numbers that share is worse than nothing: "170" would get two thirds for a right answer of "70".
    It is not paid here; any other partial score of a verifier is.
    """
    begun = texts_opened(opened, len(completions))
    rows = zip(completions, begun, answer, task, task_settings, task_index, strict=True)
    return [
        verified(answer_text(completion, start), gold, entries_of(name, settings), index)
        for completion, start, gold, name, settings, index in rows
    ]


def verified(text: str, gold: str | None, entries: Any, index: int) -> float:
    """Return the verifier's score of entry `index` for the answer stated in `text`."""
    entry = entries[index]
    if gold is not None and str(entry["answer"]) != gold:
        raise ValueError(
            f"Entry {index} has the answer {entry['answer']!r} now and had {gold!r} when the "
            "dataset was made. The task draws differently in this process: set PYTHONHASHSEED=0, "
            "or another version is installed."
        )
    stated = stated_answer(text, gold)
    if not stated:
        return 0.0

    try:
        score = float(entries.score_answer(stated, entry))
    except Exception as error:  # verifiers parse, and what a model writes may not parse
        warn_once(
            f"A verifier of reasoning_gym raised {type(error).__name__} ({error}): such answers "
            "get 0."
        )
        return 0.0

    paid_for_containing = score == len(gold or "") / len(stated) < 1
    if gold is not None and is_number(gold) and gold in stated and paid_for_containing:
        return 0.0
    return score


def stated_answer(text: str, gold: str | None) -> str:
    """Return the answer in `text`; "" if there is none.

    It is what the last <answer> tags hold, else the last number where the right answer is a number,
    else the whole text.
    """
    end = text.rfind("</answer>")
    start = text.rfind("<answer>", 0, max(end, 0))
    if start >= 0:
        return text[start + len("<answer>") : end].strip()
    if gold is None or not is_number(gold):
        return text.strip()
    numbers = NUMBER.findall(text)
    return numbers[-1].replace(",", "").replace("−", "-") if numbers else ""


def bare_number(completions: Sequence[Completion], **_: Any) -> list[float]:
    """Return 1 where the completion is a number and nothing else, right or wrong; else 0.

    A small weight beside a verifier (`reward_weights: [1.0, 0.2]`) tells a model that answers in
    sentences, and runs out of tokens, what form is wanted.  It does not ask whether the number is
    right: keep its weight well below the verifier's.
    """
    return [float(is_number(completion_text(completion).strip())) for completion in completions]


def is_number(text: str) -> bool:
    """Return True if `text` is one number."""
    return NUMBER.fullmatch(text) is not None


@functools.cache
def warn_once(message: str) -> None:
    """Log a warning the first time that it is given."""
    logger.warning(message)
