"""What rewards read in completions and gold answers."""

import re
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any

# Digits, perhaps with thousands separators, a fraction part or a denominator.  Not within a word or another number.
_NUMBER = re.compile(r"(?<![\w.])[-+−]?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)?(?:\.\d+)?(?<=\d)(?:/\d+)?")


_FRACTION = re.compile(r"\\[dt]?frac\s*\{\s*(\d+)\s*\}\s*\{\s*(\d+)\s*\}")


Completion = str | Sequence[Mapping[str, Any]]


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


def answer_text(completion: Completion) -> str:
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
