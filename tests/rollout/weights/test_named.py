"""The weights that a checkpoint of the policy would hold, one by one, and the policy untouched."""

import copy

import pytest
import torch
from peft import LoraConfig, PeftModel, PromptTuningConfig, TaskType, get_peft_model
from safetensors.torch import load_file
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from transformers import MixtralConfig, MixtralForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from gmpo.rollout.weights.adapters import (
    adapter_state,
    adapter_unsupported_reason,
    write_adapter,
)
from gmpo.rollout.weights.named import description, named_weights
from tests.tiny import tiny_model

SMALL = {
    "vocab_size": 16,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "bos_token_id": None,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
MODELS = {
    "plain": tiny_model,
    "tied": lambda: tiny_model(tie_word_embeddings=True),
    "mixtral": lambda: MixtralForCausalLM(MixtralConfig(**SMALL, num_local_experts=4)),
    "qwen3_moe": lambda: Qwen3MoeForCausalLM(
        Qwen3MoeConfig(
            **SMALL, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=8, head_dim=8
        )
    ),
}


def adapted(*, biases=False, **options):
    """An adapted model with adapters that do something."""
    torch.manual_seed(0)
    config = LoraConfig(**{"r": 4, "target_modules": "all-linear", **options})
    policy = get_peft_model(tiny_model(attention_bias=biases, mlp_bias=biases), config)
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return policy


@pytest.mark.parametrize("name", MODELS)
def test_names_and_values_are_those_of_a_checkpoint(name, tmp_path):
    model = MODELS[name]()
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    weights = dict(named_weights(model))
    assert weights.keys() == saved.keys()
    assert all(torch.equal(weights[key], saved[key]) for key in saved)


def test_persistent_buffers_come_along():
    model = tiny_model()
    model.model.layers[0].register_buffer("kept", torch.ones(2))
    model.model.layers[0].register_buffer("made", torch.ones(2), persistent=False)
    names = {name for name, _ in named_weights(model)}
    assert "model.layers.0.kept" in names and "model.layers.0.made" not in names


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_rslora": True},
        {"use_dora": True},
        {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 3}},
        {"target_modules": ["q_proj", "embed_tokens"]},
        {"modules_to_save": ["lm_head"], "target_modules": ["q_proj"]},
        {"biases": True, "bias": "lora_only"},
        {"biases": True, "bias": "all", "target_modules": ["q_proj"]},
        {"biases": True, "lora_bias": True},
        {"biases": True, "lora_bias": True, "bias": "all", "target_modules": ["q_proj", "up_proj"]},
    ],
)
def test_adapters_are_merged_as_peft_merges_them_and_the_policy_stays_as_it_is(options):
    policy = adapted(**options)
    before = {name: parameter.clone() for name, parameter in policy.named_parameters()}
    weights = dict(named_weights(policy))
    assert all(
        torch.equal(before[name], parameter) for name, parameter in policy.named_parameters()
    )
    merged = copy.deepcopy(policy).merge_and_unload().state_dict()
    assert {"lm_head.weight", "model.embed_tokens.weight"} <= weights.keys() <= merged.keys()
    for name, weight in weights.items():
        torch.testing.assert_close(weight, merged[name], rtol=1e-6, atol=1e-7)


def test_two_hundred_publications_leave_every_bit_in_place():
    policy = adapted()
    policy.to(torch.bfloat16)
    before = {name: parameter.clone() for name, parameter in policy.named_parameters()}
    first = dict(named_weights(policy))
    for _ in range(200):
        last = dict(named_weights(policy))
    assert all(
        torch.equal(before[name], parameter) for name, parameter in policy.named_parameters()
    )
    assert all(torch.equal(first[name], last[name]) for name in first)


def test_half_precision_is_rounded_once():
    policy = adapted().to(torch.bfloat16)
    layer = policy.base_model.model.model.layers[0].self_attn.q_proj
    a, b = layer.lora_A["default"].weight.double(), layer.lora_B["default"].weight.double()
    exact = layer.base_layer.weight.double() + layer.scaling["default"] * (b @ a)
    merged = dict(named_weights(policy))["model.layers.0.self_attn.q_proj.weight"]
    assert torch.equal(merged, exact.to(torch.bfloat16))


def test_weights_below_adapters():
    policy = adapted()
    weights = dict(named_weights(policy, merge=False))
    base = policy.base_model.model.model.layers[1].mlp.up_proj.base_layer.weight
    assert torch.equal(weights["model.layers.1.mlp.up_proj.weight"], base)
    assert not any("lora" in name for name in weights)


def test_only_floating_point_weights_are_cast():
    model = tiny_model()
    model.register_buffer("count", torch.ones(1, dtype=torch.int64))
    weights = dict(named_weights(model, dtype=torch.bfloat16))
    assert weights.pop("count").dtype == torch.int64
    assert {weight.dtype for weight in weights.values()} == {torch.bfloat16}
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_an_adapter_that_unties_a_tied_weight_is_refused():
    model = tiny_model(tie_word_embeddings=True)
    policy = get_peft_model(model, LoraConfig(r=2, target_modules=["embed_tokens"]))
    with pytest.raises(ValueError, match="shares its weight with"):
        list(named_weights(policy))


def test_prompt_learning_is_refused():
    policy = get_peft_model(
        tiny_model(), PromptTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=2)
    )
    with pytest.raises(ValueError, match="Use LoRA"):
        list(named_weights(policy))


def test_the_description_tells_models_apart():
    assert description(tiny_model()) == description(adapted())
    assert description(tiny_model()) != description(tiny_model(tie_word_embeddings=True))
    assert description(tiny_model()) != description(tiny_model(hidden_size=64))


@pytest.mark.parametrize(
    ("options", "unsupported_reason"),
    [
        ({}, None),
        ({"use_rslora": True}, None),
        ({"use_dora": True}, "a layer has more"),
        ({"bias": "lora_only"}, "more than LoRA matrices"),
        ({"modules_to_save": ["lm_head"], "target_modules": ["q_proj"]}, "more than LoRA matrices"),
    ],
)
def test_which_adapters_an_engine_can_take(options, unsupported_reason):
    found = adapter_unsupported_reason(adapted(**options))
    assert found is None if unsupported_reason is None else found.startswith(unsupported_reason)


def test_a_whole_model_is_no_adapter():
    assert adapter_unsupported_reason(tiny_model()) == "there is no adapter"


def test_a_written_adapter_is_the_trained_one(tmp_path):
    policy = adapted(use_rslora=True, init_lora_weights="gaussian")
    write_adapter(policy, adapter_state(policy), str(tmp_path))
    loaded = PeftModel.from_pretrained(tiny_model(), tmp_path)
    ids = torch.arange(3, 9)[None]
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, policy.eval()(ids).logits)


def test_an_adapter_is_written_without_the_names_of_torchs_wrappers(tmp_path):
    policy, wrapped = adapted(), adapted()
    layers = wrapped.base_model.model.model.layers
    layers[0] = checkpoint_wrapper(layers[0])
    for number, it in enumerate((policy, wrapped)):
        folder = tmp_path / str(number)
        folder.mkdir()
        write_adapter(it, adapter_state(it), str(folder))
    plain = load_file(tmp_path / "0" / "adapter_model.safetensors")
    under_wrappers = load_file(tmp_path / "1" / "adapter_model.safetensors")
    assert under_wrappers.keys() == plain.keys() and len(plain) > 0
    assert all(torch.equal(under_wrappers[name], plain[name]) for name in plain)
