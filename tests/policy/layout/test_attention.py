"""A model attends by segments for a call, in every way that layers are computed again, and not after it."""

import pytest
import torch
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from gmpo.policy.layout import attention
from gmpo.policy.layout.attention import NAME, attention_by_segments, attention_dropout
from gmpo.policy.logprobs import LogProbs
from gmpo.policy.settings import PolicySettings
from tests.policy.cases import (
    assert_same_gradients,
    float64_throughout,
    gradients,
    make_batch,
    make_model,
    weighted_rows,
)

SHARED = PolicySettings(batch_layout="shared_prefix")


@pytest.fixture
def counted(monkeypatch):
    """Layers that attended by segments, one entry per call of our attention function."""
    calls = []

    def count(module, *args, **keywords):
        calls.append(module.layer_idx)
        return attention.segment_attention(module, *args, **keywords)

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, NAME, count)
    return calls


def wrap_layers(model):
    """As accelerate does for FSDP."""
    for number, layer in enumerate(model.model.layers):
        model.model.layers[number] = checkpoint_wrapper(layer)


def wrap_attention(model):
    for layer in model.model.layers:
        layer.self_attn = checkpoint_wrapper(layer.self_attn)


@pytest.mark.parametrize("wrap", [wrap_layers, wrap_attention])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_layers_that_are_computed_again_attend_by_segments(wrap, implementation, counted):
    batch = make_batch()
    found = []
    for again in (False, True):
        model = make_model("gemma3-window", attn_implementation=implementation)
        if again:
            wrap(model)
        logprobs = LogProbs(SHARED)
        logprobs.compute(model, batch)  # has the check behind it
        counted.clear()
        with float64_throughout():
            grads = gradients(logprobs.loss(model, batch, weighted_rows(batch)), model)
        assert sorted(counted) == ([0, 0, 1, 1] if again else [0, 1])
        assert model.config._attn_implementation == implementation
        found.append(
            {name.replace("_checkpoint_wrapped_module.", ""): grads[name] for name in grads}
        )
    assert_same_gradients(found[1], found[0], rtol=1e-12, atol=1e-12)


def test_a_model_attends_as_before_outside_of_the_block(counted):
    model = make_model("llama").eval()
    ids = torch.arange(1, 9)[None]
    before = model(input_ids=ids).logits
    LogProbs(SHARED).compute(model, make_batch())
    counted.clear()
    assert torch.equal(model(input_ids=ids).logits, before)
    assert counted == []


def test_an_error_in_the_block_leaves_the_model_as_it_was():
    model = make_model("llama")
    with pytest.raises(RuntimeError, match="out of luck"), attention_by_segments(model, None):
        assert model.config._attn_implementation == NAME
        raise RuntimeError("out of luck")
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize(
    ("name", "options", "rate"),
    [
        ("llama", {}, 0.0),
        ("llama", {"attention_dropout": 0.25}, 0.25),
        ("gpt2", {"attn_pdrop": 0.5}, 0.5),
        ("gpt2", {"resid_pdrop": 0.5}, 0.0),
    ],
)
def test_the_rate_at_which_attention_drops_weights(name, options, rate):
    assert attention_dropout(make_model(name, **options)) == rate
