"""Decide whether a mathematical answer is right, by math-verify, in worker processes.

A completion like \\boxed{9^{9^{9^{9}}}} keeps sympy busy for ever, or takes all memory.
math-verify's own time limit is an alarm signal: it works on the main thread only, and takes the
alarm away from everyone else.  So answers are judged in the pool, each within a limit of CPU time.
"""

import functools
import importlib.util
import logging
import re
from collections.abc import Sequence
from typing import Any

from gmpo.reward.pool import Cancellation, Limits, Outcome, pack, shared_pool
from gmpo.reward.text import last_boxed

logger = logging.getLogger(__name__)

LIMITS = Limits(wall_s=120.0, cpu_s=5.0, memory_bytes=4 * 2**30)
_PATIENCE_S = 1.0  # another worker starts only when the others are busy for this long

_DELIMITER = re.compile(r"(?<!\\)\$|\\boxed|\\\(|\\\[")  # of LaTeX within text
_TEXT_COMMAND = re.compile(r"\\(?:text\w*|mbox|mathrm)\s*\{[^{}]*\}")
_PROSE = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{2,}\s+[A-Za-z]{2,}")  # two words
_BASE = re.compile(r"(?<![A-Za-z\d])\d[0-9A-F]*\s*_\s*\{?\s*(\d+)")
_UNIT_POWER = re.compile(
    r"(?:\\(?:text\w*|mbox|mathrm)\s*\{[^{}\d]*\}"
    r"|\b(?:[munck]?m|in|inches|ft|feet|yd|miles?|meters?|units?))\s*\^\s*\{?\s*(\d)"
)


def verdicts(questions: Sequence[tuple[str, str]], *, limits: Limits = LIMITS) -> list[bool | None]:
    """Return for each (gold, text) True if the text gives the gold answer.

    None stands for a gold answer that can't be read.
    What is not decided within the limits is taken for wrong, with a warning.

    Raises:
        ImportError: If math-verify is not installed.
    """
    if not questions:
        return []
    require_math_verify()
    judge, pool, cancellation = pack(Judge()), shared_pool(), Cancellation()

    # A policy may well give one answer many times.
    futures = {}
    for question in dict.fromkeys(questions):
        futures[question] = pool.submit(
            judge, *question, limits=limits, patience_s=_PATIENCE_S, cancellation=cancellation
        )
    try:
        answers = {
            question: _verdict(question, future.result()) for question, future in futures.items()
        }
    finally:
        cancellation.cancel()
    return [answers[question] for question in questions]


def verdict(gold: str, text: str, *, limits: Limits = LIMITS) -> bool | None:
    """Return whether `text` gives the answer `gold`; None if `gold` is not mathematics."""
    return verdicts([(gold, text)], limits=limits)[0]


def require_math_verify() -> None:
    """Raise an ImportError that says what to install, unless math-verify is there."""
    if importlib.util.find_spec("math_verify") is None:
        raise ImportError(
            "The reward 'accuracy' needs math-verify. Install it with: pip install 'gmpo[math]'."
        )


def _verdict(question: tuple[str, str], outcome: Outcome) -> bool | None:
    if outcome.error is not None or outcome.unloadable:
        raise RuntimeError(f"math-verify could not be run: {outcome.error or outcome.lost}")
    if outcome.lost is not None:
        logger.warning(
            "math-verify gave no verdict (%s); taken for wrong: %r",
            outcome.lost,
            question[1][-200:],
        )
        return False
    return outcome.value


# -- in the worker ---------------------------------------------------------------------------------


class Judge:
    """Verifies answers, for as long as each takes."""

    def prepare(self) -> None:
        """Import math-verify, so that the first answer's time is its own."""
        logging.disable()  # math-verify warns that its alarms are off
        import math_verify  # noqa: F401

    def __call__(self, gold: str, text: str) -> bool | None:
        return is_right(gold, text)


def is_right(gold: str, text: str) -> bool | None:
    """Return whether `text` gives `gold`; None if `gold` is not mathematics.  May take for ever."""
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

    expected = parsed_gold(gold)
    if not expected:
        return None
    try:
        targets = (LatexExtractionConfig(boxed_match_priority=0), ExprExtractionConfig())
        answer = parse(text, targets, parsing_timeout=0)
        right = bool(verify(list(expected), answer, timeout_seconds=0))
    except Exception:  # whatever a parser makes of what a policy writes, it is not the answer
        return False
    return right and not differs_in_base_or_unit(gold, text)


def differs_in_base_or_unit(gold: str, text: str) -> bool:
    """Return True if both name a number base, or a unit's power, and name different ones.

    math-verify looks at neither.

    Example:
        "52_8" and "52_9", "15\\text{ cm}^2" and "15\\text{ cm}^3" differ; "52_8" and "52" don't
    """
    boxed = last_boxed(text)
    answer = text if boxed is None else boxed
    for pattern in (_BASE, _UNIT_POWER):
        ours, theirs = pattern.findall(gold), pattern.findall(answer)
        if ours and theirs and ours[-1] != theirs[-1]:
            return True
    return False


@functools.lru_cache(maxsize=4096)
def parsed_gold(gold: str) -> tuple[Any, ...]:
    """Return what math-verify reads in `gold`: LaTeX or a plain expression; () if nothing.

    LaTeX may come with or without its delimiters.
    """
    from math_verify import parse

    as_it_is = _DELIMITER.search(gold) or _PROSE.search(_TEXT_COMMAND.sub("", gold))
    try:
        # Without delimiters math-verify takes \frac{1}{2} for the number 2, and between them prose
        # for a product.
        between = [] if as_it_is else parse(f"${gold}$", parsing_timeout=0)
        return tuple(between or parse(gold, parsing_timeout=0))
    except Exception:
        return ()
