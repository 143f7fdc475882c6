"""Which rows every rank gets, and when: groups contiguous, each collection served as often as it is trained on.

A micro-step's data is a `Rows`: this rank's part of the current collection and the number of the micro-step within it.
It says itself where it belongs, so skipping batches on a resume or reading ahead in workers can't shift anything.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils.data import Dataset, IterableDataset, Sampler

from gmpo.types import DatasetRow


@dataclass(frozen=True, slots=True)
class Rows:
    """The rows of one rank's share of a collection, each as often as it has completions here."""

    micro_step: int  # micro-step within the collection, from 0; at 0 the collection is made
    offset: int  # index of the first row within the collection over all ranks
    rows: list[dict[str, Any]]  # rows of a group are one dict object
    encoded: dict[str, Any] = field(
        default_factory=dict
    )  # what evaluation found out on the way, for `compute_metrics`

    def __getitem__(self, name: str) -> Any:
        return self.encoded[name]


@dataclass(frozen=True, slots=True)
class CollectionSize:
    """The arithmetic of a collection."""

    group_size: int  # completions per prompt
    rows: int  # completions over all ranks
    micro_steps: int  # how often the collection is served: steps_per_generation * num_iterations

    @property
    def prompts(self) -> int:
        return self.rows // self.group_size

    def require(self, available: int) -> None:
        """Raise a ValueError if `available` prompts do not fill one collection."""
        if available < self.prompts:
            raise ValueError(
                f"The training set has {available} prompt(s), but one collection needs "
                f"{self.prompts} (generation_batch_size={self.rows} / "
                f"num_generations={self.group_size}). Add prompts, or lower generation_batch_size "
                f"(steps_per_generation) to at most {max(available, 1) * self.group_size}."
            )


def epoch_order(size: int, *, seed: int, epoch: int, shuffle: bool) -> list[int]:
    """Row indices in the order of this epoch, a function of the arguments alone: a resumed run sees the same."""
    if not shuffle:
        return list(range(size))
    generator = torch.Generator().manual_seed((seed * 1_000_003 + epoch) % 2**63)
    return torch.randperm(size, generator=generator).tolist()


class CollectionSampler(Sampler[list[tuple[int, int, int]]]):
    """Batches of keys (micro_step, offset, row index) for `KeyedRows`; prompts that do not fill a collection are left out.

    Every collection is emitted `micro_steps` times, and each time as one batch per rank, in rank order: what
    `accelerate` hands to the ranks in turn.
    """

    def __init__(
        self, size: int, collection: CollectionSize, *, ranks: int, seed: int, shuffle: bool
    ):
        collection.require(size)
        self.size, self.collection, self.ranks, self.seed, self.shuffle = (
            size,
            collection,
            ranks,
            seed,
            shuffle,
        )
        self.batch_size = collection.rows // ranks
        self.drop_last = True
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.size // self.collection.prompts * self.collection.micro_steps * self.ranks

    def __iter__(self) -> Iterator[list[tuple[int, int, int]]]:
        order = epoch_order(self.size, seed=self.seed, epoch=self.epoch, shuffle=self.shuffle)
        for start in range(0, self.size - self.collection.prompts + 1, self.collection.prompts):
            prompts = order[start : start + self.collection.prompts]
            rows = [index for index in prompts for _ in range(self.collection.group_size)]
            for micro_step in range(self.collection.micro_steps):
                for offset in range(0, len(rows), self.batch_size):
                    yield [
                        (micro_step, offset, index)
                        for index in rows[offset : offset + self.batch_size]
                    ]


class KeyedRows(Dataset):
    """A map-style dataset behind the keys of `CollectionSampler`; each distinct row is read once per batch."""

    def __init__(self, dataset: Any):
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitems__(
        self, keys: list[tuple[int, int, int]]
    ) -> list[tuple[int, int, dict[str, Any]]]:
        indices = {index for _, _, index in keys}
        distinct = {index: DatasetRow(self.dataset[index], index) for index in indices}
        return [(micro_step, offset, distinct[index]) for micro_step, offset, index in keys]

    def __getitem__(self, key: tuple[int, int, int]) -> tuple[int, int, dict[str, Any]]:
        return self.__getitems__([key])[0]


class StreamedRows(IterableDataset):
    """An iterable dataset cut into collections, pass after pass without an end.

    It gives the items that `KeyedRows` gives, in the same order; rows at the end of a pass that do
    not fill a collection are left out.  The Trainer takes a stream for one long epoch, skips from
    its beginning on a resume, and has no end of an epoch to finish a window of gradient
    accumulation: so a pass must not end it.
    """

    def __init__(self, dataset: Any, collection: CollectionSize, *, ranks: int):
        self.dataset = dataset
        self.collection = collection
        self.ranks = ranks
        self.first_pass = 0

    def set_epoch(self, epoch: int) -> None:
        """Begin with the order of pass `epoch`."""
        self.first_pass = epoch

    def __iter__(self) -> Iterator[tuple[int, int, dict[str, Any]]]:
        for number in itertools.count(self.first_pass):
            if hasattr(self.dataset, "set_epoch"):
                self.dataset.set_epoch(number)
            yield from self._one_pass()

    def _one_pass(self) -> Iterator[tuple[int, int, dict[str, Any]]]:
        """Yield the collections of one pass over the dataset.

        Raises:
            ValueError: If it has no prompts for a single one.
        """
        num_collections = 0
        prompts: list[dict[str, Any]] = []
        for number, row in enumerate(self.dataset):
            prompts.append(DatasetRow(row, number))
            if len(prompts) == self.collection.prompts:
                yield from self._one_collection(prompts)
                num_collections += 1
                prompts = []
        if num_collections == 0:
            self.collection.require(len(prompts))

    def _one_collection(
        self, prompts: list[dict[str, Any]]
    ) -> Iterator[tuple[int, int, dict[str, Any]]]:
        per_rank = self.collection.rows // self.ranks
        rows = [row for row in prompts for _ in range(self.collection.group_size)]
        for micro_step in range(self.collection.micro_steps):
            for number, row in enumerate(rows):
                yield micro_step, number // per_rank * per_rank, row


class EvalSampler(Sampler[list[tuple[int, int, int]]]):
    """One rank's keys for evaluation: every prompt once, whole groups per global batch, in the dataset's order.

    The last batch may be short; ranks that have no row of it get an empty one, so that all ranks take the same number
    of steps and no row is counted twice.
    """

    def __init__(
        self,
        size: int,
        collection: CollectionSize,
        *,
        rank: int,
        ranks: int,
        drop_last: bool = False,
    ):
        self.size = size - size % collection.prompts if drop_last else size
        self.collection, self.rank, self.ranks = collection, rank, ranks

    def __len__(self) -> int:
        return -(-self.size // self.collection.prompts)

    def __iter__(self) -> Iterator[list[tuple[int, int, int]]]:
        per_rank = self.collection.rows // self.ranks
        offset = self.rank * per_rank
        for start in range(0, self.size, self.collection.prompts):
            prompts = range(start, min(start + self.collection.prompts, self.size))
            rows = [index for index in prompts for _ in range(self.collection.group_size)]
            yield [(start, offset, index) for index in rows[offset : offset + per_rank]]


def as_rows(items: list[tuple[int, int, dict[str, Any]]]) -> Rows:
    """The data loader's collate function."""
    if not items:
        return Rows(micro_step=0, offset=0, rows=[])
    micro_step, offset, _ = items[0]
    return Rows(micro_step=micro_step, offset=offset, rows=[row for _, _, row in items])
