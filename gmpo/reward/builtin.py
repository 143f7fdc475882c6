"""Rewards that have a name, for the command line and for anyone: plain functions, called as a user's own would be.

`BUILTIN` holds those that work as they are, `FACTORIES` makes them with settings, `load_reward` finds either and the
functions of users' files and packages.
"""

import re
from collections.abc import Callable, Sequence
from typing import Any

from gmpo.reward.math_judge import shared_judge
from gmpo.reward.text import Completion, answer_text, completion_text, final_number, gold_answers

RewardFunction = Callable[..., Any]

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
        None if gold is None else _as_reward(verdict(gold, answer_text(completion)))
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
        None if gold is None else float(final_number(answer_text(completion)) == gold)
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


# -- what is read in texts ---------------------------------------------------------------------------------------------


def _as_reward(verdict: bool | None) -> float | None:
    return None if verdict is None else float(verdict)


# -- rewards by name ---------------------------------------------------------------------------------------------------
