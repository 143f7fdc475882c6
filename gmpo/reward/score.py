"""Ask every source about the completions of this rank.

A source may be slow, wait for other processes, or fail: asynchronous ones run beside all others, a warning says who is
being waited for, and an exception keeps its type and says which source raised it.  Ranks are the caller's concern.
"""

import asyncio
import concurrent.futures
import functools
import inspect
import logging
import math
import numbers
import os
import threading
from collections.abc import Awaitable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from gmpo.reward.sources import columns_of
from gmpo.reward.types import RewardCall, RewardSource
from gmpo.types import Rollout

logger = logging.getLogger(__name__)

_LARGEST = torch.finfo(torch.float32).max
_warned_of_unscored: set[tuple[str, ...]] = set()


@dataclass(slots=True)
class Scored:
    """What the sources said about the N completions of this rank."""

    rewards: Tensor  # [N, F] float64 on the CPU; NaN: not scored
    extra: dict[str, list[Any]] = field(default_factory=dict)  # column -> N values, from log_extra
    metrics: dict[str, tuple[float, float]] = field(
        default_factory=dict
    )  # name -> (sum, count), from log_metric

    def replaced(self, places: Sequence[int], other: "Scored") -> "Scored":
        """With what `other` says of its completions at `places`; metrics are of everything that was scored."""
        rewards = self.rewards.clone()
        rewards[list(places)] = other.rewards
        nothing = [None] * len(rewards)
        extra = {
            name: list(self.extra.get(name, nothing)) for name in {**self.extra, **other.extra}
        }
        for name, values in extra.items():
            for place, value in zip(places, other.extra.get(name, nothing), strict=False):
                values[place] = value
        metrics = dict(self.metrics)
        for name, (total, count) in other.metrics.items():
            known = metrics.get(name, (0.0, 0.0))
            metrics[name] = (known[0] + total, known[1] + count)
        return Scored(rewards, extra, metrics)


def score(
    sources: Sequence[RewardSource],
    rollouts: Sequence[Rollout],
    rows: Sequence[Mapping[str, Any]],
    *,
    trainer_state: Any = None,
    patience_s: float = 60.0,
) -> Scored:
    """Rewards of `rollouts` from every source.

    Asynchronous sources run concurrently on an event loop in a thread of its own, whether or not the caller has one;
    the others run in order on the calling thread.

    Args:
        rows: The dataset row of each rollout; sources get its columns beside prompt and completion.
        trainer_state: Passed on to functions.
        patience_s: Seconds between two warnings that asynchronous sources have not answered.

    Raises:
        ValueError: If a source answers with anything but a finite number or None for each rollout.
        Exception: What a source raises, with a note that names it.
    """
    remarks = [Remarks(source.name, len(rollouts)) for source in sources]
    if not rollouts:
        return Scored(torch.empty(0, len(sources), dtype=torch.float64))
    columns = columns_of(rows)
    calls = [
        RewardCall(rollouts, columns, trainer_state, remark.log_extra, remark.log_metric)
        for remark in remarks
    ]
    answers = _answers(sources, calls, patience_s)
    scores = []
    for source, call, answer in zip(sources, calls, answers, strict=True):
        with _named(source, call):  # a generator runs only now
            scores.append(as_scores(source.name, answer, len(rollouts)))
    rewards = torch.tensor(scores, dtype=torch.float64).T.contiguous()
    _warn_of_unscored(sources, rewards, rollouts, columns)
    return _merged(rewards, remarks)


def as_scores(name: str, answer: Any, expected: int) -> list[float]:
    """`expected` floats from what source `name` answered; NaN for None.

    Raises:
        ValueError: For another number of scores, or one that is neither None nor a finite number.
    """
    answer = answer.detach().cpu() if isinstance(answer, Tensor) else answer
    one_per_row = isinstance(answer, Iterable) and not isinstance(
        answer, str | bytes | Mapping | set | frozenset
    )
    if not one_per_row or getattr(answer, "ndim", 1) == 0:
        hint = " Does it return at all?" if answer is None else ""
        raise ValueError(
            f"Reward {name!r} returned {_short(answer)} ({type(answer).__name__}) instead of a list of {expected} "
            f"scores, one per completion.{hint}"
        )
    values = list(answer)
    if len(values) != expected:
        raise ValueError(
            f"Reward {name!r} returned {len(values)} scores for {expected} completions. Return one per completion, "
            "None for those that it can't score."
        )
    return [_as_score(name, row, value) for row, value in enumerate(values)]


@dataclass(slots=True)
class Remarks:
    """What one source leaves in the log beside its scores."""

    name: str
    num_rows: int
    extra: dict[str, list[Any]] = field(default_factory=dict)
    metrics: dict[str, tuple[float, float]] = field(default_factory=dict)

    def log_extra(self, column: str, values: Sequence[Any]) -> None:
        """A column, one value per completion, for the table of completions."""
        values = list(values)
        if len(values) != self.num_rows:
            raise ValueError(
                f"Reward {self.name!r} called log_extra({column!r}, ...) with {len(values)} values for {self.num_rows} "
                "completions. Pass one value per completion."
            )
        self.extra[column] = values

    def log_metric(self, name: str, value: float) -> None:
        """A number to average over all calls and ranks until the next log; NaN and None are left out."""
        number = _number(value)
        if number is None or math.isinf(number):
            raise ValueError(
                f"Reward {self.name!r} called log_metric({name!r}, {value!r}), which is no finite number."
            )
        if not math.isnan(number):
            total, count = self.metrics.get(name, (0.0, 0.0))
            self.metrics[name] = (total + number, count + 1.0)


def _answers(
    sources: Sequence[RewardSource], calls: Sequence[RewardCall], patience_s: float
) -> list[Any]:
    """What each source returned or came to; asynchronous ones are started before the others."""
    answers: dict[int, Any] = {}
    waiting: dict[concurrent.futures.Future[Any], int] = {}
    try:
        for i in sorted(range(len(sources)), key=lambda i: not sources[i].asynchronous):
            with _named(sources[i], calls[i]):
                answer = sources[i].score(calls[i])
            if inspect.isawaitable(answer):
                waiting[asyncio.run_coroutine_threadsafe(_awaited(answer), event_loop())] = i
            else:
                answers[i] = answer
        for future in _finished(waiting, sources, patience_s):
            i = waiting[future]
            with _named(sources[i], calls[i]):
                answers[i] = future.result()
    finally:
        for future in waiting:
            future.cancel()
    return [answers[i] for i in range(len(sources))]


def _finished(
    waiting: Mapping[concurrent.futures.Future[Any], int],
    sources: Sequence[RewardSource],
    patience_s: float,
) -> Iterator[concurrent.futures.Future[Any]]:
    """The futures as they finish, with a warning each time that none has for `patience_s`."""
    pending = set(waiting)
    while pending:
        done, pending = concurrent.futures.wait(
            pending, patience_s, concurrent.futures.FIRST_COMPLETED
        )
        if not done:
            names = ", ".join(sorted(sources[waiting[future]].name for future in pending))
            logger.warning("No answer for %g s from: %s. Still waiting.", patience_s, names)
        yield from done


async def _awaited(answer: Awaitable[Any]) -> Any:
    return await answer


def event_loop() -> asyncio.AbstractEventLoop:
    """A running event loop in a thread of this process, the same for all calls, so that connections may be kept."""
    return _event_loop_of(os.getpid())  # a forked process has none of its parent's threads


@functools.cache
def _event_loop_of(process: int) -> asyncio.AbstractEventLoop:
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="rewards", daemon=True).start()
    return loop


@contextmanager
def _named(source: RewardSource, call: RewardCall) -> Iterator[None]:
    """Let an exception say which source raised it, and for what."""
    try:
        yield
    except Exception as error:
        first = call.rollouts[0]
        error.add_note(
            f"Raised by the reward {source.name!r} for {len(call.rollouts)} completions. The first: "
            f"prompt {_short(first.prompt.source)}, completion {_short(first.completion)}."
        )
        raise


def _as_score(name: str, row: int, value: Any) -> float:
    number = _number(value)
    if number is None:
        raise ValueError(
            f"Reward {name!r} returned {_short(value)} ({type(value).__name__}) for completion {row}. "
            "Return a number, or None where it can't score."
        )
    if abs(number) > _LARGEST:
        raise ValueError(
            f"Reward {name!r} returned {value!r} for completion {row}. Return a finite number, or None."
        )
    return number


def _number(value: Any) -> float | None:
    """`value` as a float, NaN for None; None if it is no number.  A tensor or array counts if it holds one number."""
    if value is None:
        return math.nan
    if hasattr(value, "item") and hasattr(value, "shape"):
        if math.prod(value.shape) != 1:
            return None
        value = value.item()
    try:
        return float(value) if isinstance(value, numbers.Real) else None
    except OverflowError:  # an int beyond all floats
        return math.inf


def _merged(rewards: Tensor, remarks: Sequence[Remarks]) -> Scored:
    result = Scored(rewards)
    for remark in remarks:
        for column, values in remark.extra.items():
            # Two sources may use one name: the later one's column then says whose it is.
            result.extra[f"{remark.name}/{column}" if column in result.extra else column] = values
        for name, (total, count) in remark.metrics.items():
            old_total, old_count = result.metrics.get(name, (0.0, 0.0))
            result.metrics[name] = (old_total + total, old_count + count)
    return result


def _warn_of_unscored(
    sources: Sequence[RewardSource],
    rewards: Tensor,
    rollouts: Sequence[Rollout],
    columns: Mapping[str, list[Any]],
) -> None:
    unscored = rewards.isnan().all(dim=1).nonzero().flatten().tolist()
    names = tuple(source.name for source in sources)
    if not unscored or names in _warned_of_unscored:
        return
    _warned_of_unscored.add(names)
    row, rollout = unscored[0], rollouts[unscored[0]]
    logger.warning(
        "No reward scored %d of %d completions (%s all gave None). Such completions get the advantage 0. The first: "
        "prompt %s, completion %s, columns %s. This is said once.",
        *(
            len(unscored),
            len(rollouts),
            ", ".join(names),
            _short(rollout.prompt.source),
            _short(rollout.completion),
        ),
        _short({name: values[row] for name, values in columns.items()}),
    )


def _short(value: Any, length: int = 200) -> str:
    text = repr(value)
    return text if len(text) <= length else f"{text[:length]}..."
