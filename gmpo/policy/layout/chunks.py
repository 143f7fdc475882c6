"""Cutting a batch into sets of rows that fit into one forward pass."""

from collections.abc import Callable

from gmpo.policy.layout.layout import balance
from gmpo.types import Batch

TokensOf = Callable[[list[int]], int]  # tokens of these rows after layout


def cut(batch: Batch, tokens_of: TokensOf, max_tokens: int) -> list[list[int]]:
    """Sets of rows of at most `max_tokens` tokens each, or of one row; of about the same size.

    Groups are cut only where one alone is too large.
    """
    groups: dict[int, list[int]] = {}
    for row, prompt in enumerate(batch.prompt_ids):
        groups.setdefault(id(prompt), []).append(row)
    pieces = [piece for group in groups.values() for piece in _halves(group, tokens_of, max_tokens)]
    sizes = [tokens_of(piece) for piece in pieces]
    for number in range(max(1, min(sum(sizes) // (2 * max_tokens), len(pieces))), len(pieces)):
        sets = [
            sorted(row for piece in part for row in pieces[piece])
            for part in balance(sizes, number)
        ]
        if all(len(rows) == 1 or tokens_of(rows) <= max_tokens for rows in sets):
            return sets
    return pieces


def _halves(rows: list[int], tokens_of: TokensOf, max_tokens: int) -> list[list[int]]:
    """`rows` cut in two, and again, until each part fits or is one row."""
    if len(rows) == 1 or tokens_of(rows) <= max_tokens:
        return [rows]
    middle = (len(rows) + 1) // 2
    return [
        *_halves(rows[:middle], tokens_of, max_tokens),
        *_halves(rows[middle:], tokens_of, max_tokens),
    ]
