"""Ragged sets of tokens: what they hold, and that they follow the rows of a batch."""

import torch

from gmpo.token_sets import TokenSets
from gmpo.types import Batch


def listed(*ids):
    return torch.tensor(ids, dtype=torch.int32)


ROWS = [
    TokenSets.of([(listed(0, 3), False), None, (listed(1), True)]),  # {0, 3}, all, all but 1
    None,
    TokenSets.of([(listed(2), False)]),
]


def members_of(sets, row):
    return [each.nonzero().flatten().tolist() for each in sets[row].members(4)]


def make_batch():
    lengths = torch.tensor([3, 2, 1])
    prompt = torch.tensor([1])
    return Batch(
        prompt_ids=[prompt] * 3,
        completion_ids=torch.zeros(3, 3, dtype=torch.int64),
        lengths=lengths,
        mask=torch.arange(3) < lengths[:, None],
        num_completion_tokens=lengths,
        advantages=torch.zeros(3),
        group=torch.zeros(3, dtype=torch.int64),
        support=TokenSets.padded(ROWS, lengths.tolist(), 3),
    )


def test_sets_hold_what_is_listed_or_all_else():
    sets = make_batch().support
    everything = [0, 1, 2, 3]
    assert members_of(sets, 0) == [[0, 3], everything, [0, 2, 3]]
    assert members_of(sets, 1) == [everything] * 3
    assert members_of(sets, 2) == [[2], everything, everything]


def test_sets_follow_the_rows_of_a_batch_and_share_their_lists():
    batch = make_batch()
    part = batch.rows(torch.tensor([2, 0])).rows(torch.tensor([0]))
    assert part.support.size.shape == part.mask.shape == (1, 1)
    assert members_of(part.support, 0) == [[2]]
    assert part.support.ids is batch.support.ids
    assert batch.rows(torch.tensor([0])).to("meta").support.ids.device.type == "meta"


def test_sets_of_all_tokens_are_none():
    assert TokenSets.of([None, None]) is None
    assert TokenSets.of([]) is None
    assert TokenSets.padded([None, None], [1, 2], 2) is None
