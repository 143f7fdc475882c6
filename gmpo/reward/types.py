"""What a reward is asked, and what anything that scores looks like."""

from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from gmpo.types import Rollout


@dataclass(frozen=True, slots=True)
class RewardCall:
    """What a source is asked: the completions of this rank, N of them, and where to leave remarks."""

    rollouts: Sequence[Rollout]
    columns: Mapping[str, list[Any]]  # the other columns of the dataset, N values each
    trainer_state: Any
    log_extra: Callable[
        [str, Sequence[Any]], None
    ]  # (column, N values): a column for the table of completions
    log_metric: Callable[
        [str, float], None
    ]  # (name, value): averaged over all calls until the next log

    def keywords(self) -> dict[str, Any]:
        """As keywords for a reward function.  Lists and messages are fresh: a function may change what it gets."""
        return {
            **{name: list(values) for name, values in self.columns.items()},
            "prompts": [_fresh(rollout.prompt.source) for rollout in self.rollouts],
            "completions": [_fresh(rollout.completion) for rollout in self.rollouts],
            "completion_ids": [list(rollout.ids) for rollout in self.rollouts],
            "trainer_state": self.trainer_state,
            "log_extra": self.log_extra,
            "log_metric": self.log_metric,
        }


@runtime_checkable
class RewardSource(Protocol):
    """Anything that scores.  It may take its time, work in another process, and leave rows unscored (None)."""

    name: str  # in the metrics: rewards/{name}/mean
    asynchronous: (
        bool  # `score` returns an awaitable: it is started first and runs beside the others
    )

    def score(self, call: RewardCall) -> Iterable[float | None] | Awaitable[Iterable[float | None]]:
        """One finite number, or None for "not scored", per rollout of `call`, in order."""
        ...


def _fresh(text: Any) -> Any:
    return [dict(message) for message in text] if isinstance(text, list) else text
