"""Where tokens go, what they see, and which state predicts them: a small batch worked out by hand."""

import pytest
import torch
from torch.nn.attention.flex_attention import create_mask
from transformers import LlamaConfig, MistralConfig

from gmpo.policy.layout.layout import balance, lay_out, pack, packed, padded, shared_prefix
from gmpo.policy.layout.masks import (
    additive_mask,
    attention_masks,
    block_mask,
    boolean_mask,
    in_chunk,
    in_tree,
    in_window,
)
from gmpo.types import Batch


def one_row(rows, columns):
    return rows


def one_tree_per_row(rows, columns):
    return -rows


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
    assert (layout.tree >= 0).int().tolist() == [[1, 1, 1, 1, 1], [1, 1, 1, 1, 0], [1, 1, 0, 0, 0]]
    assert layout.source.tolist() == [[2, 3, 4], [7, 8, 0], [10, 11, 0]]


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
    layout = lay_out(batch, packed(batch, one_row))
    assert layout.input_ids.tolist() == [[11, 12, 13, 1, 2, 11, 12, 13, 4, 21, 6]]
    assert layout.position_ids.tolist() == [[0, 1, 2, 3, 4, 0, 1, 2, 3, 0, 1]]
    assert layout.tree.tolist() == [[0] * 5 + [1] * 4 + [2] * 2]
    assert layout.source.tolist() == [[2, 3, 4], [7, 8, 0], [9, 10, 0]]


def test_shared_prefix(batch):
    layout = lay_out(batch, shared_prefix(batch, one_row))
    assert layout.input_ids.tolist() == [[11, 12, 13, 1, 2, 4, 21, 6]]
    assert layout.position_ids.tolist() == [[0, 1, 2, 3, 4, 3, 0, 1]]
    assert layout.tree.tolist() == [[0, 0, 0, 0, 0, 0, 1, 1]]
    assert layout.branch.tolist() == [[0, 0, 0, 1, 1, 2, 0, 1]]
    assert layout.weight.tolist() == [[2, 2, 2, 1, 1, 1, 1, 1]]
    assert layout.source.tolist() == [[2, 3, 4], [2, 5, 0], [6, 7, 0]]


def test_shared_prefix_in_a_row_per_group(batch):
    layout = lay_out(batch, shared_prefix(batch, one_tree_per_row))
    assert layout.input_ids.tolist() == [[11, 12, 13, 1, 2, 4], [21, 6, 0, 0, 0, 0]]
    assert layout.source.tolist() == [[2, 3, 4], [2, 5, 0], [6, 7, 0]]
    assert layout.tree.tolist() == [[0] * 6, [1, 1, -1, -1, -1, -1]]


def test_equal_prompts_that_are_not_the_same_object_are_not_shared(batch):
    batch.prompt_ids[1] = batch.prompt_ids[1].clone()
    layout = lay_out(batch, shared_prefix(batch, one_row))
    assert layout.input_ids.tolist() == [[11, 12, 13, 1, 2, 11, 12, 13, 4, 21, 6]]


def test_an_empty_completion_leaves_its_prompt(batch):
    batch.lengths[1] = 0
    layout = lay_out(batch, shared_prefix(batch, one_row))
    assert layout.input_ids.tolist() == [[11, 12, 13, 1, 2, 21, 6]]
    assert layout.source.tolist() == [[2, 3, 4], [0, 0, 0], [5, 6, 0]]


TREE = """
    x.......
    xx......
    xxx.....
    xxxx....
    xxxxx...
    xxx..x..
    ......x.
    ......xx
"""
WINDOW_OF_TWO = """
    x.......
    xx......
    .xx.....
    ..xx....
    ...xx...
    ..x..x..
    ......x.
    ......xx
"""
CHUNKS_OF_TWO = """
    x.......
    xx......
    ..x.....
    ..xx....
    ....x...
    ..x..x..
    ......x.
    ......xx
"""


def drawn(text):
    return torch.tensor(
        [[mark == "x" for mark in line.strip()] for line in text.strip().splitlines()]
    )


def test_tokens_see_their_prompt_and_themselves(batch):
    layout = lay_out(batch, shared_prefix(batch, one_row))
    assert torch.equal(boolean_mask(layout, in_tree(layout))[0, 0], drawn(TREE))


def test_windows_and_chunks_count_positions(batch):
    layout = lay_out(batch, shared_prefix(batch, one_row))
    window = in_window(layout, MistralConfig(sliding_window=2))
    assert torch.equal(boolean_mask(layout, window)[0, 0], drawn(WINDOW_OF_TWO))
    config = LlamaConfig()
    config.attention_chunk_size = 2
    assert torch.equal(boolean_mask(layout, in_chunk(layout, config))[0, 0], drawn(CHUNKS_OF_TWO))


def test_padding_sees_padding_only(batch):
    layout = lay_out(batch, shared_prefix(batch, one_tree_per_row))
    mask = boolean_mask(layout, in_tree(layout))[1, 0]
    assert mask[2:, :2].sum() == 0 and mask[:2, 2:].sum() == 0 and mask.diagonal().all()


def test_the_forms_of_a_mask_agree(batch):
    layout = lay_out(batch, shared_prefix(batch, one_tree_per_row))
    visible = in_window(layout, MistralConfig(sliding_window=2))
    expected = boolean_mask(layout, visible)
    lowest = torch.finfo(torch.float32).min
    assert torch.equal(
        additive_mask(layout, visible, torch.float32), torch.where(expected, 0.0, lowest)
    )
    blocks = block_mask(layout, visible)
    assert torch.equal(create_mask(blocks.mask_mod, 2, 1, 6, 6, device="cpu"), expected)


def test_a_model_with_several_kinds_of_layers_gets_a_mask_for_each(batch):
    layout = lay_out(batch, shared_prefix(batch, one_row))
    config = MistralConfig(sliding_window=2)
    config._attn_implementation = "sdpa"
    assert torch.equal(attention_masks(layout, config, torch.float32)[0, 0], drawn(WINDOW_OF_TWO))
    config.layer_types = ["sliding_attention", "full_attention"]
    masks = attention_masks(layout, config, torch.float32)
    assert torch.equal(masks["sliding_attention"][0, 0], drawn(WINDOW_OF_TWO))
    assert torch.equal(masks["full_attention"][0, 0], drawn(TREE))
    config.layer_types = ["linear_attention", "full_attention"]
    with pytest.raises(ValueError, match="linear_attention"):
        attention_masks(layout, config, torch.float32)


def test_items_spread_evenly():
    # longest first, each to the emptiest row: 8 | 7 | 6, then 5 to the third, 4 to the second, 3 to the first
    assert balance([3, 4, 5, 6, 7, 8], 3) == [[5, 0], [4, 1], [3, 2]]


def test_packing_takes_the_cheapest_number_of_rows():
    sizes = [4, 4, 4, 4]
    assert (
        len(pack(sizes, lambda rows, columns: rows * columns * columns)) == 4
    )  # pairs alone: 4 * 16 < 1 * 256
    assert (
        len(pack(sizes, lambda rows, columns: rows * columns + 5 * rows)) == 1
    )  # 16 + 5 < 16 + 20
    assert len(pack([9, 1, 1, 1], lambda rows, columns: rows * columns)) == 1  # 12 < 2 * 9
    assert pack([], one_row) == []
