"""The rows that every rank gets at each micro-step.

Groups are contiguous, and each collection is served as often as it is trained on.  The data of a
micro-step is a `Rows`: this rank's share of the current collection and the number of the
micro-step within it.  It says itself where it belongs, so that skipping batches on a resume or
reading ahead in workers can't shift anything.

Example:
    4 prompts a, b, c, d; groups of 2, collections of 4 rows, served twice, on 2 ranks:

    micro-step     |      0      |      1      |      0      |      1      |
    rank 0         |    a  a     |    a  a     |    c  c     |    c  c     |   offset 0
    rank 1         |    b  b     |    b  b     |    d  d     |    d  d     |   offset 2
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch.utils.data import Dataset, IterableDataset, Sampler

from gmpo.types import DatasetRow, MapStyleDataset

Item = TypeVar("Item")


@dataclass(frozen=True, slots=True)
class Rows:
    """The rows of one rank's share of a collection, each as often as it has completions here."""

    micro_step: int  # micro-step within the collection, from 0; at 0 the collection is made
    offset: int  # index of the first row within the collection over all ranks
    items: list[dict[str, Any]]  # rows of a group are one dict object
    # Prompts as token ids, which evaluation adds for `compute_metrics`.
    encoded: dict[str, Any] = field(default_factory=dict)

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
        """Return the distinct prompts of a collection."""
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
    """Return row indices in the order of this epoch.

    They depend only on the arguments, so that a resumed run sees the same order.
    """
    if not shuffle:
        return list(range(size))
    generator = torch.Generator().manual_seed((seed * 1_000_003 + epoch) % 2**63)
    return torch.randperm(size, generator=generator).tolist()


def repeated(prompts: Sequence[Item], group_size: int) -> list[Item]:
    """Return every prompt `group_size` times in a row.

    Example:
        [a, b] with groups of 2 -> [a, a, b, b]
    """
    return [prompt for prompt in prompts for _ in range(group_size)]


class CollectionSampler(Sampler[list[tuple[int, int, int]]]):
    """Batches of keys (micro_step, offset, row index) for `KeyedRows`.

    Every collection is emitted `micro_steps` times, and each time as one batch per rank, in rank
    order: `accelerate` hands them to the ranks in turn.  Prompts at the end of an epoch that do not
    fill a collection are left out.

    Example:
        3 prompts in the order 2, 0, 1; groups of 2, collections of 2 rows served once, one rank:
        [(0, 0, 2), (0, 0, 2)], [(0, 0, 0), (0, 0, 0)], [(0, 0, 1), (0, 0, 1)]
    """

    def __init__(
        self, size: int, collection: CollectionSize, *, ranks: int, seed: int, shuffle: bool
    ):
        collection.require(size)
        self.size = size
        self.collection = collection
        self.ranks = ranks
        self.seed = seed
        self.shuffle = shuffle
        self.epoch = 0

        # What accelerate asks of a batch sampler.
        self.batch_size = collection.rows // ranks
        self.drop_last = True

    def set_epoch(self, epoch: int) -> None:
        """Take the order of `epoch`."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.size // self.collection.prompts * self.collection.micro_steps * self.ranks

    def __iter__(self) -> Iterator[list[tuple[int, int, int]]]:
        order = epoch_order(self.size, seed=self.seed, epoch=self.epoch, shuffle=self.shuffle)
        step = self.collection.prompts

        for start in range(0, self.size - step + 1, step):
            rows = repeated(order[start : start + step], self.collection.group_size)
            for micro_step in range(self.collection.micro_steps):
                for offset in range(0, len(rows), self.batch_size):
                    share = rows[offset : offset + self.batch_size]
                    yield [(micro_step, offset, index) for index in share]


class KeyedRows(Dataset):
    """A map-style dataset behind the keys of `CollectionSampler`.

    Each distinct row is read once per batch, so that rows of a group are one object.
    """

    def __init__(self, dataset: MapStyleDataset):
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
        rows = repeated(prompts, self.collection.group_size)
        for micro_step in range(self.collection.micro_steps):
            for number, row in enumerate(rows):
                yield micro_step, number // per_rank * per_rank, row


class EvalSampler(Sampler[list[tuple[int, int, int]]]):
    """One rank's keys for evaluation: every prompt once, in the dataset's order.

    A batch over all ranks holds whole groups.  The last one may be short: ranks that have no row of
    it get an empty batch, so that all ranks take the same number of steps and no row counts twice.

    Example:
        3 prompts, groups of 2, batches of 4 rows on 2 ranks:
        rank 0: [0, 0], [2, 2]   rank 1: [1, 1], []
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
        self.collection = collection
        self.rank = rank
        self.ranks = ranks

    def __len__(self) -> int:
        return -(-self.size // self.collection.prompts)

    def __iter__(self) -> Iterator[list[tuple[int, int, int]]]:
        per_rank = self.collection.rows // self.ranks
        offset = self.rank * per_rank

        for start in range(0, self.size, self.collection.prompts):
            prompts = range(start, min(start + self.collection.prompts, self.size))
            rows = repeated(prompts, self.collection.group_size)
            yield [(start, offset, index) for index in rows[offset : offset + per_rank]]


def as_rows(items: list[tuple[int, int, dict[str, Any]]]) -> Rows:
    """Return the items of a data loader's batch as `Rows`; a rank may have none."""
    if not items:
        return Rows(micro_step=0, offset=0, items=[])
    micro_step, offset, _ = items[0]
    return Rows(micro_step=micro_step, offset=offset, items=[row for _, _, row in items])
