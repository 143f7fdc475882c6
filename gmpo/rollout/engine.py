"""What every way of making completions looks like from outside."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from gmpo.token_sets import TokenSets
from gmpo.types import Prompt


@dataclass(frozen=True, slots=True)
class Request:
    """Ask for `count` completions of one prompt.

    A sample that goes on, after a tool has answered perhaps, is a request for one completion with
    the tokens `so_far`, which are never tokenised again.

    Example:
        Sample 2 of a group goes on after 30 tokens of its own and 12 of a tool's answer, with 70
        left of its budget: Request(prompt, 1, seed, first=2, so_far=those 42, max_new_tokens=70).
    """

    prompt: Prompt  # the group's: read once, also by samples that go on
    count: int
    seed: int  # the same seed gives the same completions, whatever the batch
    first: int = 0  # number of the first sample in its group, which may be spread over ranks
    so_far: Sequence[int] = ()  # the sample's tokens after the prompt, its own and others
    max_new_tokens: int | None = None  # the rest of the budget; None for the sampling's
    stop: Sequence[str] = ()  # texts that end it, besides the sampling's


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


class Work(Protocol):
    """Requests of one rank, as they come.  Called from the thread that serves them, only."""

    def take(self, room: int, *, wait: bool) -> list[Request] | None:
        """Return at most `room` requests, [] if none is ready, or None if that was all.

        Args:
            room: At least 1.
            wait: The engine has nothing else to do: return when there is something.
        """
        ...

    def give(self, request: Request, number: int, completion: Completion) -> None:
        """Take a sample of a request, as soon as it is finished.

        Args:
            request: As it was taken.
            number: From 0 to request.count - 1.
            completion: The sample, without `so_far`.
        """
        ...


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


class ServingEngine(Engine, Protocol):
    """An engine that pulls its requests: they join as they come, and leave as they are finished."""

    overlaps: (
        bool  # it has a copy of the weights: it may serve in a thread while the trainer learns
    )

    def serve(self, work: Work, sampling: Sampling) -> None:
        """Serve until there is no more work.

        Holds no collective: each rank serves its own work.

        Raises:
            Exception: What failed here.  Samples that were finished have been given.
        """
        ...
