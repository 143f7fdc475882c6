"""The queries and keys that meet in a row of segments: index arithmetic only.

A row is a list of trees, one after another.  A tree is a prompt and the completions that continue
it.  Positions count from 0 at each prompt's start, and each completion goes on where its prompt
ends, so that a token sees consecutive positions as if its row stood by itself.
"""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

Made = TypeVar("Made")

QUERIES = 256  # of one piece, where a layer does not see everything
CALL_TOKENS = 2048  # queries of one call, where pieces can be cut: bounds what a kernel makes


@dataclass(frozen=True, slots=True)
class Tree:
    """A prompt and its completions, in tokens."""

    prompt: int
    completions: tuple[int, ...] = ()

    @property
    def tokens(self) -> int:
        """Return the tokens of the whole tree."""
        return self.prompt + sum(self.completions)


@dataclass(frozen=True, slots=True)
class Reach:
    """The distance, in positions, that the tokens of a layer see back."""

    window: int | None = None  # tokens that are seen, the token itself included; None for all
    chunk: int | None = None  # only positions of the same run of so many; None for all

    def first(self, position: int) -> int:
        """Return the first position that a token at `position` sees.

        Example:
            position 5, window 2 -> 4; position 5, chunk 4 -> 4; position 5, neither -> 0
        """
        first = 0
        if self.window is not None:
            first = max(first, position - self.window + 1)
        if self.chunk is not None:
            first = max(first, position // self.chunk * self.chunk)
        return first


@dataclass(frozen=True, slots=True)
class Run:
    """Tokens at consecutive places and positions, which see each other causally."""

    place: int  # of its first token, in the row
    length: int
    position: int = (
        0  # of its first token: the length of the prompt before it, if it is a completion
    )
    prompt: int = 0  # place of that prompt's first token


@dataclass(frozen=True, slots=True)
class Piece:
    """Queries at consecutive places that meet keys at consecutive places."""

    query: int  # place of the first query
    num_queries: int
    key: int  # place of the first key
    num_keys: int
    query_position: int
    key_position: int
    kind: str  # "causal": among themselves; "full": all of them; "masked": by their positions


def runs(tree: Tree, place: int) -> list[Run]:
    """Return the runs of a tree that begins at `place`, its prompt first.

    A prompt with one completion is one run.

    Example:
        Tree(3, (2, 1)) at 10 -> Run(10, 3), Run(13, 2, position=3, prompt=10),
                                 Run(15, 1, position=3, prompt=10)
        Tree(3, (0, 4)) at 10 -> Run(10, 7)
    """
    completions = [length for length in tree.completions if length]
    if len(completions) <= 1:
        return [Run(place, tree.tokens)]

    found = [Run(place, tree.prompt)] if tree.prompt else []
    start = place + tree.prompt
    for length in completions:
        found.append(Run(start, length, position=tree.prompt, prompt=place))
        start += length
    return found


def own_pieces(run: Run, reach: Reach) -> list[Piece]:
    """Return the pieces in which the tokens of a run see each other.

    Example:
        Run(10, 5) -> causal, queries and keys 10..14
        Run(10, 5), window 2, QUERIES 3 -> masked, queries 10..12 and keys 10..12;
                                           masked, queries 13..14 and keys 12..14
    """
    last = run.position + run.length - 1
    if reach.first(last) <= run.position:
        return [
            Piece(
                run.place, run.length, run.place, run.length, run.position, run.position, "causal"
            )
        ]

    pieces = []
    for start in range(0, run.length, QUERIES):
        position = run.position + start
        stop = min(start + QUERIES, run.length)
        first = max(run.position, reach.first(position))  # position of the first key
        pieces.append(
            Piece(
                query=run.place + start,
                num_queries=stop - start,
                key=run.place + first - run.position,
                num_keys=run.position + stop - first,
                query_position=position,
                key_position=first,
                kind="masked",
            )
        )
    return pieces


def prompt_pieces(completions: Sequence[Run], reach: Reach) -> list[Piece]:
    """Return the pieces in which the completions of one prompt, one after another, see the prompt.

    Example:
        prompt at 10..12, completions at 13..14 and 15 -> full, queries 13..15 and keys 10..12
        the same with window 2: only the first token of each completion sees position 2, at place 12
            -> masked, query 13 and key 12; masked, query 15 and key 12
    """
    if not completions or not completions[0].position:
        return []
    prompt = completions[0].position

    if all(reach.first(run.position + run.length - 1) == 0 for run in completions):
        first, queries = completions[0], sum(run.length for run in completions)
        starts = range(0, queries, CALL_TOKENS)
        return [
            Piece(
                query=first.place + start,
                num_queries=min(CALL_TOKENS, queries - start),
                key=first.prompt,
                num_keys=prompt,
                query_position=prompt,
                key_position=0,
                kind="full",
            )
            for start in starts
        ]

    return [piece for run in completions for piece in _reaching_pieces(run, reach)]


def _reaching_pieces(run: Run, reach: Reach) -> list[Piece]:
    """Return the pieces in which a completion sees what is near enough of its prompt."""
    prompt = run.position
    seeing = [step for step in range(run.length) if reach.first(prompt + step) < prompt]
    pieces = []
    for start in range(0, len(seeing), QUERIES):
        position = prompt + start
        first = reach.first(position)
        pieces.append(
            Piece(
                query=run.place + start,
                num_queries=min(QUERIES, len(seeing) - start),
                key=run.prompt + first,
                num_keys=prompt - first,
                query_position=position,
                key_position=first,
                kind="masked",
            )
        )
    return pieces


def seen(piece: Piece, reach: Reach) -> Tensor:
    """Return [num_queries, num_keys], true where the query sees the key.

    Example:
        queries at positions 3, 4, keys at 2, 3, 4, window 2 -> [[1, 1, 0], [0, 1, 1]]
    """
    if piece.kind == "full":
        return torch.ones(piece.num_queries, piece.num_keys, dtype=torch.bool)
    query = torch.arange(piece.query_position, piece.query_position + piece.num_queries)
    key = torch.arange(piece.key_position, piece.key_position + piece.num_keys)
    first = torch.tensor([reach.first(position) for position in query.tolist()], dtype=torch.int64)
    return (key <= query[:, None]) & (key >= first[:, None])


# -- calls of a kernel ---------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Places:
    """Where the tokens of `count` pieces of `length` tokens stand in a row."""

    count: int
    length: int
    start: int | None  # where they stand one after another
    index: Tensor | None = None  # [count * length] where they don't

    @classmethod
    def of(cls, starts: Sequence[int], length: int, device: torch.device) -> "Places":
        """Return the places of pieces that begin at `starts`.

        Example:
            starts [4, 7], length 3 -> 4..9 as one span
            starts [4, 8], length 3 -> index 4, 5, 6, 8, 9, 10
        """
        if list(starts) == [starts[0] + number * length for number in range(len(starts))]:
            return cls(len(starts), length, starts[0])
        index = torch.tensor(starts)[:, None] + torch.arange(length)
        return cls(len(starts), length, None, index.flatten().to(device))

    def take(self, row: Tensor) -> Tensor:
        """Return what a row holds here: [L, H, ...] -> [count, H, length, ...]."""
        if self.index is None:
            chosen = row.narrow(0, self.start or 0, self.count * self.length)
        else:
            chosen = row.index_select(0, self.index)
        return chosen.unflatten(0, (self.count, self.length)).transpose(1, 2)

    def put(self, row: Tensor, values: Tensor) -> None:
        """Write [count, H, length, ...] into a row, in place."""
        flat = values.transpose(1, 2).flatten(0, 1)
        if self.index is None:
            row.narrow(0, self.start or 0, len(flat)).copy_(flat)
        else:
            row.index_copy_(0, self.index, flat)

    def add(self, row: Tensor, values: Tensor) -> None:
        """Add [count, H, length, ...] to a row, in place; no token stands here twice."""
        flat = values.transpose(1, 2).flatten(0, 1)
        if self.index is None:
            row.narrow(0, self.start or 0, len(flat)).add_(flat)
        else:
            row.index_add_(0, self.index, flat)


@dataclass(frozen=True, slots=True)
class Call:
    """Pieces of one shape, which a kernel computes at once."""

    queries: Places
    keys: Places
    causal: bool
    seen: Tensor | None  # [num_queries, num_keys] bool; None if all, or by `causal`
    onto_prompt: bool  # merged with what the tokens see of their own run


@dataclass(frozen=True, slots=True)
class Segments:
    """A row of trees, and what kernels need of it, made once."""

    trees: tuple[Tree, ...]
    device: torch.device
    _made: dict[Hashable, Any] = field(default_factory=dict, repr=False, compare=False)

    @property
    def tokens(self) -> int:
        """Return the tokens of the row."""
        return sum(tree.tokens for tree in self.trees)

    def calls(self, reach: Reach) -> list[Call]:
        """Return the calls for a layer: each token's own run first, then the prompts."""
        return self.remembered(("calls", reach), lambda: self._make_calls(reach))

    def remembered(self, key: Hashable, make: Callable[[], Made]) -> Made:
        """Return what `make` makes of the row, the first time; layers and passes share it."""
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]

    def _make_calls(self, reach: Reach) -> list[Call]:
        own, prompts = pieces(self.trees, reach)
        return [
            *_stacked(own, reach, self.device, onto_prompt=False),
            *_stacked(prompts, reach, self.device, onto_prompt=True),
        ]


def pieces(trees: Sequence[Tree], reach: Reach) -> tuple[list[Piece], list[Piece]]:
    """Return the pieces of a row: of tokens with their own runs, and of completions with prompts.

    Together, the queries of the former are all tokens of the row, each once.
    """
    own, prompts, place = [], [], 0
    for tree in trees:
        found = runs(tree, place)
        for run in found:
            own += own_pieces(run, reach)
        prompts += prompt_pieces([run for run in found if run.position], reach)
        place += tree.tokens
    return own, prompts


def _stacked(
    pieces: Sequence[Piece], reach: Reach, device: torch.device, *, onto_prompt: bool
) -> list[Call]:
    """Put pieces of one shape and one mask into one call each."""
    alike: dict[tuple[object, ...], list[Piece]] = {}
    for piece in pieces:
        mask = None
        if piece.kind == "masked":
            chunk_start = None if reach.chunk is None else piece.query_position % reach.chunk
            mask = (piece.query_position - piece.key_position, chunk_start)
        key = (piece.kind, piece.num_queries, piece.num_keys, mask)
        alike.setdefault(key, []).append(piece)

    groups = []
    for group in alike.values():
        size = max(1, CALL_TOKENS // group[0].num_queries)
        groups += [group[start : start + size] for start in range(0, len(group), size)]

    return [
        Call(
            queries=Places.of([piece.query for piece in group], group[0].num_queries, device),
            keys=Places.of([piece.key for piece in group], group[0].num_keys, device),
            causal=group[0].kind == "causal",
            seen=seen(group[0], reach).to(device) if group[0].kind == "masked" else None,
            onto_prompt=onto_prompt,
        )
        for group in groups
    ]
