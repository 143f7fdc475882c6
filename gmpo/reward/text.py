"""Read completions and gold answers: their text, what follows a thought, and numbers."""

import re
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any

Completion = str | Sequence[Mapping[str, Any]]

# Digits, perhaps with thousands separators, decimals, an exponent or a denominator.
# The look-behind keeps it out of words and of other numbers.
_DIGITS = r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)"
_EXPONENT = r"(?:[eE][-+−]?\d+(?!\w))"
NUMBER = re.compile(
    rf"(?<![\w.])[-+−]?(?:{_DIGITS}(?:\.\d+)?|\.\d+){_EXPONENT}?(?:/\d+)?",
)

_MIXED = re.compile(
    r"(?:(?<![\w.])(\d+)\s*)?\\[dt]?frac\s*"
    r"(?:\{\s*(\d+)\s*\}|(\d))\s*(?:\{\s*(\d+)\s*\}|(\d))"
)
_POWER_OF_TEN = re.compile(
    r"(?:(\d)\s*(?:\\times|\\cdot|×|\*)\s*10|(?<![\w.])10)"
    r"\s*\^\s*(?:\{\s*([-−]?\d+)\s*\}|([-−]?\d+))"
)
_THIN_SPACE = re.compile(r"\\[!,]\s*")
_POWER_OF_UNIT = re.compile(r"(\\(?:text|mathrm|mbox)\s*\{[^{}\d]*\})\s*\^\s*\{?\d\}?")
_UNIT = (
    r"(?:\\?%|\\?\$|€|£|°|\^\s*\{?\s*\\circ\s*\}?"
    r"|\\(?:text|mathrm|mbox)\s*\{[^{}\d]*\}(?:\s*\^\s*\{?\d\}?)?"
    r"|[^\W\d_]{2,}(?:\s[^\W\d_]{2,}){0,2}(?:\s*\^\s*\{?\d\}?)?)"
)
_WHOLE_NUMBER = re.compile(
    rf"(?:[A-Za-z]\s*=\s*)?(?:\\?\$|€|£)?\s*({NUMBER.pattern})\s*{_UNIT}?\s*\.?"
)
_LARGEST_EXPONENT = 1000  # beyond it the exact fraction would fill the memory


def completion_text(completion: Completion, opened: str = "") -> str:
    """Return the text of a completion; for a conversation, the text of its last assistant message.

    Args:
        opened: What the prompt already holds of the model's turn, such as "<think>\\n".
    """
    if isinstance(completion, str):
        return opened + completion

    for number in reversed(range(len(completion))):
        message = completion[number]
        if message.get("role", "assistant") == "assistant":
            begun = opened if number == 0 else ""
            return begun + content_text(message.get("content"))
    return ""


def content_text(content: Any) -> str:
    """Return the text of a message's content, which may be a list of blocks."""
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    return "".join(block.get("text", "") for block in content if block.get("type") == "text")


def answer_text(completion: Completion, opened: str = "") -> str:
    """Return what follows the last </think>: everything without tags, "" if a thought never ended.

    Args:
        opened: What the prompt already holds of the model's turn; it may begin the thought.
    """
    text = completion_text(completion, opened)
    still_thinking = "<think>" in text and "</think>" not in text
    return "" if still_thinking else text.rpartition("</think>")[2]


def texts_opened(opened: Sequence[str] | None, number: int) -> Sequence[str]:
    """Return `opened`, or as many empty texts if there is none."""
    return [""] * number if opened is None else opened


def gold_answers(
    reward: str, answer: Sequence[Any] | None, solution: Sequence[Any] | None
) -> list[str | None]:
    """Return the gold answer of each row as text: `answer`, else `solution`, else None.

    Of a text with "####" (GSM8K) it is what follows.
    """
    if answer is None and solution is None:
        raise ValueError(
            f"The reward {reward!r} needs the gold answer in a dataset column 'answer' or "
            "'solution'."
        )
    columns = [column for column in (answer, solution) if column is not None]

    golds: list[str | None] = []
    for values in zip(*columns, strict=True):
        value = next((value for value in values if value is not None), None)
        golds.append(None if value is None else str(value).rpartition("####")[2].strip())
    return golds


def final_number(text: str) -> Fraction | None:
    """Return the last number in the last \\boxed{}, else after the last "####", else in the text.

    None if there is no number there.
    """
    boxed = last_boxed(text)
    place = text.rpartition("####")[2] if boxed is None else boxed
    found = NUMBER.findall(plain_numbers(place))
    return as_fraction(found[-1]) if found else None


def whole_number(text: str) -> Fraction | None:
    """Return the number that `text` is, perhaps with a unit, a currency or in a box; else None.

    Example:
        "10{,}000" -> 10000, "$18", "18 dollars" -> 18, "2\\pi", "(3, 4)" -> None
    """
    boxed = last_boxed(text)
    inner = (text if boxed is None else boxed).strip()
    for opening, closing in (("$", "$"), ("\\(", "\\)"), ("\\[", "\\]")):
        wrapped = len(inner) > len(opening + closing)
        if wrapped and inner.startswith(opening) and inner.endswith(closing):
            inner = inner[len(opening) : -len(closing)].strip()

    match = _WHOLE_NUMBER.fullmatch(plain_numbers(inner))
    return as_fraction(match[1]) if match else None


def plain_numbers(text: str) -> str:
    """Return `text` with LaTeX's ways to write a number replaced by plain ones.

    Example:
        "10{,}000" -> "10,000", "1\\frac12" -> "3/2", "3 \\times 10^5" -> "3e5"
    """
    text = _THIN_SPACE.sub("", text.replace("{,}", ","))
    text = _POWER_OF_UNIT.sub(r"\1", text)
    text = _MIXED.sub(_plain_fraction, text)
    return _POWER_OF_TEN.sub(_plain_power, text)


def as_fraction(number: str) -> Fraction | None:
    """Return a match of `NUMBER` as an exact number; None for a denominator of 0 or a huge one."""
    text = number.replace(",", "").replace("−", "-")
    numerator, _, denominator = text.partition("/")
    exponent = re.split("[eE]", numerator)[1:]
    try:
        if exponent and abs(int(exponent[0])) > _LARGEST_EXPONENT:
            return None
        return Fraction(numerator) / int(denominator or 1)
    except (ValueError, ZeroDivisionError):
        return None


def last_boxed(text: str) -> str | None:
    """Return what the last \\boxed{...} holds, with its braces balanced; None if there is none."""
    start = text.rfind("\\boxed{")
    if start < 0:
        return None

    depth = 0
    for i in range(start + len("\\boxed"), len(text)):
        depth += {"{": 1, "}": -1}.get(text[i], 0)
        if depth == 0:
            return text[start + len("\\boxed{") : i]
    return None


def _plain_fraction(match: re.Match[str]) -> str:
    whole, numerator, denominator = match[1], match[2] or match[3], match[4] or match[5]
    if whole is None:
        return f"{numerator}/{denominator}"
    if max(len(whole), len(numerator), len(denominator)) > 100:
        return match[0]
    return f"{int(whole) * int(denominator) + int(numerator)}/{denominator}"


def _plain_power(match: re.Match[str]) -> str:
    exponent = match[2] or match[3]
    return f"{match[1] or '1'}e{exponent}"
