"""Attention in two parts, and the arithmetic of rows that come and go."""

import pytest
import torch

from gmpo.rollout.local.cache import (
    AttentionParams,
    after_removal,
    bias_of,
    causal_attention,
    grouping,
    part_of_attention,
)

SCALE = 0.3


def plain(query, key, value, seen, *, softcap=None, sinks=None):
    """Softmax attention in float64, written out.  query [h, q, D]; key, value [h, k, D]; seen [q, k]."""
    scores = torch.einsum("hqd,hkd->hqk", query.double(), key.double()) * SCALE
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    weights = torch.where(seen, scores.exp(), 0.0)
    total = weights.sum(-1, keepdim=True)
    if sinks is not None:
        total = total + sinks.double().exp()[:, None, None]
    return torch.einsum("hqk,hkd->hqd", weights / total, value.double()), (weights.sum(-1)).log()


@pytest.fixture
def tensors():
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, 3, n, 8, generator=generator) for n in (4, 11, 11)]


@pytest.mark.parametrize("softcap", [None, 0.7])
@pytest.mark.parametrize("masked", [False, True])
def test_a_part_gives_its_output_and_its_log_sum_exp(tensors, softcap, masked):
    query, key, value = tensors
    seen = torch.ones(4, 11, dtype=torch.bool)
    if masked:
        seen[:, 8:] = False
        seen[2, :5] = False
    bias = bias_of(seen, query.dtype)[None, None] if masked else None
    output, lse = part_of_attention(query, key, value, bias, AttentionParams(SCALE, softcap))
    for row in range(2):
        expected, expected_lse = plain(query[row], key[row], value[row], seen, softcap=softcap)
        torch.testing.assert_close(output[row].double(), expected, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(lse[row].double(), expected_lse, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("softcap", [None, 0.7])
def test_a_query_that_sees_nothing_of_a_part_weighs_it_with_zero(tensors, softcap):
    query, key, value = tensors
    nothing = bias_of(torch.zeros(4, 11, dtype=torch.bool), query.dtype)[None, None]
    output, lse = part_of_attention(query, key, value, nothing, AttentionParams(SCALE, softcap))
    assert output.isfinite().all()
    assert (torch.sigmoid(torch.zeros_like(lse) - lse) == 1).all()


@pytest.mark.parametrize("window", [None, 1, 4, 40])
@pytest.mark.parametrize("how", ["plain", "softcap", "sinks"])
def test_causal_attention_of_a_prompt(tensors, window, how, monkeypatch):
    monkeypatch.setattr("gmpo.rollout.local.cache.QUERIES", 3)  # several blocks of queries
    key, value, query = tensors[1][:1], tensors[2][:1], tensors[1].flip(2)[:1]
    softcap = 0.7 if how == "softcap" else None
    sinks = torch.tensor([0.3, -1.0, 2.0]) if how == "sinks" else None
    position = torch.arange(11)
    distance = position[:, None] - position
    seen = (distance >= 0) & (distance < (window or 11))
    expected, _ = plain(query[0], key[0], value[0], seen, softcap=softcap, sinks=sinks)
    output = causal_attention(query, key, value, window, AttentionParams(SCALE, softcap, sinks))
    torch.testing.assert_close(output[0].double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("count", "removed", "order"),
    [
        (6, [1, 4], [0, 5, 2, 3]),
        (3, [2], [0, 1]),
        (3, [0], [2, 1]),
        (4, [0, 1, 2, 3], []),
        (5, [0, 1], [3, 4, 2]),
        (2, [], [0, 1]),
    ],
)
def test_the_last_ones_fill_the_gaps(count, removed, order):
    assert after_removal(count, removed) == order


def test_rows_of_unlike_groups_form_a_rectangle_and_come_back():
    groups = grouping([1, 0, 1, 1], 3, torch.device("cpu"))
    assert (groups.num_prompts, groups.width) == (3, 3)
    assert groups.row.tolist() == [1, 0, 0, 0, 2, 3, 0, 0, 0]
    rectangle = torch.arange(10, 14)[groups.row].view(3, 3)
    assert rectangle[groups.prompt, groups.place].tolist() == [10, 11, 12, 13]


def test_rows_that_stand_in_order_need_no_index():
    assert grouping([0, 0, 1, 1], 2, torch.device("cpu")).row is None
    assert grouping([0, 1, 1], 2, torch.device("cpu")).row is not None
