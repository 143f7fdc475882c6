"""Engines that compute something else than the policy are found out, whichever engine it is."""

import logging

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    DeepseekV2Config,
    Gemma4TextConfig,
    RecurrentGemmaConfig,
    RecurrentGemmaForCausalLM,
)

from gmpo.rollout.engine import Sampling
from gmpo.rollout.exactness import CheckedEngine, tolerance
from gmpo.rollout.local.hf_continuous import ContinuousEngine
from gmpo.rollout.local.hf_generate import GenerateEngine
from gmpo.rollout.local.shared_prefix import SharedPrefixEngine
from tests.rollout.cases import EOS, SIZES, full_logps, generate, requests, shared, tiny

ASKED = requests(4, 11, 3, 17, count=2)


def checked(model, *engines, remedy=None) -> CheckedEngine:
    return CheckedEngine(engines, lambda: model, eos=(EOS,), remedy=remedy)


def recurrent_gemma():
    """A model whose recurrent layers read the padding on the left."""
    torch.manual_seed(0)
    sizes = {name: value for name, value in SIZES.items() if name != "max_position_embeddings"}
    config = RecurrentGemmaConfig(
        **sizes, lru_width=32, attention_window_size=8, block_types=["recurrent", "attention"]
    )
    model = RecurrentGemmaForCausalLM(config)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.25)
    return model.eval()


def per_layer_gemma():
    """A model whose config has sizes per layer."""
    torch.manual_seed(0)
    config = Gemma4TextConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2, hidden_size_per_layer_input=8,
        vocab_size_per_layer_input=64, sliding_window=5, eos_token_id=EOS, pad_token_id=0,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config).eval()


def assert_exact(model, groups, asked=ASKED):
    """The log-probs of completions are the model's own."""
    for request, group in zip(asked, groups, strict=True):
        for completion in group:
            expected = full_logps(model, request.prompt.ids, completion.ids)
            torch.testing.assert_close(
                torch.tensor(completion.logps), expected, rtol=1e-4, atol=1e-4
            )


def test_a_model_that_reads_its_padding_gets_prompts_of_one_length_at_a_time(caplog):
    model = recurrent_gemma()
    padded = generate(model)
    engine = checked(model, shared(model), padded, generate(model, by_length=True))
    assert engine.deviation(padded, list(range(3, 20))) > 0.01
    with caplog.at_level(logging.WARNING):
        groups = engine.generate(ASKED, Sampling(10))
    assert engine.chosen is engine.engines[-1]
    assert "deviate" in caplog.text and "each length apart" in caplog.text
    assert_exact(model, groups)


def test_a_config_with_sizes_per_layer_is_served_by_the_shared_prefix():
    model = per_layer_gemma()
    engine = checked(model, shared(model), generate(model))
    groups = engine.generate(ASKED, Sampling(10))
    assert isinstance(engine.chosen, SharedPrefixEngine)
    assert_exact(model, groups)


def test_keys_and_values_are_measured_not_computed():
    """Latent attention has keys of (16 + 8) and values of 16 for each of 4 heads, in float32."""
    torch.manual_seed(0)
    config = DeepseekV2Config(
        vocab_size=32, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=4, q_lora_rank=None, kv_lora_rank=16,
        qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=16, first_k_dense_replace=2,
        n_routed_experts=2, eos_token_id=EOS, pad_token_id=0,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).eval()
    engine = shared(model, cache_bytes=10**6)
    with torch.no_grad():
        assert engine._cache_tokens(model) == 10**6 // (2 * 4 * (24 + 16) * 4)


def test_continuous_batching_that_deviates_is_an_error():
    model = tiny()
    engine = ContinuousEngine(lambda: model, eos=(EOS,), pad=0, options={"page_size": 16})
    plain = engine.generate

    def spoiled(asked, sampling):
        groups = plain(asked, sampling)
        for completion in (completion for group in groups for completion in group):
            completion.logps = [logp - 0.1 for logp in completion.logps]
        return groups

    engine.generate = spoiled
    with pytest.raises(
        ValueError, match=r"continuous batching can't serve.*0\.1 nats.*Turn it off"
    ):
        checked(model, engine, remedy="Turn it off.").generate(ASKED, Sampling(3))
    engine.generate = plain
    checked(model, engine, remedy="Turn it off.").generate(ASKED, Sampling(3))


def test_the_last_engine_is_taken_with_a_warning(caplog):
    model = tiny()
    engine = generate(model)
    plain = engine.generate

    def spoiled(asked, sampling):
        groups = plain(asked, sampling)
        for completion in (completion for group in groups for completion in group):
            completion.logps = [float("nan") for _ in completion.logps]
        return groups

    engine.generate = spoiled
    with caplog.at_level(logging.WARNING):
        assert len(checked(model, engine).generate(ASKED, Sampling(3))) == len(ASKED)
    assert "although its log-probs deviate by nan nats" in caplog.text


def test_a_rank_without_prompts_checks_too():
    model = tiny()
    engine = checked(model, generate(model))
    assert engine.generate([], Sampling(3)) == []
    assert isinstance(engine.chosen, GenerateEngine)


def test_one_table_of_tolerances():
    assert tolerance(torch.float32) == 1e-3
    assert tolerance(torch.float32, torch.bfloat16) == 0.15
    assert tolerance(torch.float8_e4m3fn) == 0.15
