"""Check what a source answered: one number or None for each completion."""

import itertools
import math
import numbers
from collections.abc import Iterable, Mapping
from typing import Any

LARGEST = float.fromhex("0x1.fffffep127")  # of float32
_ENOUGH = 1_000_000  # of an endless answer


def as_scores(name: str, answer: Any, expected: int) -> list[float]:
    """Return `expected` floats from what source `name` answered; NaN stands for None.

    Raises:
        ValueError: For another number of scores, or one that is neither None nor a finite number.
    """
    if hasattr(answer, "detach"):  # a tensor, which may be on a GPU or carry a gradient
        answer = answer.detach().cpu()
    one_per_row = isinstance(answer, Iterable) and not isinstance(
        answer, str | bytes | Mapping | set | frozenset
    )
    if not one_per_row or getattr(answer, "ndim", 1) == 0:
        hint = " Does it return at all?" if answer is None else ""
        raise ValueError(
            f"Reward {name!r} returned {short(answer)} ({type(answer).__name__}) instead of a list "
            f"of {expected} scores, one per completion.{hint}"
        )

    values = list(itertools.islice(answer, max(expected + 1, _ENOUGH)))
    if len(values) != expected:
        raise ValueError(
            f"Reward {name!r} returned {len(values)} scores for {expected} completions. Return one "
            "per completion, None for those that it can't score."
        )
    return [_as_score(name, row, value) for row, value in enumerate(values)]


def as_number(value: Any) -> float | None:
    """Return `value` as a float; None if it isn't a number.

    None becomes NaN, and an integer beyond all floats infinity.  A tensor or array counts if it
    holds one number.
    """
    if value is None:
        return math.nan
    if hasattr(value, "item") and hasattr(value, "shape"):
        if math.prod(value.shape) != 1:
            return None
        value = value.item()
    try:
        return float(value) if isinstance(value, numbers.Real) else None
    except OverflowError:
        return math.inf


def short(value: object, length: int = 200) -> str:
    """Return `value` as text of about `length` characters, for a message."""
    text = repr(value)
    return text if len(text) <= length else f"{text[:length]}..."


def _as_score(name: str, row: int, value: object) -> float:
    number = as_number(value)
    if number is None:
        raise ValueError(
            f"Reward {name!r} returned {short(value)} ({type(value).__name__}) for completion "
            f"{row}. Return a number, or None where it can't score."
        )
    if abs(number) > LARGEST:
        raise ValueError(
            f"Reward {name!r} returned {short(value)} for completion {row}. Return a finite "
            "number, or None."
        )
    return number
