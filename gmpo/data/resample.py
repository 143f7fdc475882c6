"""Prompts in the place of those whose completions all have the same reward."""

import json
from collections.abc import Iterator
from typing import Any

import torch

from gmpo.types import DatasetRow, MapStyleDataset

Row = dict[str, Any]


class ReplacementPrompts:
    """Rows of a map-style dataset in a seeded order, without those at hand.

    Args:
        dataset: Has a length, and gives rows with a `prompt`.
    """

    def __init__(self, dataset: MapStyleDataset):
        self.dataset = dataset

    def draw(self, count: int, *, without: set[str], seed: int) -> list[Row]:
        """Return `count` rows of distinct prompts, or fewer if there are no more.

        They are the same on every rank.

        Args:
            without: Prompts not to draw, as `prompt_key` gives them.
            seed: Names the order.
        """
        drawn: list[Row] = []
        taken = set(without)
        for row in self._shuffled(seed):
            if len(drawn) == count:
                break
            if prompt_key(row) not in taken:
                taken.add(prompt_key(row))
                drawn.append(row)
        return drawn

    def _shuffled(self, seed: int) -> Iterator[Row]:
        generator = torch.Generator().manual_seed(seed)
        for index in torch.randperm(len(self.dataset), generator=generator).tolist():
            yield DatasetRow(self.dataset[index], index)


def prompt_key(row: Row) -> str:
    """Return a text that is the same for rows with the same prompt."""
    return json.dumps(row["prompt"], sort_keys=True, default=repr)
