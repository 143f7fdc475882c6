"""Which rows each rank sees, and when."""

import itertools

import pytest
from torch.utils.data import DataLoader, IterableDataset

from gmpo.data.sampler import (
    CollectionSampler,
    CollectionSize,
    EvalSampler,
    KeyedRows,
    StreamedRows,
    as_rows,
    epoch_order,
)


def rows_of(size):
    return [{"prompt": f"p{i}"} for i in range(size)]


def prompts(batch):
    return [row["prompt"] for row in batch.items]


def loader(size, collection, *, ranks=1, epoch=0, shuffle=False, workers=0):
    sampler = CollectionSampler(size, collection, ranks=ranks, seed=7, shuffle=shuffle)
    sampler.set_epoch(epoch)
    return DataLoader(
        KeyedRows(rows_of(size)), batch_sampler=sampler, collate_fn=as_rows, num_workers=workers
    )


def test_each_prompt_stands_group_size_times_and_a_collection_is_served_once_per_micro_step():
    collection = CollectionSize(group_size=2, rows=4, micro_steps=3)
    batches = list(
        loader(5, collection)
    )  # 2 prompts per collection: the fifth prompt does not fill one
    assert [b.micro_step for b in batches] == [0, 1, 2, 0, 1, 2]
    assert prompts(batches[0]) == prompts(batches[2]) == ["p0", "p0", "p1", "p1"]
    assert prompts(batches[3]) == ["p2", "p2", "p3", "p3"]


def test_rows_of_a_group_are_one_object():
    batch = next(iter(loader(2, CollectionSize(group_size=2, rows=4, micro_steps=1))))
    assert batch.items[0] is batch.items[1]
    assert batch.items[0] is not batch.items[2]


def test_ranks_get_contiguous_slices_of_one_collection_in_turn():
    collection = CollectionSize(group_size=4, rows=8, micro_steps=1)
    first, second = list(loader(2, collection, ranks=2))
    assert (first.offset, second.offset) == (0, 4)
    assert prompts(first) == ["p0"] * 4
    assert prompts(second) == ["p1"] * 4


def test_a_group_may_span_ranks():
    collection = CollectionSize(group_size=4, rows=4, micro_steps=1)
    first, second = list(loader(1, collection, ranks=2))
    assert prompts(first) == prompts(second) == ["p0", "p0"]
    assert (first.offset, second.offset) == (0, 2)


def test_every_epoch_has_an_order_of_its_own_that_a_new_sampler_repeats():
    orders = [epoch_order(50, seed=3, epoch=epoch, shuffle=True) for epoch in (0, 1)]
    assert sorted(orders[0]) == sorted(orders[1]) == list(range(50))
    assert orders[0] != orders[1]
    assert orders[1] == epoch_order(50, seed=3, epoch=1, shuffle=True)
    assert orders[0] != epoch_order(50, seed=4, epoch=0, shuffle=True)


def test_workers_change_neither_order_nor_position():
    collection = CollectionSize(group_size=2, rows=4, micro_steps=2)
    alone = [(b.micro_step, prompts(b)) for b in loader(6, collection, shuffle=True)]
    assert alone == [
        (b.micro_step, prompts(b)) for b in loader(6, collection, shuffle=True, workers=2)
    ]


def test_too_few_prompts_for_one_collection_is_an_error_that_names_a_size_that_works():
    with pytest.raises(ValueError, match=r"3 prompt\(s\).*needs 4.*at most 6"):
        CollectionSampler(
            3, CollectionSize(group_size=2, rows=8, micro_steps=1), ranks=1, seed=0, shuffle=False
        )


class Stream(IterableDataset):
    def __iter__(self):
        return iter(rows_of(5))


def test_a_stream_gives_what_a_map_style_dataset_gives():
    collection = CollectionSize(group_size=2, rows=4, micro_steps=2)
    streamed = DataLoader(
        StreamedRows(Stream(), collection, ranks=1),
        batch_size=4,
        drop_last=True,
        collate_fn=as_rows,
    )
    listed = [(b.micro_step, b.offset, prompts(b)) for b in loader(5, collection)]
    first_pass = itertools.islice(streamed, len(listed))
    assert [(b.micro_step, b.offset, prompts(b)) for b in first_pass] == listed


def test_evaluation_sees_every_prompt_once_and_gives_late_ranks_an_empty_batch():
    collection = CollectionSize(
        group_size=2, rows=4, micro_steps=1
    )  # 2 prompts per global batch, 2 rows per rank
    batches = [list(EvalSampler(3, collection, rank=rank, ranks=2)) for rank in (0, 1)]
    rows = [[[key[2] for key in batch] for batch in of_rank] for of_rank in batches]
    assert rows == [[[0, 0], [2, 2]], [[1, 1], []]]
    assert as_rows([]).items == []
