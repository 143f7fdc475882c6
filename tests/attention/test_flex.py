"""FlexAttention with a block mask made of segments: its forward pass runs without a GPU."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gmpo.attention import segments
from gmpo.attention.flex import block_mask, blocks, flex_attention_of, serves
from gmpo.attention.kernels import AttentionParams
from gmpo.attention.segments import Reach, Segments, Tree, pieces
from tests.attention.dense import dense_attention, visible
from tests.attention.test_segments import drawn, reaches, trees

CPU = torch.device("cpu")
SCALE = 0.3
ROW = [Tree(100, (130, 30, 57)), Tree(40, (60,))]  # 417 tokens: blocks of 128 and a rest
SINKS = torch.tensor([0.3, -1.0, 2.0, 0.0])


def test_the_blocks_of_a_small_row():
    own, prompts = pieces([Tree(4, (2, 2))], Reach())
    some, full = blocks([*own, *prompts], 8, 2)
    assert torch.equal(some, drawn("x...\nxx..\nxxx.\nxx.x"))
    assert torch.equal(full, drawn("....\nx...\nxx..\nxx.."))


@settings(deadline=None)
@given(trees, reaches, st.integers(1, 5))
def test_blocks_hold_what_is_seen_and_full_ones_nothing_else(trees, reach, size):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(segments, "QUERIES", 3)
        own, prompts = pieces(trees, reach)
    some, full = blocks([*own, *prompts], sum(tree.tokens for tree in trees), size)
    seen = visible(trees, reach)
    for q in range(len(some)):
        for k in range(len(some)):
            block = seen[q * size : (q + 1) * size, k * size : (k + 1) * size]
            assert some[q, k] or not block.any()
            assert not full[q, k] or (some[q, k] and block.all() and block.numel() == size**2)


@pytest.mark.parametrize("row", [ROW, [Tree(300, (200, 50)), Tree(128, (128, 128, 400))]])
def test_few_blocks_are_visited_without_a_window(row):
    """As many as hold a pair, and every full one is known as full."""
    mask = block_mask(Segments(tuple(row), CPU), Reach())
    seen = visible(row, Reach())
    padded = torch.nn.functional.pad(seen, (0, -len(seen) % 128) * 2)
    counts = padded.unflatten(0, (-1, 128)).unflatten(2, (-1, 128)).sum((1, 3))
    assert torch.equal(mask.to_dense()[0, 0].bool(), counts > 0)
    assert mask.full_kv_num_blocks.sum() == (counts == 128 * 128).sum()


@pytest.mark.parametrize("reach", [Reach(), Reach(window=20), Reach(chunk=64)])
@pytest.mark.parametrize("how", [{}, {"softcap": 0.7}, {"softcap": 0.7, "sinks": SINKS}])
def test_flex_attention_is_attention_by_segments(reach, how):
    length = sum(tree.tokens for tree in ROW)
    generator = torch.Generator().manual_seed(0)
    shapes = [(4, 16), (2, 16), (2, 16)]
    inputs = [torch.randn(length, *shape, generator=generator) for shape in shapes]
    expected, _ = dense_attention(*inputs, visible(ROW, reach), scale=SCALE, **how)
    row = Segments(tuple(ROW), CPU)
    with torch.no_grad():
        found = flex_attention_of(*inputs, row, reach, AttentionParams(SCALE, **how))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_it_serves_only_where_there_is_a_gpu():
    query = torch.zeros(3, 4, 16)
    assert not serves(query, query)
