"""What both engines of this process promise, and how one is chosen."""

import logging
import math
import random

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from transformers import GenerationConfig, MambaConfig, MambaForCausalLM

from gmpo.rollout.build import build_engine
from gmpo.rollout.engine import Request, Sampling
from gmpo.rollout.exactness import CheckedEngine
from gmpo.rollout.local import decoder
from gmpo.rollout.local.cache import SharedPrefixCache
from gmpo.rollout.local.decoder import packed_logits
from gmpo.rollout.local.hf_generate import GenerateEngine
from gmpo.rollout.local.shared_prefix import SharedPrefixEngine, unsupported_reason
from gmpo.rollout.prompts.encoder import PromptEncoder
from gmpo.rollout.settings import RolloutSettings
from gmpo.types import Prompt
from tests.rollout.cases import (
    ENGINES,
    EOS,
    MODELS,
    VOCABULARY,
    full_logps,
    generate,
    only,
    prompts,
    requests,
    shared,
    tiny,
    tokens,
)
from tests.tiny import WORDS, tiny_model, tiny_tokenizer

both = pytest.mark.parametrize("make", ENGINES.values(), ids=ENGINES.keys())


def transformers_greedy(model, prompt: list[int], budget: int, **options) -> list[int]:
    config = GenerationConfig(
        max_new_tokens=budget, do_sample=False, eos_token_id=EOS, pad_token_id=0, **options
    )
    with torch.no_grad():
        output = model.generate(
            input_ids=torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
            generation_config=config,
        )
    return output[0, len(prompt) :].tolist()


@both
@pytest.mark.parametrize("name", MODELS)
def test_greedy_is_transformers_greedy_token_for_token(make, name):
    # Prompts of unlike lengths, shorter and longer than the window of 5 of the models that have
    # one.
    model, asked = tiny(name), requests(4, 11, 1, 11, count=2)
    got = tokens(make(model).generate(asked, Sampling(14, temperature=0.0)))
    expected = [transformers_greedy(model, request.prompt.ids, 14) for request in asked]
    assert got == [[ids, ids] for ids in expected]
    assert len({tuple(ids) for ids in expected}) > 1


@both
@pytest.mark.parametrize(
    "options",
    [
        {"repetition_penalty": 1.7},
        {"no_repeat_ngram_size": 2},
        {"min_new_tokens": 6, "suppress_tokens": [7, 8]},
    ],
    ids=lambda options: next(iter(options)),
)
def test_processors_that_read_the_tokens_act_as_in_transformers(make, options):
    model, asked = tiny(), requests(4, 11, 1, count=1)
    got = tokens(make(model).generate(asked, Sampling(12, temperature=0.0, extra=options)))
    expected = [transformers_greedy(model, request.prompt.ids, 12, **options) for request in asked]
    plain = [transformers_greedy(model, request.prompt.ids, 12) for request in asked]
    assert got == [[ids] for ids in expected]
    assert expected != plain


@both
@pytest.mark.parametrize("name", ["llama", "gemma3", "gemma2", "qwen2_moe"])
@pytest.mark.parametrize("temperature", [0.6, 1.0, 1.9])
def test_reported_logps_are_those_of_a_full_forward(make, name, temperature):
    model, asked = tiny(name), requests(4, 13)
    groups = make(model).generate(asked, Sampling(12, temperature=temperature))
    for request, group in zip(asked, groups, strict=True):
        for completion in group:
            expected = full_logps(
                model, request.prompt.ids, completion.ids, temperature=temperature
            )
            torch.testing.assert_close(
                torch.tensor(completion.logps), expected, rtol=1e-5, atol=1e-5
            )


@both
def test_full_logps_are_of_the_whole_vocabulary_even_where_sampling_is_cut(make):
    model, asked = tiny(), requests(6, count=8)
    sampling = Sampling(
        5, temperature=1.4, top_p=0.6, top_k=4, repetition_penalty=1.3, logps_support="full"
    )
    for completion in make(model).generate(asked, sampling)[0]:
        expected = full_logps(model, asked[0].prompt.ids, completion.ids, temperature=1.4)
        torch.testing.assert_close(torch.tensor(completion.logps), expected, rtol=1e-5, atol=1e-5)
        assert completion.support is None


CUTS = [
    {"top_p": 0.6},
    {"top_k": 4},
    {"min_p": 0.1},
    {"typical_p": 0.5},
    {"no_repeat_ngram_size": 1},
    {"suppress_tokens": [7, 8]},
    {"bad_words_ids": [[7]], "remove_invalid_values": True},
    {"repetition_penalty": 1.6},
    {"repetition_penalty": 1.3, "top_p": 0.8, "top_k": 12, "renormalize_logits": True},
    {"min_new_tokens": 3, "forced_eos_token_id": EOS},
]


@both
@pytest.mark.parametrize("options", CUTS, ids=lambda options: "+".join(options))
def test_sampled_logps_are_of_what_transformers_processors_leave_and_say_what_that_is(
    make, options
):
    model, asked = tiny(), requests(6, count=6)
    groups = make(model).generate(asked, Sampling(6, temperature=1.4, extra=options))
    expected = step_scores(model, asked[0].prompt.ids, groups[0], temperature=1.4, **options)
    cut = 0
    for completion, scores in zip(groups[0], expected, strict=True):
        every = scores.log_softmax(-1)
        wanted = every.gather(-1, torch.tensor(completion.ids)[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(completion.logps), wanted, rtol=1e-5, atol=1e-5)
        kept = scores > -1e30
        cut += int((~kept).sum())
        if completion.support is None:
            assert kept.all()
        else:
            assert torch.equal(completion.support.members(VOCABULARY), kept)
    assert (cut > 0) == (list(options) != ["repetition_penalty"])


def step_scores(model, prompt, completions, **options):
    """Yield what transformers' generate makes of the logits, [len(ids), V] for each completion."""
    config = GenerationConfig(
        max_new_tokens=6,
        eos_token_id=EOS,
        pad_token_id=0,
        do_sample=True,
        **{"top_k": 0, **options},
    )
    config._eos_token_tensor = torch.tensor([EOS])
    config.max_length = len(prompt) + 6
    for completion in completions:
        processors = model._get_logits_processor(
            config, input_ids_seq_length=len(prompt), device="cpu"
        )
        ids = torch.tensor([prompt + completion.ids])
        with torch.no_grad():
            logits = model(input_ids=ids).logits[0]
        yield torch.stack(
            [
                processors(ids[:, :n], logits[None, n - 1])[0]
                for n in range(len(prompt), ids.shape[1])
            ]
        )


@both
def test_logps_of_all_tokens_that_can_be_drawn_sum_to_one(make):
    model, (prompt,) = tiny(), prompts(6)
    groups = make(model).generate(
        [Request(prompt, 1500, 0)], Sampling(1, temperature=1.4, top_p=0.8, top_k=7)
    )
    drawn = {completion.ids[0]: completion.logps[0] for completion in groups[0]}
    members = groups[0][0].support.members(VOCABULARY)[0]
    assert sorted(drawn) == members.nonzero().flatten().tolist()
    assert 1 < len(drawn) <= 7
    assert sum(map(math.exp, drawn.values())) == pytest.approx(1.0, abs=1e-6)


def test_both_engines_write_the_same_for_the_same_seeds():
    model, asked = tiny("gemma3"), requests(4, 11, 7)
    sampling = Sampling(16, temperature=1.2, top_p=0.9, min_p=0.01, repetition_penalty=1.1)
    one, other = shared(model).generate(asked, sampling), generate(model).generate(asked, sampling)
    assert tokens(one) == tokens(other)
    assert [[c.finish_reason for c in group] for group in one] == [
        [c.finish_reason for c in group] for group in other
    ]


@both
def test_a_request_gets_the_same_completions_in_any_company(make):
    engine, asked, sampling = make(tiny()), requests(4, 11, 1, 7), Sampling(16, temperature=1.3)
    together = tokens(engine.generate(asked, sampling))
    assert tokens(engine.generate(asked[::-1], sampling))[::-1] == together
    assert [tokens(engine.generate([request], sampling))[0] for request in asked] == together


@both
def test_a_group_spread_over_ranks_gets_the_samples_of_the_whole_group(make):
    engine, (prompt,) = make(tiny()), prompts(5)
    whole = tokens(engine.generate([Request(prompt, 4, seed=3)], Sampling(10)))[0]
    parts = tokens(
        engine.generate(
            [Request(prompt, 2, seed=3), Request(prompt, 2, seed=3, first=2)], Sampling(10)
        )
    )
    assert parts[0] + parts[1] == whole


@both
def test_seeds_and_samples_differ(make):
    engine, (prompt,) = make(tiny()), prompts(5)
    one, other = tokens(
        engine.generate(
            [Request(prompt, 4, 1), Request(prompt, 4, 2)], Sampling(12, temperature=1.5)
        )
    )
    assert len({tuple(ids) for ids in one + other}) == 8


@both
def test_no_global_random_number_is_used(make):
    engine = make(tiny())
    states = torch.get_rng_state(), random.getstate()
    engine.generate(requests(4, 6), Sampling(6))
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]


@both
def test_the_token_budget_ends_with_length(make):
    (group,) = make(tiny()).generate(requests(4), Sampling(3, extra=only(9)))
    assert [(c.ids, c.finish_reason) for c in group] == [([9, 9, 9], "length")] * 3


@both
def test_an_eos_stays_in_the_completion_and_stops_it(make):
    (group,) = make(tiny()).generate(requests(4), Sampling(3, extra=only(EOS)))
    assert [(c.ids, c.finish_reason) for c in group] == [([EOS], "stop")] * 3


@both
def test_an_eos_as_the_last_token_of_the_budget_is_a_stop(make):
    extra = {
        **only(9, EOS),
        "min_new_tokens": 2,
        "suppress_tokens": only(9, EOS)["suppress_tokens"],
    }
    groups = make(tiny()).generate(requests(4, count=20), Sampling(3, temperature=5.0, extra=extra))
    full = [c for c in groups[0] if len(c.ids) == 3]
    assert {c.finish_reason for c in full if c.ids[-1] == EOS} == {"stop"}
    assert {c.finish_reason for c in full if c.ids[-1] == 9} == {"length"}


@both
@pytest.mark.parametrize("token", [EOS, 7, 11, 13])
def test_every_eos_stops_whoever_named_it(make, token):
    # 2 and 7 are the engine's (tokenizer and generation config), 11 and 13 come with
    # generation_kwargs.
    extra = {**only(token), "eos_token_id": [11, 13]}
    (group,) = make(tiny(), eos=(EOS, 7)).generate(requests(4), Sampling(3, extra=extra))
    assert [(c.ids, c.finish_reason) for c in group] == [([token], "stop")] * 3


@both
def test_a_stop_string_stops_where_the_text_first_holds_it(make):
    model, tokenizer = tiny_model(), tiny_tokenizer()
    a, b = WORDS.index("a"), WORDS.index("b")
    extra = {
        "suppress_tokens": [t for t in range(len(WORDS)) if t not in (a, b)],
        "stop_strings": ["b b"],
    }
    engine = make(model, tokenizer, eos=(1,))
    groups = engine.generate([Request(Prompt([a, b], "a b"), 40, 0)], Sampling(12, extra=extra))
    for completion in groups[0]:
        text = tokenizer.decode(completion.ids)
        assert (completion.finish_reason == "stop") == text.endswith("b b")
        assert "b b" not in text[:-1]
    assert {c.finish_reason for c in groups[0]} == {"stop", "length"}


@both
def test_generation_kwargs_win_over_the_fields(make):
    extra = {"max_new_tokens": 2, "temperature": 0.0}
    groups = make(tiny()).generate(requests(4), Sampling(9, temperature=5.0, extra=extra))
    assert tokens(groups)[0] == [transformers_greedy(tiny(), prompts(4)[0].ids, 2)] * 3


@both
def test_the_model_comes_back_as_it_was(make):
    model = tiny().train()
    model.model.layers[1].eval()
    before = (
        [module.training for module in model.modules()],
        model.generation_config,
        model.config.to_dict(),
    )
    make(model).generate(requests(4), Sampling(3))
    assert (
        [module.training for module in model.modules()],
        model.generation_config,
        model.config.to_dict(),
    ) == before
    assert model.config._attn_implementation == "sdpa"


@both
def test_the_model_comes_back_as_it_was_after_an_error(make):
    model = tiny().train()
    defaults = model.generation_config
    model.lm_head.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        make(model).generate(requests(4), Sampling(3))
    assert all(module.training for module in model.modules())
    assert model.generation_config is defaults
    assert model.config._attn_implementation == "sdpa"


@both
def test_neither_dropout_nor_checkpointing_nor_the_models_own_sampling_defaults_act(make):
    plain, model = tiny(), tiny().train()
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.9
    model.gradient_checkpointing_enable()
    model.generation_config = GenerationConfig(repetition_penalty=3.0, top_k=1, suppress_tokens=[5])
    asked, sampling = requests(4, 9), Sampling(12, temperature=1.5)
    assert tokens(make(model).generate(asked, sampling)) == tokens(
        make(plain).generate(asked, sampling)
    )


@both
def test_active_adapters_write(make):
    plain = tiny()
    model = get_peft_model(
        tiny(), LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    )
    asked, sampling = requests(4, 9), Sampling(12, temperature=0.0)
    got = tokens(make(model).generate(asked, sampling))
    assert got == [
        [transformers_greedy(model.get_base_model(), r.prompt.ids, 12)] * 3 for r in asked
    ]
    assert got != tokens(make(plain).generate(asked, sampling))


@both
def test_mixed_precision_reaches_the_forward_pass(make):
    model = tiny()
    engine = make(model, autocast=lambda: torch.autocast("cpu", dtype=torch.bfloat16))
    request = requests(6)[0]
    for completion in engine.generate([request], Sampling(8))[0]:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            expected = full_logps(model, request.prompt.ids, completion.ids)
        error = (torch.tensor(completion.logps) - expected).abs().max()
        exact = (
            (torch.tensor(completion.logps) - full_logps(model, request.prompt.ids, completion.ids))
            .abs()
            .max()
        )
        assert exact > 1e-4
        assert error < 0.3


@both
def test_nothing_asked_is_nothing_written(make):
    assert make(tiny()).generate([], Sampling(3)) == []


def test_a_static_cache_writes_the_same():
    model, asked = tiny(), requests(4, 9)
    static = generate(model, cache_implementation="static").generate(asked, Sampling(6))
    assert tokens(static) == tokens(generate(model).generate(asked, Sampling(6)))


# -- the choice ------------------------------------------------------------------------------------


def built(model, **settings):
    settings = RolloutSettings(max_completion_length=8, **settings)
    return build_engine(
        settings, lambda: model, PromptEncoder.build(tiny_tokenizer(), model, settings)
    )


def test_auto_takes_the_shared_prefix_where_it_serves_the_model():
    engine = built(tiny_model())
    assert isinstance(engine, CheckedEngine)
    engine.generate(requests_of_words(), Sampling(4))
    assert isinstance(engine.chosen, SharedPrefixEngine)


def requests_of_words():
    return [Request(Prompt([5, 6, 7], "a b c"), 2, 0)]


def test_auto_falls_back_to_generate_and_says_why_once(caplog):
    model = MambaForCausalLM(
        MambaConfig(vocab_size=len(WORDS), hidden_size=16, num_hidden_layers=1, state_size=4)
    )
    engine = built(model)
    with caplog.at_level(logging.WARNING, logger="gmpo"):
        for _ in range(2):
            engine.generate(requests_of_words(), Sampling(4))
    assert len([record for record in caplog.records if record.name.startswith("gmpo")]) == 1
    assert "attention interface" in caplog.text


def test_a_model_that_computes_something_else_over_the_shared_prefix_is_found_out(caplog):
    model = tiny_model()

    def spoil(module, args, kwargs, output):
        if isinstance(kwargs.get("past_key_values"), SharedPrefixCache):
            output.logits = output.logits + torch.linspace(0, 1, output.logits.shape[-1])
        return output

    model.register_forward_hook(spoil, with_kwargs=True)
    engine = built(model)
    with caplog.at_level(logging.WARNING, logger="gmpo"):
        engine.generate(requests_of_words(), Sampling(4))
    assert isinstance(engine.chosen, GenerateEngine)
    assert "deviate" in caplog.text


def shifted_positions(monkeypatch):
    def packed(model, cache, ids, positions, **options):
        decoding = "keep" not in options
        moved = [position + decoding for position in positions]
        return packed_logits(model, cache, ids, moved, **options)

    monkeypatch.setattr(decoder, "packed_logits", packed)


def unseen_prompt_end(monkeypatch):
    bias_of = SharedPrefixCache._prompt_bias

    def shorter(cache, window, query):
        span, bias = bias_of(cache, window, query)
        return slice(span.start, span.stop - 1), None if bias is None else bias[..., :-1]

    monkeypatch.setattr(SharedPrefixCache, "_prompt_bias", shorter)


def unseen_first_token(monkeypatch):
    bias_of = SharedPrefixCache._own_bias

    def later(cache, window, query):
        start, bias = bias_of(cache, window, query)
        hidden = start + 1 if cache.column > start else start
        return hidden, None if bias is None else bias[..., hidden - start :]

    monkeypatch.setattr(SharedPrefixCache, "_own_bias", later)


FAULTS = {
    "none": None,
    "positions": shifted_positions,
    "prompt": unseen_prompt_end,
    "token": unseen_first_token,
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_wrong_positions_and_masks_are_found_out_and_rounding_is_none(fault, dtype, monkeypatch):
    if FAULTS[fault] is not None:
        FAULTS[fault](monkeypatch)
    model = tiny().to(dtype)
    engine = CheckedEngine([shared(model), generate(model)], lambda: model, eos=(EOS,))
    engine.generate(requests(24, count=1), Sampling(1))
    assert isinstance(engine.chosen, SharedPrefixEngine if fault == "none" else GenerateEngine)


def test_shared_prefix_by_name_is_an_error_where_it_fails():
    model = MambaForCausalLM(
        MambaConfig(vocab_size=len(WORDS), hidden_size=16, num_hidden_layers=1, state_size=4)
    )
    with pytest.raises(ValueError, match=r"shared-prefix engine.*attention interface.*'generate'"):
        built(model, generation_engine="shared_prefix").generate(requests_of_words(), Sampling(4))


def test_generate_by_name_or_by_cache_implementation():
    for options in ({"generation_engine": "generate"}, {"cache_implementation": "static"}):
        engine = built(tiny_model(), **options)
        engine.generate(requests_of_words(), Sampling(4))
        assert isinstance(engine.chosen, GenerateEngine)


@pytest.mark.parametrize(
    ("name", "changes", "reason"),
    [
        (
            "llama",
            {"layer_types": ["full_attention", "linear_attention", "full_attention"]},
            "linear_attention",
        ),
        ("llama", {"is_encoder_decoder": True}, "encoder-decoder"),
        ("llama", {"num_kv_shared_layers": 1}, "share keys and values"),
        ("llama", {}, None),
        ("gemma3", {}, None),
    ],
)
def test_obstacles(name, changes, reason):
    model = tiny(name)
    for option, value in changes.items():
        setattr(model.config, option, value)
    got = unsupported_reason(model, Sampling(4))
    assert got is None if reason is None else reason in got


def test_options_of_the_generate_loop_are_an_obstacle():
    assert "max_time" in unsupported_reason(tiny(), Sampling(4, extra={"max_time": 1.0}))


def test_virtual_prompt_tokens_go_to_generate_and_act():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = get_peft_model(
            tiny(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
        ).eval()
        torch.nn.init.normal_(model.prompt_encoder["default"].embedding.weight, std=3.0)
    assert "virtual" in unsupported_reason(model, Sampling(4))
    (request,) = requests(6, count=1)
    defaults = model.generation_config
    got = tokens(generate(model).generate([request], Sampling(10, temperature=0.0)))
    assert got == [[transformers_greedy(model, request.prompt.ids, 10)]]
    assert got != tokens(generate(tiny()).generate([request], Sampling(10, temperature=0.0)))
    assert (
        model.generation_config is defaults and model.get_base_model().generation_config is defaults
    )
