"""Rewards that have a name: called like a user's function, picklable, with settings as fields.

Each accepts further keywords, so that it can be called inside another reward with everything that
one got.  `by_name.py` holds the table of their names.  They stay in the training process, also
with reward_workers (`in_process`): they are quick, or judge in worker processes themselves.
"""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from gmpo.reward import math_judge
from gmpo.reward.text import (
    Completion,
    answer_text,
    completion_text,
    final_number,
    gold_answers,
    texts_opened,
    whole_number,
)

RewardFunction = Callable[..., Any]


@dataclass(frozen=True)
class Accuracy:
    """1 where a completion gives the right mathematical answer, else 0; None for unreadable golds.

    math-verify compares, so 0.5 equals \\frac{1}{2}.  A \\boxed{} answer wins over other
    mathematics in the text.  A thought does not count.  What can't be verified in 5 s of CPU time
    is wrong.

    Args:
        delimiters: The answer follows the last of these; a completion without one is wrong.  None
            takes what follows </think>, or everything where no thought was begun.
    """

    delimiters: Sequence[str] | None = None
    __name__ = "accuracy"
    uses_pool = True
    in_process = True
    needs_any_column = ("answer", "solution")

    def __call__(
        self,
        completions: Sequence[Completion],
        answer: Sequence[Any] | None = None,
        solution: Sequence[Any] | None = None,
        opened: Sequence[str] | None = None,
        **_: Any,
    ) -> list[float | None]:
        """Judge each completion.

        Args:
            answer, solution: Columns with the gold answer, as LaTeX or text; `answer` where a row
                has both.  In text with "####" (GSM8K) it is what follows.
            opened: What each prompt already holds of the model's turn.

        Raises:
            ImportError: If math-verify is not installed (`pip install 'gmpo[math]'`).
            ValueError: If the dataset has neither column.
        """
        golds = gold_answers("accuracy", answer, solution)
        begun = texts_opened(opened, len(completions))
        texts = [self._answer(*pair) for pair in zip(completions, begun, strict=True)]

        graded = [row for row, gold in enumerate(golds) if gold is not None]
        questions = [(str(golds[row]), texts[row]) for row in graded]
        rewards: list[float | None] = [None] * len(golds)
        for row, verdict in zip(graded, math_judge.verdicts(questions), strict=True):
            rewards[row] = None if verdict is None else float(verdict)
        return rewards

    def _answer(self, completion: Completion, opened: str) -> str:
        if self.delimiters is None:
            return answer_text(completion, opened)
        text = completion_text(completion, opened)
        ends = [text.rfind(mark) + len(mark) for mark in self.delimiters if mark in text]
        return text[max(ends) :] if ends else ""


@dataclass(frozen=True)
class NumberMatch:
    """1 where the final number of a completion equals the gold answer exactly, else 0.

    The final number is the last one in the last \\boxed{}, else after "####", else in the text;
    1,000 and 1000.0 are equal, 1/2 and 0.5 too.  None where the gold answer is not a number (it may
    have a unit).  Needs no other package and is more than ten times as fast as `accuracy`: the
    right choice for answers like GSM8K's.
    """

    __name__ = "number_match"
    in_process = True
    needs_any_column = ("answer", "solution")

    def __call__(
        self,
        completions: Sequence[Completion],
        answer: Sequence[Any] | None = None,
        solution: Sequence[Any] | None = None,
        opened: Sequence[str] | None = None,
        **_: Any,
    ) -> list[float | None]:
        """Compare each completion; the columns are those of `accuracy`."""
        golds = gold_answers("number_match", answer, solution)
        begun = texts_opened(opened, len(completions))

        rewards: list[float | None] = []
        for gold, completion, start in zip(golds, completions, begun, strict=True):
            number = None if gold is None else whole_number(gold)
            if number is None:
                rewards.append(None)
            else:
                rewards.append(float(final_number(answer_text(completion, start)) == number))
        return rewards


@dataclass(frozen=True)
class ThinkFormat:
    """1 where a completion is one thought between its tags and what follows it, else 0.

    Nothing but white space may come before, and neither tag a second time.  Where the prompt has
    opened the tag already, the completion goes on from there.

    Args:
        opening, closing: The tags.
    """

    opening: str = "<think>"
    closing: str = "</think>"
    __name__ = "think_format"
    in_process = True
    _pattern: re.Pattern[str] = field(init=False, repr=False, compare=False)

    def __post_init__(self):
        if not self.opening or not self.closing:
            raise ValueError("think_format must have an opening and a closing tag, not ''.")
        opening, closing = re.escape(self.opening), re.escape(self.closing)
        untagged = f"(?:(?!{opening}|{closing}).)*"
        pattern = re.compile(f"{opening}{untagged}{closing}{untagged}", re.DOTALL)
        object.__setattr__(self, "_pattern", pattern)

    def __call__(
        self,
        completions: Sequence[Completion],
        opened: Sequence[str] | None = None,
        **_: Any,
    ) -> list[float]:
        rewards = []
        for completion, start in zip(
            completions, texts_opened(opened, len(completions)), strict=True
        ):
            text = completion_text(completion, start).lstrip()
            rewards.append(float(self._pattern.fullmatch(text) is not None))
        return rewards


@dataclass(frozen=True)
class SoftOverlongPunishment:
    """0 up to max_completion_length - cache tokens, falling to -1 at max_completion_length.

    Source: arXiv:2503.14476 (DAPO), equation 13.

    Args:
        max_completion_length: Tokens at which the punishment is full.
        cache: Tokens over which it grows; with 0 it sets in at once.
    """

    max_completion_length: int
    cache: int
    __name__ = "soft_overlong_punishment"
    in_process = True

    def __post_init__(self):
        if not 0 <= self.cache <= self.max_completion_length:
            raise ValueError(
                f"cache={self.cache} must lie between 0 and "
                f"max_completion_length={self.max_completion_length}."
            )

    def __call__(self, completion_ids: Sequence[Sequence[int]], **_: Any) -> list[float]:
        return [self._punishment(len(ids)) for ids in completion_ids]

    def _punishment(self, length: int) -> float:
        free = self.max_completion_length - self.cache
        if length <= free:
            return 0.0
        if length >= self.max_completion_length:
            return -1.0
        return (free - length) / self.cache


@dataclass(frozen=True)
class Repetition:
    """max_penalty * (1 - distinct n-grams / n-grams); 0 for completions shorter than an n-gram.

    Source: arXiv:2502.03373, appendix C.2.

    Args:
        ngram_size: Tokens (or words) in an n-gram.
        max_penalty: What a completion of nothing but repetition gets; at most 0.
        unit: "tokens" counts n-grams of token ids; "words" counts those of lower-case words.

    Example:
        ngram_size 2, tokens [5, 5, 5, 5, 5] -> 4 n-grams, 1 distinct -> -0.75
    """

    ngram_size: int = 3
    max_penalty: float = -1.0
    unit: str = "tokens"
    __name__ = "repetition"
    in_process = True

    def __post_init__(self):
        if self.ngram_size < 1:
            raise ValueError(f"ngram_size={self.ngram_size} must be at least 1.")
        if self.max_penalty > 0:
            raise ValueError(
                f"max_penalty={self.max_penalty} would reward repetition. Use a number of at most "
                "0."
            )
        if self.unit not in ("tokens", "words"):
            raise ValueError(f"unit={self.unit!r} must be 'tokens' or 'words'.")

    def __call__(
        self,
        completions: Sequence[Completion] = (),
        completion_ids: Sequence[Sequence[int]] = (),
        **_: Any,
    ) -> list[float]:
        if self.unit == "tokens":
            return [self._penalty(ids) for ids in completion_ids]
        texts = [completion_text(completion) for completion in completions]
        return [self._penalty(text.lower().split()) for text in texts]

    def _penalty(self, items: Sequence[Any]) -> float:
        size = self.ngram_size
        ngrams = [tuple(items[i : i + size]) for i in range(len(items) - size + 1)]
        if not ngrams:
            return 0.0
        return self.max_penalty * (1 - len(set(ngrams)) / len(ngrams))


@dataclass(frozen=True)
class RepetitionPenalty(Repetition):
    """`repetition`, of lower-case words.

    Args:
        ngram_size: Words in an n-gram.
        max_penalty: What a completion of nothing but repetition gets; at most 0.
    """

    unit: str = field(default="words", init=False)
    __name__ = "repetition_penalty"
    in_process = True


@dataclass(frozen=True)
class Cosine:
    """Accuracy that depends on length: short right answers and long wrong ones get more.

    The value goes from its bound at 0 tokens to its bound at max_completion_length along half a
    cosine.  Correctness is what `accuracy` finds, with its columns.

    Source: arXiv:2502.03373, appendix C.1.

    Args:
        max_completion_length: Tokens beyond which nothing changes.
        short_right, long_right: A right answer at 0 and at max_completion_length tokens.
        short_wrong, long_wrong: A wrong answer at 0 and at max_completion_length tokens.
    """

    max_completion_length: int
    short_right: float = 1.0
    long_right: float = 0.5
    short_wrong: float = -1.0
    long_wrong: float = -0.5
    __name__ = "cosine"
    uses_pool = True
    in_process = True
    needs_any_column = ("answer", "solution")

    def __post_init__(self):
        if self.max_completion_length < 1:
            raise ValueError(
                f"max_completion_length={self.max_completion_length} must be at least 1."
            )

    def __call__(
        self,
        completions: Sequence[Completion],
        completion_ids: Sequence[Sequence[int]],
        answer: Sequence[Any] | None = None,
        solution: Sequence[Any] | None = None,
        opened: Sequence[str] | None = None,
        **_: Any,
    ) -> list[float | None]:
        verdicts = Accuracy()(completions, answer=answer, solution=solution, opened=opened)
        rewards: list[float | None] = []
        for right, ids in zip(verdicts, completion_ids, strict=True):
            rewards.append(None if right is None else self._value(bool(right), len(ids)))
        return rewards

    def _value(self, right: bool, length: int) -> float:
        short, long = self.short_wrong, self.long_wrong
        if right:
            short, long = self.short_right, self.long_right
        progress = min(length / self.max_completion_length, 1.0)
        return long + (short - long) * (1 + math.cos(math.pi * progress)) / 2


accuracy = Accuracy()
number_match = NumberMatch()
think_format = ThinkFormat()
