"""The contract of everything that makes completions: Request, Sampling, Completion, Engine."""

from collections import deque
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
        Sample 2 of a group goes on after 30 own tokens and 12 of a tool's answer, with 70
        left of its budget: Request(prompt, 1, seed, first=2, so_far=those 42, max_new_tokens=70).
    """

    prompt: Prompt  # the group's: read once, also by samples that go on
    count: int
    seed: int  # the same seed gives the same completions, whatever the batch
    first: int = 0  # number of the first sample in its group, which may be spread over ranks
    so_far: Sequence[int] = ()  # the sample's tokens after the prompt, its own and others
    max_new_tokens: int | None = None  # the rest of the budget; None for the sampling's
    stop: Sequence[str] = ()  # texts that end it, besides the sampling's

    @property
    def context(self) -> list[int]:
        """Return the tokens that the completion follows."""
        return [*self.prompt.ids, *self.so_far] if self.so_far else self.prompt.ids


@dataclass(frozen=True, slots=True)
class Sampling:
    """The way to sample, the same on every engine."""

    max_new_tokens: int
    temperature: float = 1.0  # 0 is greedy
    top_p: float = 1.0
    top_k: int = 0  # 0 is all tokens
    min_p: float | None = None
    repetition_penalty: float = 1.0
    # The engine's own options; they win over the fields above.
    extra: dict[str, Any] = field(default_factory=dict)
    # Log-probs are of the distribution that is left to sample from, or of the whole one.
    logps_support: Literal["sampled", "full"] = "sampled"

    @property
    def scored_temperature(self) -> float:
        """Return the temperature of the distribution whose log-probs are meant.

        Greedy completions have the log-probs of temperature 1.
        """
        return self.extra.get("temperature", self.temperature) or 1.0

    @property
    def scored_penalty(self) -> float:
        """Return the repetition penalty of the distribution whose log-probs are meant."""
        if self.logps_support == "full":
            return 1.0
        return self.extra.get("repetition_penalty", self.repetition_penalty) or 1.0


@dataclass(slots=True)
class Completion:
    """One sample, as an engine gives it back."""

    ids: list[int]  # with the end-of-sequence token, if there is one
    finish_reason: Literal["stop", "length"]
    logps: list[float] | None  # of each token, as `Sampling.logps_support` says; None if unknown
    support: TokenSets | None = None  # [len(ids)], what each was drawn from; None if always all


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

    The policy's weights belong to the trainer; an engine that holds a copy fetches it in `publish`.
    """

    def publish(self, version: int) -> None:
        """Have the weights of this version write what follows; called before `generate`."""
        ...

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[list[Completion]]:
        """Return `count` completions of each request, in order."""
        ...

    def close(self) -> None:
        """Free what the engine holds."""
        ...


class ServingEngine(Engine, Protocol):
    """An engine that pulls its requests: they join as they come, and leave as they are finished."""

    # It has a copy of the weights: it may serve in a thread while the trainer learns.
    overlaps: bool

    def serve(self, work: Work, sampling: Sampling) -> None:
        """Serve until there is no more work.

        Holds no collective: each rank serves its own work.

        Raises:
            Exception: What failed here.  Samples that were finished have been given.
        """
        ...


class FixedWork:
    """Requests that are all known from the start, and their samples."""

    def __init__(self, requests: Sequence[Request]) -> None:
        self.waiting = deque(requests)
        self.samples: dict[tuple[int, int], Completion] = {}  # by id of the request and number

    def take(self, room: int, *, wait: bool) -> list[Request] | None:
        """Return at most `room` of the requests that are left, or None if there are no more."""
        if not self.waiting:
            return None
        return [self.waiting.popleft() for _ in range(min(room, len(self.waiting)))]

    def give(self, request: Request, number: int, completion: Completion) -> None:
        """Keep a sample."""
        self.samples[id(request), number] = completion

    def completions(self, request: Request) -> list[Completion]:
        """Return the samples of a request, in order."""
        return [self.samples[id(request), number] for number in range(request.count)]


def serve_in_rounds(engine: Engine, work: Work, sampling: Sampling, *, room: int) -> None:
    """Serve by an engine that writes all completions of a call together, call after call.

    Args:
        room: Requests of one call.
    """
    while (requests := work.take(room, wait=True)) is not None:
        groups = engine.generate(requests, sampling) if requests else []
        for request, completions in zip(requests, groups, strict=True):
            for number, completion in enumerate(completions):
                work.give(request, number, completion)
