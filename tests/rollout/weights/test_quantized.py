"""What a vLLM engine gets of a quantised policy: floating-point weights, never packed bytes."""

import sys
import types

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoConfig, BitsAndBytesConfig

from gmpo.rollout.vllm.llm import save_config
from gmpo.rollout.weights.adapters import adapter_unsupported_reason
from gmpo.rollout.weights.named import check_publishable, named_weights
from tests.tiny import tiny_model

SIZES = {"hidden_size": 64, "intermediate_size": 96}


class Params4bit(nn.Parameter):
    """Stands for bitsandbytes' class: two numbers of 4 bits in a byte, value = number - 8."""

    quant_state: torch.Size


def packed(weight):
    """Return a stand-in for a weight of whole numbers from -8 to 7."""
    numbers = (weight.flatten() + 8).to(torch.uint8)
    bytes_ = (numbers[::2] << 4 | numbers[1::2])[:, None]
    result = Params4bit(bytes_, requires_grad=False)
    result.quant_state = weight.shape
    return result


def dequantize_4bit(data, shape):
    numbers = torch.stack((data[:, 0] >> 4, data[:, 0] & 15), 1)
    return numbers.float().sub(8).view(shape)


@pytest.fixture
def quantized(monkeypatch):
    """A policy with one layer of whole numbers in 4 bits, and those numbers."""
    functional = types.SimpleNamespace(dequantize_4bit=dequantize_4bit)
    library = types.SimpleNamespace(functional=functional)
    monkeypatch.setitem(sys.modules, "bitsandbytes", library)
    model = tiny_model(**SIZES)
    layer = model.model.layers[0].self_attn.q_proj
    whole = torch.randint(-8, 8, layer.weight.shape, generator=torch.Generator().manual_seed(0))
    layer.weight = packed(whole)
    return model, whole.float()


NAME = "model.layers.0.self_attn.q_proj.weight"


def test_packed_weights_are_published_dequantised(quantized):
    model, whole = quantized
    check_publishable(model)
    assert torch.equal(dict(named_weights(model))[NAME], whole)
    assert dict(named_weights(model, dtype=torch.bfloat16))[NAME].dtype == torch.bfloat16


def test_weights_of_a_size_that_gmpo_cannot_undo_are_refused():
    """Such as FP8, GPTQ or AWQ; before any server is told, and again while they are sent."""
    model = tiny_model(**SIZES)
    layer = model.model.layers[0].self_attn.q_proj
    layer.weight = nn.Parameter(layer.weight.to(torch.float8_e4m3fn), requires_grad=False)
    with pytest.raises(ValueError, match=rf"'{NAME}' is stored as torch.float8_e4m3fn"):
        check_publishable(model)
    with pytest.raises(ValueError, match=r"is stored as torch.float8_e4m3fn"):
        list(named_weights(model))


def test_vllm_is_told_of_a_model_that_is_not_quantised(tmp_path):
    model = tiny_model(**SIZES)
    model.config.quantization_config = BitsAndBytesConfig(load_in_4bit=True)
    save_config(model, str(tmp_path))
    assert not hasattr(AutoConfig.from_pretrained(tmp_path), "quantization_config")
    assert model.config.quantization_config.load_in_4bit  # the policy's own is left alone


@pytest.mark.parametrize("merge", [True, False])
@pytest.mark.parametrize("bits", [4, 8])
def test_qlora_is_published_as_the_trainer_computes_it(bits, merge):
    """The real bitsandbytes, on a CPU: logits of the published weights beside the policy's own."""
    library = pytest.importorskip("bitsandbytes").nn
    model = tiny_model(**SIZES)
    for layer in model.model.layers:
        for name in ("gate_proj", "up_proj", "down_proj"):
            whole = getattr(layer.mlp, name)
            if bits == 4:
                small = library.Linear4bit(
                    whole.in_features, whole.out_features, bias=False, compute_dtype=torch.float32
                )
                small.weight = library.Params4bit(whole.weight.data, requires_grad=False)
            else:
                small = library.Linear8bitLt(
                    whole.in_features, whole.out_features, bias=False, has_fp16_weights=False
                )
                small.weight = library.Int8Params(whole.weight.data, requires_grad=False)
            setattr(layer.mlp, name, small.to("cpu"))

    torch.manual_seed(0)
    policy = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "up_proj"]))
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.requires_grad and merge:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    assert adapter_unsupported_reason(policy) is None

    published = tiny_model(**SIZES)
    published.load_state_dict(dict(named_weights(policy, merge=merge)))
    ids = torch.arange(3, 12)[None]
    with torch.no_grad():
        expected, got = policy(ids).logits, published(ids).logits
    tolerance = 1e-5 if bits == 4 else 0.05  # 8 bits also round what goes into the layer
    torch.testing.assert_close(got, expected, rtol=0, atol=tolerance)
