"""Sequences for flash attention, computed one by one, are attention by segments."""

import pytest
import torch

from gmpo.attention.kernels import AttentionParams
from gmpo.attention.segments import Reach, Segments, Tree
from gmpo.attention.varlen import sequences, serves, varlen_attention
from tests.attention.dense import dense_attention, visible
from tests.attention.test_attend import ROWS, tensors

CPU = torch.device("cpu")
SCALE = 0.3


def test_the_sequences_of_a_small_row():
    found = sequences([Tree(3, (2, 1)), Tree(1, (1,))], CPU)
    assert found.query_ends.tolist() == [0, 3, 5, 6, 8]
    assert found.key_ends.tolist() == [0, 3, 8, 12, 14]
    assert found.keys.tolist() == [0, 1, 2, 0, 1, 2, 3, 4, 0, 1, 2, 5, 6, 7]
    assert (found.max_queries, found.max_keys) == (3, 5)
    assert found.query_ends.dtype == found.key_ends.dtype == torch.int32


def one_by_one(query, key, value, query_ends, key_ends, max_q, max_k, **options):
    """What `varlen_attn` documents: windows (left, right) of a diagonal aligned at the end."""
    outputs = []
    starts = zip(query_ends.tolist(), key_ends.tolist(), strict=True)
    ends = zip(query_ends.tolist()[1:], key_ends.tolist()[1:], strict=True)
    for (q0, k0), (q1, k1) in zip(starts, ends, strict=False):
        assert q1 - q0 <= max_q and k1 - k0 <= max_k
        diagonal = torch.arange(q1 - q0)[:, None] + (k1 - k0) - (q1 - q0)
        distance = diagonal - torch.arange(k1 - k0)
        left, right = options["window_size"]
        seen = distance >= -right
        seen &= (distance <= left) | (left < 0)
        part = (query[q0:q1], key[k0:k1], value[k0:k1])
        outputs.append(dense_attention(*part, seen, scale=options["scale"])[0])
    return torch.cat(outputs)


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("reach", [Reach(), Reach(window=1), Reach(window=4)])
def test_sequences_see_what_the_row_sees(row, reach, monkeypatch):
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", one_by_one)
    row = ROWS[row]
    *inputs, gradient = tensors(sum(tree.tokens for tree in row), torch.float64)
    inputs = [tensor.requires_grad_() for tensor in inputs]
    expected, _ = dense_attention(*inputs, visible(row, reach), scale=SCALE)
    found = varlen_attention(*inputs, Segments(tuple(row), CPU), reach, AttentionParams(SCALE))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    for one, other in zip(
        torch.autograd.grad(found, inputs, gradient),
        torch.autograd.grad(expected, inputs, gradient),
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_the_gradients_of_a_shared_prompt_add_up_in_float32(monkeypatch):
    """300 completions of one token: their sum of ones would stop at 256 in bfloat16."""
    monkeypatch.setattr(
        "torch.nn.attention.varlen.varlen_attn",
        lambda query, key, value, *sizes, **options: value.sum(0).expand(len(query), 1, 8),
    )
    row = Segments((Tree(1, (1,) * 300),), CPU)
    value = torch.zeros(301, 1, 8, dtype=torch.bfloat16, requires_grad=True)
    query = value.detach()
    output = varlen_attention(query, query, value, row, Reach(), AttentionParams(SCALE))
    output[0].sum().backward()
    assert value.grad[0, 0, 0] == 301 or value.grad[0, 0, 0] == 302  # as bfloat16 rounds 301


def test_it_serves_only_where_there_is_a_gpu():
    query, _, value, _ = tensors(4, torch.bfloat16)
    assert not serves(query, value, Reach(), AttentionParams(SCALE))
