"""Where tokens go, and which state predicts them: a small batch worked out by hand."""

import pytest
import torch

from gmpo.attention.segments import Tree
from gmpo.policy.layout.layout import groups, lay_out, packed, padded, shared_prefix
from gmpo.types import Batch


@pytest.fixture
def batch():
    """Prompt 11 12 13 with completions 1 2 3 and 4 5; prompt 21 with 6 7."""
    first, second = torch.tensor([11, 12, 13]), torch.tensor([21])
    lengths = torch.tensor([3, 2, 2])
    return Batch(
        prompt_ids=[first, first, second],
        completion_ids=torch.tensor([[1, 2, 3], [4, 5, 0], [6, 7, 0]]),
        lengths=lengths,
        mask=torch.arange(3) < lengths[:, None],
        num_completion_tokens=lengths,
        advantages=torch.zeros(3),
        group=torch.tensor([0, 0, 1]),
    )


def test_padded(batch):
    layout = lay_out(batch, padded(batch))
    assert layout.input_ids.tolist() == [[11, 12, 13, 1, 2], [11, 12, 13, 4, 0], [21, 6, 0, 0, 0]]
    assert layout.position_ids.tolist() == [[0, 1, 2, 3, 4], [0, 1, 2, 3, 0], [0, 1, 0, 0, 0]]
    assert layout.mask.tolist() == [[1, 1, 1, 1, 1], [1, 1, 1, 1, 0], [1, 1, 0, 0, 0]]
    assert layout.source.tolist() == [[2, 3, 4], [7, 8, 0], [10, 11, 0]]
    assert layout.segments is None


def test_padded_to_a_multiple_with_the_last_tokens(batch):
    layout = lay_out(batch, padded(batch, last_token=True, multiple_of=4))
    assert layout.input_ids.tolist() == [
        [11, 12, 13, 1, 2, 3, 0, 0],
        [11, 12, 13, 4, 5, 0, 0, 0],
        [21, 6, 7, 0, 0, 0, 0, 0],
    ]
    assert layout.weight.tolist() == [[1] * 6 + [0] * 2, [1] * 5 + [0] * 3, [1] * 3 + [0] * 5]
    assert layout.source.tolist() == [[2, 3, 4], [10, 11, 0], [16, 17, 0]]


def test_packed(batch):
    layout = lay_out(batch, packed(batch))
    assert layout.input_ids.tolist() == [[11, 12, 13, 1, 2, 11, 12, 13, 4, 21, 6]]
    assert layout.position_ids.tolist() == [[0, 1, 2, 3, 4, 0, 1, 2, 3, 0, 1]]
    assert layout.source.tolist() == [[2, 3, 4], [7, 8, 0], [9, 10, 0]]
    assert layout.segments.trees == (Tree(3, (2,)), Tree(3, (1,)), Tree(1, (1,)))
    assert layout.mask is None


def test_shared_prefix(batch):
    layout = lay_out(batch, shared_prefix(batch))
    assert layout.input_ids.tolist() == [[11, 12, 13, 1, 2, 4, 21, 6]]
    assert layout.position_ids.tolist() == [[0, 1, 2, 3, 4, 3, 0, 1]]
    assert layout.weight.tolist() == [[2, 2, 2, 1, 1, 1, 1, 1]]
    assert layout.source.tolist() == [[2, 3, 4], [2, 5, 0], [6, 7, 0]]
    assert layout.segments.trees == (Tree(3, (2, 1)), Tree(1, (1,)))
    assert layout.mask is None


def test_rows_of_a_group_that_are_apart_come_together(batch):
    apart = batch.rows(torch.tensor([1, 2, 0]))
    assert groups(apart) == [[0, 2], [1]]
    layout = lay_out(apart, shared_prefix(apart))
    assert layout.input_ids.tolist() == [[11, 12, 13, 4, 1, 2, 21, 6]]
    assert layout.source.tolist() == [[2, 3, 0], [6, 7, 0], [2, 4, 5]]


def test_equal_prompts_that_are_not_the_same_object_are_not_shared(batch):
    batch.prompt_ids[1] = batch.prompt_ids[1].clone()
    layout = lay_out(batch, shared_prefix(batch))
    assert layout.input_ids.tolist() == [[11, 12, 13, 1, 2, 11, 12, 13, 4, 21, 6]]


def test_an_empty_completion_leaves_its_prompt(batch):
    batch.lengths[1] = 0
    layout = lay_out(batch, shared_prefix(batch))
    assert layout.input_ids.tolist() == [[11, 12, 13, 1, 2, 21, 6]]
    assert layout.source.tolist() == [[2, 3, 4], [0, 0, 0], [5, 6, 0]]


@pytest.mark.parametrize("place", [padded, packed, shared_prefix])
def test_no_rows_are_one_token_that_counts_nowhere(batch, place):
    none = batch.rows(torch.tensor([], dtype=torch.int64))
    layout = lay_out(none, place(none))
    assert layout.input_ids.tolist() == layout.weight.tolist() == [[0]]
    assert layout.mask is None or layout.mask.tolist() == [[1]]
    assert layout.segments is None or layout.segments.tokens == 1
