"""What every way of making completions looks like from outside."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from gmpo.token_sets import TokenSets
from gmpo.types import Prompt


@dataclass(frozen=True, slots=True)
class Request:
    """Ask for `count` completions of one prompt."""

    prompt: Prompt
    count: int
    seed: int  # names the random numbers: the same seed gives the same completions, whatever the batch
    first: int = 0  # number of the first sample within its group, if the group is spread over ranks


@dataclass(frozen=True, slots=True)
class Sampling:
    """How to sample.  The same on every engine."""

    max_new_tokens: int
    temperature: float = 1.0  # 0 is greedy
    top_p: float = 1.0
    top_k: int = 0  # 0: all tokens
    min_p: float | None = None
    repetition_penalty: float = 1.0
    extra: dict[str, Any] = field(
        default_factory=dict
    )  # the engine's own options; they win over the fields above
    logps_support: Literal["sampled", "full"] = (
        "sampled"  # whether log-probs are of what was left to sample from
    )

    @property
    def scored_temperature(self) -> float:
        """That of the distribution whose log-probs are meant; greedy completions have those of temperature 1."""
        return self.extra.get("temperature", self.temperature) or 1.0

    @property
    def scored_penalty(self) -> float:
        """The repetition penalty of the distribution whose log-probs are meant."""
        if self.logps_support == "full":
            return 1.0
        return self.extra.get("repetition_penalty", self.repetition_penalty) or 1.0


@dataclass(slots=True)
class Completion:
    """What an engine gives back for one sample."""

    ids: list[int]  # with the end-of-sequence token, if there is one
    finish_reason: Literal["stop", "length"]
    logps: (
        list[float] | None
    )  # log-prob of each token under the temperature-scaled distribution; None: not reported
    support: TokenSets | None = (
        None  # [len(ids)], the tokens that each was drawn from; None: always all
    )


class Engine(Protocol):
    """Makes completions.  Every rank has one and calls `generate` the same number of times.

    The policy's weights belong to the trainer.  `publish` is called before `generate` with the version of the weights
    that must write the completions; an engine that holds a copy fetches it then, if it is another than it has.
    """

    def publish(self, version: int) -> None: ...

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[list[Completion]]:
        """`count` completions for each request, in order."""
        ...

    def close(self) -> None: ...
