"""A completion that is being written: its tokens, its random numbers, and its end."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Literal

import torch

from gmpo.rollout.engine import Completion, Request
from gmpo.token_sets import TokenList, TokenSets

BLOCK = 256  # random numbers drawn at a time


@dataclass(slots=True, eq=False)
class GrowingSequence:
    """One sample of a request, growing token by token."""

    request: Request
    uniforms: Iterator[float]  # one in [0, 1) per token
    number: int = 0  # of the sample, among those of its request
    ids: list[int] = field(default_factory=list)
    logps: list[float] = field(default_factory=list)
    # What each token was drawn from; None is all tokens.
    supports: list[TokenList | None] = field(default_factory=list)
    finish_reason: Literal["stop", "length"] | None = None  # None while it grows

    @property
    def length(self) -> int:
        """Return the number of tokens of prompt and completion."""
        return len(self.request.context) + len(self.ids)

    def tokens_from(self, start: int) -> list[int]:
        """Return the tokens of prompt and completion from number `start` on.

        Example:
            Of prompt [5, 6] and completion [7, 8], from 1: [6, 7, 8]; from 3: [8].
        """
        prompt = self.request.context
        if start >= len(prompt):
            return self.ids[start - len(prompt) :]
        return prompt[start:] + self.ids

    def completion(self) -> Completion:
        """Return what was written so far."""
        return Completion(
            ids=self.ids,
            finish_reason=self.finish_reason or "length",
            logps=self.logps,
            support=TokenSets.of(self.supports),
        )


def new_sequences(request: Request) -> list[GrowingSequence]:
    """Return the `count` empty samples of a request, each with its own random numbers.

    A sample that goes on has the numbers behind those of the tokens before: it is written as if it
    had never stopped.
    """
    samples = []
    for number in range(request.count):
        numbers = uniforms(request.seed, request.first + number)
        rest = islice(numbers, len(request.so_far), None)
        samples.append(GrowingSequence(request, rest, number))
    return samples


def uniforms(seed: int, number: int) -> Iterator[float]:
    """Yield the random numbers of sample `number` of a request, in [0, 1).

    They are a function of (seed, number) only, on every device: they come from their own generator
    on the CPU, so that neither the global generator nor the batch plays a part.
    """
    digest = hashlib.blake2b(f"{seed}:{number}".encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)
    while True:
        yield from torch.rand(BLOCK, dtype=torch.float64, generator=generator).tolist()


class StopCriteria:
    """Decides when a completion is finished.

    Args:
        eos: Tokens that end a completion; they stay in it.
        max_new_tokens: Longest completion, where its request does not say.
        stop_strings: Texts that end a completion as soon as its text contains one, besides those of
            its request; they stay in it, too.
        decode: Tokens to text; needed for texts that stop.
    """

    def __init__(
        self,
        eos: Sequence[int],
        max_new_tokens: int,
        stop_strings: Sequence[str] = (),
        decode: Callable[[list[int]], str] | None = None,
    ) -> None:
        assert decode is not None or not stop_strings
        self.eos = frozenset(eos)
        self.max_new_tokens = max_new_tokens
        self.stop_strings = tuple(stop_strings)
        self.decode = decode

    def budget(self, request: Request) -> int:
        """Return the most tokens that a completion of the request may have."""
        return self.max_new_tokens if request.max_new_tokens is None else request.max_new_tokens

    def add(
        self, sequence: GrowingSequence, token: int, logp: float, support: TokenList | None = None
    ) -> None:
        """Append a token, and note the reason if that finishes the sequence."""
        sequence.ids.append(token)
        sequence.logps.append(logp)
        sequence.supports.append(support)
        if token in self.eos or self._stopped(sequence):
            sequence.finish_reason = "stop"
        elif len(sequence.ids) >= self.budget(sequence.request):
            sequence.finish_reason = "length"

    def _stopped(self, sequence: GrowingSequence) -> bool:
        """Return whether the text of the sequence holds one that stops it."""
        stops = (*self.stop_strings, *sequence.request.stop)
        if not stops:
            return False

        # Every token of text adds at least one byte; the margin covers special tokens, which may
        # decode to nothing.
        tail = max(len(text.encode()) for text in stops) + 8
        assert self.decode is not None
        text = self.decode(sequence.ids[-tail:])
        return any(stop in text for stop in stops)
