"""Products through oneDNN are those of torch, in value and gradient, wherever they are taken."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from gmpo.policy.head import onednn as linear
from gmpo.policy.head.lm_head import Float32Head, Head
from gmpo.policy.head.onednn import OneDnnLinear, add_product, product, product_into, use_onednn

ROWS, INSIDE, OUTSIDE = 37, 260, 300  # OUTSIDE * INSIDE >= SMALLEST


@pytest.fixture(autouse=True)
def faster(monkeypatch):
    """As on a machine where oneDNN is the faster one."""
    monkeypatch.setattr(linear, "is_faster", lambda: True)


@pytest.fixture
def calls(monkeypatch):
    """Number of products that went through oneDNN."""
    through, count = linear._linear, []
    monkeypatch.setattr(linear, "_linear", lambda *args: (count.append(1), through(*args))[1])
    return count


def random(*size, dtype=torch.float32):
    return torch.randn(*size, generator=torch.Generator().manual_seed(sum(size)), dtype=dtype)


def layer(bias=True, dtype=torch.float32):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(INSIDE, OUTSIDE, bias=bias, dtype=dtype))
    use_onednn(model)
    return model[0]


INPUTS = {
    "rows": lambda: random(ROWS, INSIDE),
    "a batch": lambda: random(3, 5, INSIDE),
    "one row": lambda: random(1, INSIDE),
    "a slice": lambda: random(ROWS, 2 * INSIDE)[:, INSIDE:],
    "a transposed one": lambda: random(INSIDE, ROWS).t(),
}


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("name", INPUTS)
def test_a_layer_gives_the_values_and_gradients_of_float64(name, bias, calls):
    found, given = layer(bias), INPUTS[name]().requires_grad_()
    output = found(given)
    weights = random(*output.shape)
    gradients = torch.autograd.grad((output * weights).sum(), [given, *found.parameters()])
    wide = [tensor.detach().double().requires_grad_() for tensor in (given, *found.parameters())]
    expected = F.linear(*wide)
    torch.testing.assert_close(output.double(), expected, rtol=1e-5, atol=1e-5)
    for one, other in zip(
        gradients, torch.autograd.grad((expected * weights).sum(), wide), strict=True
    ):
        torch.testing.assert_close(one.double(), other, rtol=1e-5, atol=1e-4)
    assert len(calls) == 3  # forward, and two products of the backward pass


def test_without_gradients_the_values_are_the_same(calls):
    found, given = layer(), random(ROWS, INSIDE)
    with torch.no_grad():
        assert torch.equal(found(given), found(given.clone().requires_grad_()))
    assert len(calls) == 2


def test_only_what_needs_a_gradient_gets_one(calls):
    found = layer().requires_grad_(False)
    given = random(ROWS, INSIDE).requires_grad_()
    found(given).sum().backward()
    torch.testing.assert_close(
        given.grad, found.weight.sum(0).expand(ROWS, -1), rtol=1e-5, atol=1e-5
    )
    assert found.weight.grad is None and len(calls) == 2


def test_what_onednn_does_not_serve_is_computed_as_ever(calls):
    found, given = layer(), random(ROWS, INSIDE)
    expected = F.linear(given, found.weight, found.bias)
    with torch.backends.mkldnn.flags(enabled=False):
        assert torch.equal(found(given), expected)
    with torch.autocast("cpu", torch.bfloat16):
        assert found(given).dtype == torch.bfloat16
    assert layer(dtype=torch.float64)(given.double()).dtype == torch.float64
    assert found(given[:0]).shape == (0, OUTSIDE)
    assert calls == []


def test_small_layers_and_other_kinds_are_left_alone(calls):
    model = nn.Sequential(nn.Linear(4, 4), Float32Head(4, 4), nn.Bilinear(2, 2, 2))
    use_onednn(model)
    assert [type(module) for module in model] == [OneDnnLinear, Float32Head, nn.Bilinear]
    model[0](torch.ones(2, 4))
    assert calls == []


def test_where_it_is_not_faster_nothing_changes(monkeypatch):
    monkeypatch.setattr(linear, "is_faster", lambda: False)
    assert type(layer()) is nn.Linear


def test_a_layer_can_be_copied_pickled_and_be_a_head():
    found, given = layer(), random(ROWS, INSIDE)
    for other in (copy.deepcopy(found), pickle.loads(pickle.dumps(found))):
        assert torch.equal(other(given), found(given))
    assert Head(found).linear is found


def test_checkpointed_layers_give_the_same_gradients():
    found, given = layer(), random(ROWS, INSIDE).requires_grad_()
    expected = torch.autograd.grad(found(given).square().sum(), [given, *found.parameters()])
    output = torch.utils.checkpoint.checkpoint(found, given, use_reentrant=False)
    again = torch.autograd.grad(output.square().sum(), [given, *found.parameters()])
    for one, other in zip(again, expected, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("block", [2**21, 2**17])
def test_products_of_matrices_are_those_of_float64(block, monkeypatch, calls):
    monkeypatch.setattr(linear, "BLOCK_BYTES", block)
    left, right, states = random(ROWS, OUTSIDE), random(OUTSIDE, INSIDE), random(ROWS, INSIDE)
    torch.testing.assert_close(
        product(left, right).double(), left.double() @ right.double(), rtol=1e-5, atol=1e-4
    )
    out = torch.empty(ROWS, OUTSIDE)
    assert product_into(out, states, right) is out
    torch.testing.assert_close(
        out.double(), states.double() @ right.double().T, rtol=1e-5, atol=1e-4
    )
    total = random(OUTSIDE, INSIDE)
    expected = total.double() + left.double().T @ states.double()
    add_product(total, left, states)
    torch.testing.assert_close(total.double(), expected, rtol=1e-5, atol=1e-4)
    assert len(calls) == (3 if block == 2**21 else 1 + 2 * 3)
