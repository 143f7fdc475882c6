"""Cutting a batch into sets of rows that fit into one forward pass."""

from collections.abc import Callable, Sequence

from gmpo.policy.layout.layout import groups
from gmpo.types import Batch

TokensOf = Callable[[list[int]], int]  # tokens of these rows after layout


def cut(batch: Batch, tokens_of: TokensOf, max_tokens: int) -> list[list[int]]:
    """Return sets of rows of at most `max_tokens` tokens each, or of one row.

    The sets have about the same size.  Groups are cut only where a single one is too large.
    """
    parts: list[list[int]] = []
    for group in groups(batch):
        parts += _halves(group, tokens_of, max_tokens)
    tokens = [tokens_of(part) for part in parts]

    fewest = max(1, min(sum(tokens) // (2 * max_tokens), len(parts)))
    for number in range(fewest, len(parts)):
        sets = [_joined(parts, chosen) for chosen in balance(tokens, number)]
        if all(len(rows) == 1 or tokens_of(rows) <= max_tokens for rows in sets):
            return sets
    return parts


def balance(sizes: Sequence[int], number: int) -> list[list[int]]:
    """Return items over `number` sets of about equal size.

    The longest come first, each into the emptiest set.

    Example:
        sizes [3, 4, 5, 6], number 2 -> [[3, 0], [2, 1]], of 9 each
    """
    sets: list[list[int]] = [[] for _ in range(number)]
    filled = [0] * number
    for item in sorted(range(len(sizes)), key=lambda item: -sizes[item]):
        emptiest = filled.index(min(filled))
        sets[emptiest].append(item)
        filled[emptiest] += sizes[item]
    return sets


def _halves(rows: list[int], tokens_of: TokensOf, max_tokens: int) -> list[list[int]]:
    """Return `rows` cut in two, and again, until each part fits or is one row."""
    if len(rows) == 1 or tokens_of(rows) <= max_tokens:
        return [rows]
    middle = (len(rows) + 1) // 2
    return [
        *_halves(rows[:middle], tokens_of, max_tokens),
        *_halves(rows[middle:], tokens_of, max_tokens),
    ]


def _joined(parts: list[list[int]], chosen: list[int]) -> list[int]:
    return sorted(row for number in chosen for row in parts[number])
