"""Ask every source about the completions of this rank.

A source may be slow, wait for other processes, or fail.  Asynchronous ones run beside all others, a
warning says who is being waited for, and an exception keeps its type and says which source raised
it.  Ranks are the caller's concern.
"""

import asyncio
import concurrent.futures
import functools
import inspect
import logging
import math
import os
import threading
import time
from collections.abc import Awaitable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gmpo.reward.answers import as_number, as_scores, short
from gmpo.reward.functions import FunctionReward
from gmpo.reward.sources import columns_of
from gmpo.reward.types import RewardCall, RewardSource
from gmpo.types import Rollout, is_reserved_figure

if TYPE_CHECKING:
    from transformers import TrainerState

logger = logging.getLogger(__name__)

_ALIVE_S = 1.0  # for the event loop to show that nobody blocks it
_warned_of_unscored: set[tuple[int, ...]] = set()


@dataclass(slots=True)
class Scored:
    """Answers of the sources about the N completions of this rank."""

    rewards: Tensor  # [N, F] float64 on the CPU; NaN: not scored
    extra: dict[str, list[Any]] = field(default_factory=dict)  # column -> N values, from log_extra
    # name -> (sum, count), from log_metric
    metrics: dict[str, tuple[float, float]] = field(default_factory=dict)

    def replaced(self, places: Sequence[int], other: "Scored") -> "Scored":
        """Return this with what `other` says of its completions at `places`.

        Metrics are of everything that was scored.
        """
        rewards = self.rewards.clone()
        rewards[list(places)] = other.rewards

        nothing = [None] * len(rewards)
        extra = {}
        for name in {**self.extra, **other.extra}:
            values = extra[name] = list(self.extra.get(name, nothing))
            for place, value in zip(places, other.extra.get(name, nothing), strict=False):
                values[place] = value

        metrics = dict(self.metrics)
        add_up(metrics, other.metrics)
        return Scored(rewards, extra, metrics)


def score(
    sources: Sequence[RewardSource],
    rollouts: Sequence[Rollout],
    rows: Sequence[Mapping[str, Any]],
    *,
    trainer_state: "TrainerState | None" = None,
    patience_s: float = 60.0,
) -> Scored:
    """Return the rewards of `rollouts` from every source.

    Async functions run concurrently on an event loop in its own thread, whether or not the caller
    has one; functions in worker processes run beside them; the others run in order on the calling
    thread.

    Args:
        rows: The dataset row of each rollout; sources get its columns beside prompt and completion.
        trainer_state: Passed on to functions.
        patience_s: Seconds between two warnings that a source has not answered.

    Raises:
        ValueError: If a source answers with anything but a finite number or None for each rollout.
        Exception: What a source raises, with a note that names it.
    """
    if not rollouts:
        return Scored(torch.empty(0, len(sources), dtype=torch.float64))

    columns = columns_of(rows)
    remarks = [Remarks(source.name, len(rollouts)) for source in sources]
    calls = [
        RewardCall(rollouts, columns, trainer_state, remark.log_extra, remark.log_metric)
        for remark in remarks
    ]

    answers = _answers(sources, calls, patience_s)
    scores = []
    for source, call, answer in zip(sources, calls, answers, strict=True):
        with _named(source, call), _watched(source, patience_s):  # a generator runs only now
            scores.append(as_scores(source.name, answer, len(rollouts)))

    rewards = torch.tensor(scores, dtype=torch.float64).T.contiguous()
    _warn_of_unscored(sources, rewards, rollouts, columns)
    return _merged(rewards, remarks)


@dataclass(slots=True)
class Remarks:
    """Remarks that one source leaves in the log beside its scores."""

    name: str
    num_rows: int
    extra: dict[str, list[Any]] = field(default_factory=dict)
    metrics: dict[str, tuple[float, float]] = field(default_factory=dict)

    def log_extra(self, column: str, values: Sequence[Any]) -> None:
        """Keep a column, one value per completion, for the table of completions."""
        self._check_text("log_extra", column)
        values = list(values)
        if len(values) != self.num_rows:
            raise ValueError(
                f"Reward {self.name!r} called log_extra({column!r}, ...) with {len(values)} values "
                f"for {self.num_rows} completions. Pass one value per completion."
            )
        self.extra[column] = values

    def log_metric(self, name: str, value: float) -> None:
        """Add to a mean over all calls and ranks until the next log; NaN and None are left out."""
        self._check_text("log_metric", name)
        if is_reserved_figure(name):
            raise ValueError(
                f"Reward {self.name!r} called log_metric({name!r}, ...), and {name!r} is a figure "
                "that the log has already. Choose another name, for example "
                f"{f'{self.name}/{name}'!r}."
            )
        number = as_number(value)
        if number is None or math.isinf(number):
            raise ValueError(
                f"Reward {self.name!r} called log_metric({name!r}, {value!r}), which is not a "
                "finite number."
            )
        if not math.isnan(number):
            add_up(self.metrics, {name: (number, 1.0)})

    def _check_text(self, method: str, name: object) -> None:
        if not isinstance(name, str) or not name:
            raise ValueError(
                f"Reward {self.name!r} called {method}({name!r}, ...). The name must be a text."
            )


def add_up(sums: dict[str, tuple[float, float]], more: Mapping[str, tuple[float, float]]) -> None:
    """Add the (sum, count) pairs of `more` to those of `sums`."""
    for name, (total, count) in more.items():
        old_total, old_count = sums.get(name, (0.0, 0.0))
        sums[name] = (old_total + total, old_count + count)


# -- asking ----------------------------------------------------------------------------------------


def _answers(
    sources: Sequence[RewardSource], calls: Sequence[RewardCall], patience_s: float
) -> list[Any]:
    """Return what each source answered; asynchronous ones are started before the others."""
    answers: dict[int, Any] = {}
    waiting: dict[concurrent.futures.Future[Any], int] = {}
    begun = time.monotonic()
    try:
        for i in sorted(range(len(sources)), key=lambda i: not sources[i].asynchronous):
            with _named(sources[i], calls[i]), _watched(sources[i], patience_s):
                answer = sources[i].score(calls[i])
            if isinstance(answer, concurrent.futures.Future):
                waiting[answer] = i
            elif inspect.isawaitable(answer):
                waiting[asyncio.run_coroutine_threadsafe(_awaited(answer), event_loop())] = i
            else:
                answers[i] = answer

        for future in _finished(waiting, sources, patience_s, begun):
            i = waiting[future]
            source = sources[i]
            with _named(source, calls[i]):
                if not future.done():
                    answers[i] = _too_late(source, calls[i])
                    continue
                answers[i] = future.result()
                if isinstance(source, FunctionReward) and source.timeout_s is not None:
                    source.tell_lost(calls[i], {})
    finally:
        for future in waiting:
            future.cancel()
    return [answers[i] for i in range(len(sources))]


def _finished(
    waiting: Mapping[concurrent.futures.Future[Any], int],
    sources: Sequence[RewardSource],
    patience_s: float,
    begun: float,
) -> Iterator[concurrent.futures.Future[Any]]:
    """Yield the futures as they finish, or as their sources' time is over.

    Each time that nothing has happened for `patience_s`, a warning says who is being waited for.
    """
    ends = {}
    for future, i in waiting.items():
        timeout_s = getattr(sources[i], "timeout_s", None)
        ends[future] = math.inf if timeout_s is None else begun + timeout_s

    pending = set(waiting)
    while pending:
        left = min(ends[future] for future in pending) - time.monotonic()
        done, pending = concurrent.futures.wait(
            pending, max(0.0, min(patience_s, left)), concurrent.futures.FIRST_COMPLETED
        )
        yield from done

        now = time.monotonic()
        late = {future for future in pending if ends[future] <= now}
        yield from late
        pending -= late
        if not done and not late:
            names = ", ".join(sorted(sources[waiting[future]].name for future in pending))
            logger.warning("No answer for %g s from: %s. Still waiting.", patience_s, names)


def _too_late(source: RewardSource, call: RewardCall) -> list[None]:
    """Take the completions of an async function whose time is over as not scored."""
    assert isinstance(source, FunctionReward)
    reason = f"there was no answer within {source.timeout_s:g} s"
    source.tell_lost(call, dict.fromkeys(range(len(call.rollouts)), reason))
    _replace_blocked_loop()
    return [None] * len(call.rollouts)


@contextmanager
def _named(source: RewardSource, call: RewardCall) -> Iterator[None]:
    """Let an exception say which source raised it, and for what."""
    first = call.rollouts[0]
    note = (
        f"Raised by the reward {source.name!r} for {len(call.rollouts)} completions. The first: "
        f"prompt {short(first.prompt.source)}, completion {short(first.completion)}."
    )
    try:
        yield
    except SystemExit as error:
        # As an ordinary error it ends the training with a checkpoint, and on all ranks.
        ended = RuntimeError(f"The reward {source.name!r} called sys.exit({error.code!r}).")
        ended.add_note(note)
        raise ended from error
    except KeyboardInterrupt as error:
        error.add_note(f"While the reward {source.name!r} was being asked.")
        raise
    except Exception as error:
        error.add_note(note)
        raise


@contextmanager
def _watched(source: RewardSource, patience_s: float) -> Iterator[None]:
    """Warn each time that `patience_s` have gone by in the block."""
    over = threading.Event()

    def watch() -> None:
        waited = 0.0
        while not over.wait(patience_s):
            waited += patience_s
            logger.warning("No answer for %g s from: %s. Still waiting.", waited, source.name)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        over.set()
        watcher.join()


# -- the event loop --------------------------------------------------------------------------------


def event_loop() -> asyncio.AbstractEventLoop:
    """Return a running event loop in a thread of this process.

    It is the same for all calls, so that connections may be kept.
    """
    return _event_loop_of(os.getpid())  # a forked process has none of its parent's threads


@functools.cache
def _event_loop_of(process: int) -> asyncio.AbstractEventLoop:
    loop = asyncio.new_event_loop()

    def run() -> None:
        while not loop.is_closed():
            try:
                loop.run_forever()
            except (SystemExit, KeyboardInterrupt):
                continue  # asyncio lets both out of a task, and with them ends the loop

    threading.Thread(target=run, name="rewards", daemon=True).start()
    return loop


def _replace_blocked_loop() -> None:
    """Leave the event loop to whoever blocks it; the next call gets another one."""
    alive = threading.Event()
    event_loop().call_soon_threadsafe(alive.set)
    if not alive.wait(_ALIVE_S):
        logger.warning("A reward blocks the event loop of rewards; another one takes its place.")
        _event_loop_of.cache_clear()


async def _awaited(answer: Awaitable[Any]) -> Any:
    try:
        return await answer
    except SystemExit as error:
        raise RuntimeError(f"It called sys.exit({error.code!r}).") from error
    except KeyboardInterrupt as error:
        raise RuntimeError("It raised KeyboardInterrupt.") from error


# -- what comes of it ------------------------------------------------------------------------------


def _merged(rewards: Tensor, remarks: Sequence[Remarks]) -> Scored:
    result = Scored(rewards)
    for remark in remarks:
        for column, values in remark.extra.items():
            # Two sources may use one name: the later one's column then says whose it is.
            result.extra[f"{remark.name}/{column}" if column in result.extra else column] = values
        add_up(result.metrics, remark.metrics)
    return result


def _warn_of_unscored(
    sources: Sequence[RewardSource],
    rewards: Tensor,
    rollouts: Sequence[Rollout],
    columns: Mapping[str, list[Any]],
) -> None:
    unscored = rewards.isnan().all(dim=1).nonzero().flatten().tolist()
    who = tuple(id(source) for source in sources)
    if not unscored or who in _warned_of_unscored:
        return
    _warned_of_unscored.add(who)

    row = unscored[0]
    logger.warning(
        "No reward scored %d of %d completions (%s all gave None). Such completions get the "
        "advantage 0. The first: prompt %s, completion %s, columns %s. This is said once.",
        len(unscored),
        len(rollouts),
        ", ".join(source.name for source in sources),
        short(rollouts[row].prompt.source),
        short(rollouts[row].completion),
        short({name: values[row] for name, values in columns.items()}),
    )
