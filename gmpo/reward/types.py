"""The question that a reward is asked, and the interface of anything that scores."""

import copy
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from gmpo.types import Rollout

if TYPE_CHECKING:
    from transformers import TrainerState


@dataclass(frozen=True, slots=True)
class RewardCall:
    """The question to a source: N completions of this rank, and where to leave remarks."""

    rollouts: Sequence[Rollout]
    columns: Mapping[str, list[Any]]  # the other columns of the dataset, N values each
    trainer_state: "TrainerState | None"
    log_extra: Callable[[str, Sequence[Any]], None]  # a column for the table of completions
    log_metric: Callable[[str, float], None]  # averaged over all calls until the next log

    def keywords(self) -> dict[str, Any]:
        """Return the keywords for a reward function.

        Values that can be changed are copies, one for each row: rows of a group share theirs.
        """
        columns = {
            name: [fresh(value) for value in values] for name, values in self.columns.items()
        }
        return {
            **columns,
            "prompts": [fresh(rollout.prompt.source) for rollout in self.rollouts],
            "completions": [fresh(rollout.completion) for rollout in self.rollouts],
            "completion_ids": [list(rollout.ids) for rollout in self.rollouts],
            "opened": [rollout.prompt.opened for rollout in self.rollouts],
            "trainer_state": self.trainer_state,
            "log_extra": self.log_extra,
            "log_metric": self.log_metric,
        }


Answer = Iterable[float | None]


@runtime_checkable
class RewardSource(Protocol):
    """Anything that scores.  It may work in another process, and leave rows unscored (None)."""

    name: str  # in the metrics: rewards/{name}/mean
    asynchronous: bool  # `score` returns an awaitable or a future: it is started first

    def score(self, call: RewardCall) -> "Answer | Awaitable[Answer] | Future[Answer]":
        """Return one finite number, or None for "not scored", per rollout of `call`, in order."""
        ...


def fresh(value: object) -> Any:
    """Return a copy of what could be changed in place; other values as they are."""
    changeable = isinstance(value, list | dict | set | bytearray)
    if changeable or type(value).__module__ == "numpy":
        return copy.deepcopy(value)
    return value
