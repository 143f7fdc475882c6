"""A user's function as a source: what it takes, and how it is called, here or in workers."""

import concurrent.futures
import copy
import inspect
import logging
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from gmpo.reward.pool import Cancellation, Limits, Outcome, Packed, pack, shared_pool
from gmpo.reward.types import RewardCall
from gmpo.reward.worker import RowReward

logger = logging.getLogger(__name__)

# Columns of the dataset in whose place rewards get what the rollout holds.
OWN_COLUMNS = frozenset({"prompt", "completion", "completion_ids"})
# Keywords of rewards that no column may have as its name.
OWN_KEYWORDS = frozenset(
    {"prompts", "completions", "opened", "trainer_state", "log_extra", "log_metric"}
)
_REMARKS = ("log_extra", "log_metric", "trainer_state")
_LOG_HISTORY = 100  # entries of trainer_state.log_history that workers get
_SHOWN = 5  # lost completions that are logged of one call
_SILENT_CALLS = 3  # calls in a row without any score, after which the run stops


class FunctionReward:
    """A user's function: sync or async, a partial, or an object with `__call__`.

    It gets the keywords that its signature accepts, and all of them where it takes **kwargs.

    Args:
        timeout_s: Seconds that an async function may take for one call; None sets no limit.
    """

    def __init__(self, function: Callable[..., Any], *, timeout_s: float | None = None):
        self.name = function_name(function)
        self.asynchronous = is_async(function)
        self.timeout_s = timeout_s if self.asynchronous else None
        self._function = function
        self._silent_calls = 0
        self._takes = Parameters.of(function)

    def score(self, call: RewardCall) -> Any:
        """Call the function."""
        return self._function(**self._takes.chosen(self.name, call.keywords()))

    def tell_lost(self, call: RewardCall, reasons: Mapping[int, str]) -> None:
        """Log the completions that were not scored, and their share.

        Args:
            reasons: By the completion's number.

        Raises:
            RuntimeError: If none was scored in this call and in those before it.
        """
        for row in range(len(call.rollouts)):
            call.log_metric(f"rewards/{self.name}/lost", float(row in reasons))
        for row in list(reasons)[:_SHOWN]:
            logger.warning(
                "Reward %r did not score a completion: %s. The completion ends with %r.",
                self.name,
                reasons[row],
                str(call.rollouts[row].completion)[-200:],
            )
        if len(reasons) > _SHOWN:
            logger.warning(
                "Reward %r did not score %d more completions.", self.name, len(reasons) - _SHOWN
            )

        if len(reasons) < len(call.rollouts):
            self._silent_calls = 0
            return
        self._silent_calls += 1
        if self._silent_calls >= _SILENT_CALLS:
            reason = next(iter(reasons.values()))
            raise RuntimeError(
                f"Reward {self.name!r} scored no completion in {self._silent_calls} calls in a "
                f"row; the last reason: {reason}. Mend it, or raise its limits (reward_timeout, "
                "reward_memory_limit)."
            )

    def check_columns(self, columns: Iterable[str]) -> None:
        """Check that the function can be called with what gmpo and a dataset give it.

        Args:
            columns: Of the dataset.

        Raises:
            ValueError: If it needs something else, or a column has the name of another argument.
        """
        columns = list(columns)
        refuse_reserved(columns)
        others = [name for name in columns if name not in OWN_COLUMNS]
        keywords = [*others, *sorted(OWN_KEYWORDS), "completion_ids"]
        self._takes.check_required(self.name, keywords)

        needs = getattr(self._function, "needs_any_column", ())
        if needs and not set(needs) & set(columns):
            raise ValueError(
                f"Reward {self.name!r} needs a dataset column {' or '.join(map(repr, needs))}. The "
                f"dataset has: {', '.join(columns)}."
            )


class PooledReward(FunctionReward):
    """A function that worker processes call, for one completion at a time.

    A completion whose call breaks a limit, ends its process or raises is not scored, and counted in
    rewards/{name}/lost.  If every completion's call raises, the function is at fault: the error is
    raised here.

    Args:
        limits: What one call may take.
    """

    def __init__(self, function: Callable[..., Any], *, limits: Limits, max_workers: int):
        super().__init__(function)
        self.asynchronous = True  # its calls run beside other sources
        self.timeout_s = None  # the pool ends each call by itself
        self._limits = limits
        self._max_workers = max_workers
        self._packed = pack(RowReward(self.name, function))

    def score(self, call: RewardCall) -> "concurrent.futures.Future[list[float | None]]":
        """Start the calls; the future's answer is one score for each completion."""
        keywords = self._takes.chosen(self.name, call.keywords())
        remarks = [name for name in _REMARKS if name in keywords]
        shared = self._state(keywords)
        columns = {name: values for name, values in keywords.items() if name not in _REMARKS}

        pool, cancellation = shared_pool(self._max_workers), Cancellation()
        futures = []
        for row in range(len(call.rollouts)):
            one = {name: [values[row]] for name, values in columns.items()}
            future = pool.submit(
                self._packed,
                one,
                remarks,
                limits=self._limits,
                shared=shared,
                cancellation=cancellation,
            )
            futures.append(future)
        return gathered(futures, partial(self._finish, call), cancellation)

    def _state(self, keywords: Mapping[str, Any]) -> Packed | None:
        """Return the Trainer's state for the workers, if the function takes it."""
        state = keywords.get("trainer_state")
        if state is None:
            return None
        history = getattr(state, "log_history", ())
        if len(history) > _LOG_HISTORY:  # it grows with the run, and each worker gets it
            state = copy.copy(state)
            state.log_history = history[-_LOG_HISTORY:]
        return pack(state)

    def _finish(self, call: RewardCall, outcomes: list[Outcome]) -> list[float | None]:
        """Return the scores; pass on what the function logged, and tell what was lost."""
        errors = [outcome.error for outcome in outcomes if outcome.error is not None]
        for outcome in outcomes:
            if outcome.unloadable:
                raise RuntimeError(
                    f"A worker process could not load the reward: {outcome.error or outcome.lost}"
                )
        if len(errors) == len(outcomes):
            raise RuntimeError(
                f"The reward raised an error for each of {len(outcomes)} completions. The first:\n"
                f"{errors[0]}"
            )

        answers = [outcome.value or {} for outcome in outcomes]
        for column in dict.fromkeys(name for answer in answers for name in answer.get("extra", ())):
            call.log_extra(column, [answer.get("extra", {}).get(column) for answer in answers])
        for answer in answers:
            for name, value in answer.get("metrics", ()):
                call.log_metric(name, value)

        reasons = {
            row: outcome.lost or f"it raised {last_line(str(outcome.error))}"
            for row, outcome in enumerate(outcomes)
            if outcome.lost is not None or outcome.error is not None
        }
        self.tell_lost(call, reasons)
        return [answer.get("score") for answer in answers]


@dataclass(frozen=True, slots=True)
class Parameters:
    """The keywords that a function can be given."""

    names: frozenset[str] | None  # None if it takes every keyword, or does not say
    required: tuple[str, ...]
    wrapped: "Parameters | None" = None  # of the function inside a decorator that takes anything

    @classmethod
    def of(cls, function: Callable[..., Any]) -> "Parameters":
        """Read the signature of `function`.

        Raises:
            ValueError: If it can't be called with keywords.
        """
        try:
            signature = inspect.signature(function, follow_wrapped=False)
        except (TypeError, ValueError):
            return cls(None, ())

        parameters = signature.parameters
        kinds = {parameter.kind for parameter in parameters.values()}
        if inspect.Parameter.POSITIONAL_ONLY in kinds:
            raise ValueError(
                f"Reward function {function_name(function)!r} has positional-only parameters, but "
                "is called with keywords (prompts, completions, ...). Remove the '/' from its "
                "signature."
            )
        if kinds == {inspect.Parameter.VAR_POSITIONAL}:
            raise ValueError(
                f"Reward function {function_name(function)!r} takes *{next(iter(parameters))} "
                "only, but is called with keywords (prompts, completions, ...). Name what it needs."
            )

        variable = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
        named = {name: p for name, p in parameters.items() if p.kind not in variable}
        required = tuple(name for name, p in named.items() if p.default is p.empty)
        if inspect.Parameter.VAR_KEYWORD not in kinds:
            return cls(frozenset(named), required)
        inner = getattr(function, "__wrapped__", None)
        return cls(None, required, None if inner is None else cls.of(inner))

    def chosen(self, name: str, keywords: dict[str, Any]) -> dict[str, Any]:
        """Return those of `keywords` that the function takes.

        A decorator that takes everything passes it on.  So where the function inside it needs
        nothing but what there is, it gets what that function takes; else the decorator must know
        better, and gets everything.

        Raises:
            ValueError: If something that it requires is not there.
        """
        self.check_required(name, keywords)
        accepted = self._accepted(keywords)
        if accepted is None:
            return keywords
        return {key: value for key, value in keywords.items() if key in accepted}

    def check_required(self, name: str, keywords: Iterable[str]) -> None:
        """Raise a ValueError unless all that is required is among `keywords`."""
        keywords = list(keywords)
        missing = [key for key in self.required if key not in keywords]
        if not missing:
            return
        hint = ""
        if missing[0] == "self":
            hint = " It is a method of a class: pass the method of an object."
        raise ValueError(
            f"Reward function {name!r} needs {', '.join(map(repr, missing))}, which the dataset "
            f"does not have.{hint} It can get: {', '.join(keywords)}."
        )

    def _accepted(self, keywords: Mapping[str, Any]) -> frozenset[str] | None:
        if self.names is not None or self.wrapped is None:
            return self.names
        if not set(self.wrapped.required) <= keywords.keys():
            return None
        inner = self.wrapped._accepted(keywords)
        return None if inner is None else inner | set(self.required)


def gathered(
    futures: "list[concurrent.futures.Future[Outcome]]",
    finish: Callable[[list[Outcome]], list[float | None]],
    cancellation: Cancellation,
) -> "concurrent.futures.Future[list[float | None]]":
    """Return a future for what `finish` makes of all outcomes.  Cancelling it ends the calls."""
    gathering: concurrent.futures.Future[list[float | None]] = concurrent.futures.Future()
    waiting = len(futures)

    def on_one(_: object) -> None:
        nonlocal waiting
        with gathering_lock:
            waiting -= 1
            last = waiting == 0
        if not last or not gathering.set_running_or_notify_cancel():
            return
        try:
            gathering.set_result(finish([future.result() for future in futures]))
        except BaseException as error:
            gathering.set_exception(error)

    def on_cancel(done: concurrent.futures.Future[list[float | None]]) -> None:
        if done.cancelled():
            cancellation.cancel()

    gathering_lock = threading.Lock()
    gathering.add_done_callback(on_cancel)
    for future in futures:
        future.add_done_callback(on_one)
    return gathering


def refuse_reserved(columns: Iterable[str]) -> None:
    """Raise a ValueError if a column has the name of another argument of a reward function."""
    clashes = sorted(OWN_KEYWORDS.intersection(columns))
    if clashes:
        raise ValueError(
            f"The dataset has columns {clashes}, but reward functions get something else under "
            "these names. Rename the columns."
        )


def function_name(function: Callable[..., Any]) -> str:
    """Return a function's name for the metrics.

    Of a partial it is the name of what it wraps; of an object without a name, its class's name.
    """
    while isinstance(function, partial):
        function = function.func
    return getattr(function, "__name__", type(function).__name__)


def is_async(function: object) -> bool:
    """Return True if calling `function` gives an awaitable."""
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(
        getattr(function, "__call__", None)  # noqa: B004 (an async __call__ is what we look for)
    )


def last_line(text: str) -> str:
    """Return the last line of a traceback: the exception."""
    return text.strip().rpartition("\n")[2]
