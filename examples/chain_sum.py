"""The demo's task: reasoning-gym's `chain_sum` with two numbers of one or two digits."""

import re
from collections.abc import Sequence
from typing import Any

from gmpo.reward.reasoning_gym import task_rows

TASK = "chain_sum"
SIZES = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 2}
# Entry i of seed s is drawn from s + i, so seeds that are close share entries.
HELD_OUT_SEED = 10**9

# A minus right after a digit subtracts, as in 12-4.
_NUMBER = re.compile(r"(?<![\d.])-?\d+(?!\.?\d)")


def held_out(count: int) -> list[dict[str, Any]]:
    """Return `count` different problems to measure on, the same for every run."""
    rows = task_rows(TASK, SIZES | {"seed": HELD_OUT_SEED, "size": 4 * count + 100})
    return list({row["prompt"]: row for row in rows}.values())[:count]


def training_rows(
    count: int, *, seed: int, without: Sequence[dict[str, Any]]
) -> list[dict[str, Any]]:
    """Return `count` rows to train on, with no question of `without`.

    Questions may repeat: only 200 have one digit.
    """
    measured = {row["prompt"] for row in without}
    rows = task_rows(TASK, SIZES | {"seed": seed * 10**6, "size": 2 * count})
    return [row for row in rows if row["prompt"] not in measured][:count]


def exact(completion: str, answer: str) -> bool:
    """Return whether the answer is all that the completion says."""
    return completion.strip() == answer


def found(completion: str, answer: str) -> bool:
    """Return whether the right number stands anywhere in the completion."""
    return answer in _NUMBER.findall(completion)


def verifier(completions: Sequence[Any], answer: Sequence[str]) -> list[float]:
    """Return the score of reasoning-gym's own verifier for each completion as it stands.

    The right number and nothing else gets 1.  A sentence that holds it gets the share of its
    characters that belong to the number, so shorter answers get more.
    """
    from reasoning_gym import get_score_answer_fn

    score = get_score_answer_fn(TASK)
    texts = [
        completion if isinstance(completion, str) else completion[-1]["content"]
        for completion in completions
    ]
    return [
        float(score(answer=text, entry={"answer": gold}))
        for text, gold in zip(texts, answer, strict=True)
    ]
