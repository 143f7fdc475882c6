"""Attention of queries to keys, and its log-sum-exp."""

import pytest
import torch

from gmpo.attention import kernels
from gmpo.attention.kernels import AttentionParams, attend_to, bias_of
from gmpo.attention.merge import merge
from tests.attention.dense import dense_attention

SCALE = 0.3


@pytest.fixture
def tensors():
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, 6, 4, 8), (2, 3, 11, 8), (2, 3, 11, 8)]
    return [torch.randn(*shape, generator=generator) for shape in shapes]


@pytest.mark.parametrize("kernel", ["flash", "plain"])
@pytest.mark.parametrize("softcap", [None, 0.7])
@pytest.mark.parametrize("masked", [False, True])
def test_a_part_gives_its_output_and_its_log_sum_exp(tensors, kernel, softcap, masked, monkeypatch):
    if kernel == "plain":
        monkeypatch.setattr(kernels, "_flash_serves", lambda *_: False)
    monkeypatch.setattr(kernels, "QUERIES", 3)
    query, key, value = tensors
    seen = torch.ones(4, 11, dtype=torch.bool)
    if masked:
        seen[:, 8:] = False
        seen[2, :5] = False
    bias = bias_of(seen, query.dtype)[None, None] if masked else None

    output, lse = attend_to(query, key, value, AttentionParams(SCALE, softcap), bias=bias)
    for number in range(2):
        one = [tensor[number].transpose(0, 1).double() for tensor in tensors]
        expected, expected_lse = dense_attention(*one, seen, scale=SCALE, softcap=softcap)
        found = output[number].transpose(0, 1).double()
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(lse[number].T.double(), expected_lse, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("softcap", [None, 0.7])
def test_a_query_that_sees_nothing_of_a_part_weighs_it_with_zero(tensors, softcap):
    query, key, value = tensors
    nothing = bias_of(torch.zeros(4, 11, dtype=torch.bool), query.dtype)[None, None]
    output, lse = attend_to(query, key, value, AttentionParams(SCALE, softcap), bias=nothing)
    assert output.isfinite().all()
    merged, _ = merge(torch.ones_like(output), torch.zeros_like(lse), output, lse)
    assert (merged == 1).all()
