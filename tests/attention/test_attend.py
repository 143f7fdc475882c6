"""Attention by segments is attention with the dense mask: values and all gradients."""

import pytest
import torch

from gmpo.attention import kernels, segments
from gmpo.attention.attend import attend
from gmpo.attention.kernels import AttentionParams
from gmpo.attention.segments import Reach, Segments, Tree
from tests.attention.dense import dense_attention, visible

CPU = torch.device("cpu")
SCALE = 0.3
ROWS = {
    "a group": [Tree(7, (9, 4, 9, 1))],
    "groups": [Tree(5, (3, 3)), Tree(5, (6, 6, 2)), Tree(2, (8, 1))],
    "rows by themselves": [Tree(4, (5,)), Tree(2, (7,)), Tree(9, (0,))],
    "equal rows": [Tree(4, (5,)), Tree(4, (5,))],
    "one token": [Tree(1)],
}
REACHES = {
    "all": Reach(),
    "window": Reach(window=4),
    "wide window": Reach(window=12),
    "chunks": Reach(chunk=4),
}
SINKS = torch.tensor([0.3, -1.0, 2.0, 0.0])
HOW = {
    "plain": {},
    "softcap": {"softcap": 0.7},
    "sinks": {"sinks": SINKS},
    "both": {"softcap": 0.7, "sinks": SINKS},
}


@pytest.fixture(autouse=True)
def short_tiles(monkeypatch):
    """Several tiles in each piece."""
    monkeypatch.setattr(kernels, "QUERIES", 4)
    monkeypatch.setattr(segments, "QUERIES", 3)


def tensors(length, dtype, *, value_size=8):
    """Query, key, value and a gradient of the output: [L, heads, D]."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(4, 8), (2, 8), (2, value_size), (4, value_size)]
    return [torch.randn(length, *shape, generator=generator, dtype=dtype) for shape in shapes]


def compare(row, reach, how, dtype, *, rtol, atol, value_size=8):
    *inputs, gradient = tensors(sum(tree.tokens for tree in row), dtype, value_size=value_size)
    how = {name: value.to(dtype) if name == "sinks" else value for name, value in how.items()}
    leaves = [*inputs, *([how["sinks"]] if "sinks" in how else [])]
    for leaf in leaves:
        leaf.requires_grad_()

    expected, _ = dense_attention(*inputs, visible(row, reach), scale=SCALE, **how)
    expected_gradients = torch.autograd.grad(expected, leaves, gradient)
    found = attend(*inputs, Segments(tuple(row), CPU), reach, AttentionParams(SCALE, **how))
    found_gradients = torch.autograd.grad(found, leaves, gradient)

    torch.testing.assert_close(found, expected, rtol=rtol, atol=atol)
    for one, other in zip(found_gradients, expected_gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=rtol, atol=atol)


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("reach", REACHES)
@pytest.mark.parametrize("how", HOW)
def test_values_and_gradients_in_float64(row, reach, how):
    compare(ROWS[row], REACHES[reach], HOW[how], torch.float64, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("reach", REACHES)
@pytest.mark.parametrize("how", HOW)
def test_values_and_gradients_in_float32(row, reach, how):
    compare(ROWS[row], REACHES[reach], HOW[how], torch.float32, rtol=1e-4, atol=1e-5)


def test_values_that_are_wider_than_keys():
    compare(ROWS["groups"], Reach(), {}, torch.float64, rtol=1e-12, atol=1e-12, value_size=12)


@pytest.mark.parametrize("how", HOW)
def test_both_kernels_agree(how, monkeypatch):
    compare(ROWS["groups"], Reach(window=4), HOW[how], torch.float64, rtol=1e-12, atol=1e-12)
    monkeypatch.setattr(kernels, "_flash_serves", lambda *_: False)
    compare(ROWS["groups"], Reach(window=4), HOW[how], torch.float64, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("reach", REACHES)
def test_calls_of_few_tokens_give_the_same(reach, monkeypatch):
    monkeypatch.setattr(segments, "CALL_TOKENS", 5)
    for row in ROWS.values():
        compare(row, REACHES[reach], {}, torch.float64, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("how", HOW)
def test_bfloat16_rounds_as_bfloat16_does(how):
    compare(ROWS["a group"], Reach(), HOW[how], torch.bfloat16, rtol=0.1, atol=0.1)


def test_no_mask_of_all_pairs_is_ever_made():
    """Nothing of the size of tokens times tokens is made where all is seen."""
    row = Segments((Tree(64, (64, 64, 64)),), CPU)
    *inputs, gradient = tensors(256, torch.float32)
    inputs = [tensor.requires_grad_() for tensor in inputs]

    with LargestTensor() as largest:
        attend(*inputs, row, Reach(), AttentionParams(SCALE)).backward(gradient)
    assert largest.size <= 256 * 4 * 8  # an output


class LargestTensor(torch.utils._python_dispatch.TorchDispatchMode):
    """The number of elements of the largest tensor made within the block."""

    size = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.size = max(self.size, tensor.numel())
        return result
