"""transformers' continuous batching as an engine."""

import pytest
import torch
from peft import PromptTuningConfig, get_peft_model

from gmpo.rollout.engine import Sampling
from gmpo.rollout.local.hf_continuous import ContinuousEngine, num_blocks
from tests.rollout.cases import EOS, VOCABULARY, full_logps, requests, tiny


def engine(model, **options):
    return ContinuousEngine(lambda: model, eos=(EOS,), pad=0, options={"page_size": 16, **options})


def test_on_a_cpu_the_cache_is_no_larger_than_needed_or_held():
    # 10 + 30 tokens are 3 pages of 16, and one to spare; 40 + 30 are 5, and one.
    assert num_blocks([40, 70], page_size=16, room=1000) == 4 + 6
    assert num_blocks([40, 70], page_size=16, room=128) == 8
    assert num_blocks([40, 70], page_size=16, room=0) == 6  # the longest always fits


def test_a_size_that_is_given_stays():
    model = tiny()
    given = engine(model, num_blocks=7)._sized(model, [[0] * 10], 30)
    assert given == {"page_size": 16, "num_blocks": 7}
    assert engine(model)._sized(model, [[0] * 10], 30)["num_blocks"] == 4


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_the_log_probs_are_those_of_the_model_at_the_temperature(temperature):
    model, asked = tiny(), requests(3, 7, count=2)
    groups = engine(model).generate(asked, Sampling(max_new_tokens=6, temperature=temperature))
    assert [len(group) for group in groups] == [2, 2]
    for request, group in zip(asked, groups, strict=True):
        for completion in group:
            expected = full_logps(
                model, request.prompt.ids, completion.ids, temperature=temperature
            )
            torch.testing.assert_close(
                torch.tensor(completion.logps), expected, rtol=1e-4, atol=1e-4
            )


def test_an_end_token_ends_a_completion_and_stays_in_it():
    model = tiny()
    groups = engine(model).generate(
        requests(3, count=8),
        Sampling(max_new_tokens=4, extra={"eos_token_id": list(range(VOCABULARY // 2))}),
    )
    for completion in groups[0]:
        ended = completion.ids[-1] < VOCABULARY // 2
        assert completion.finish_reason == ("stop" if ended else "length")
        assert ended or len(completion.ids) == 4
        assert all(token >= VOCABULARY // 2 for token in completion.ids[:-1])
    assert {completion.finish_reason for completion in groups[0]} == {"stop", "length"} or len(
        groups[0]
    ) == 8


def test_the_same_call_gives_the_same_completions_and_the_global_random_state_stays():
    model, sampling = tiny(), Sampling(max_new_tokens=6)
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    first = engine(model).generate(requests(3, 5), sampling)
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(2)
    assert first == engine(model).generate(requests(3, 5), sampling)
    assert first[0][0].ids != first[0][1].ids


def test_greedy_is_the_most_probable_token_and_the_model_is_left_as_it_was():
    model = tiny().train()
    attention = model.config._attn_implementation
    ((completion,),) = engine(model).generate(
        requests(4, count=1), Sampling(max_new_tokens=5, temperature=0.0)
    )
    assert model.training and model.config._attn_implementation == attention
    ids = requests(4)[0].prompt.ids
    for token in completion.ids:
        with torch.no_grad():
            assert token == int(model.eval()(torch.tensor([ids])).logits[0, -1].argmax())
        ids = [*ids, token]


def test_mixed_precision_reaches_the_managers_thread():
    model, seen = tiny(), []

    def look(module, args, output):
        seen.append((torch.is_autocast_enabled("cpu"), output.dtype))

    model.model.layers[0].mlp.register_forward_hook(look)
    made = ContinuousEngine(
        lambda: model, eos=(EOS,), pad=0, autocast=lambda: torch.autocast("cpu", torch.bfloat16)
    )
    made.generate(requests(3, count=1), Sampling(max_new_tokens=3))
    assert set(seen) == {(True, torch.bfloat16)}
    assert not model._forward_pre_hooks and not model._forward_hooks
    assert not torch.is_autocast_enabled("cpu")


def test_virtual_prompt_tokens_are_refused():
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    model = get_peft_model(tiny(), config)
    assert "virtual prompt tokens" in engine(model).unsupported_reason(Sampling(4))
    assert engine(tiny()).unsupported_reason(Sampling(4)) is None


def test_an_error_in_the_managers_thread_is_the_cause_of_ours():
    model = tiny()
    model.lm_head.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(RuntimeError, match="ontinuous batching") as error:
        engine(model, num_blocks=8).generate(requests(3, count=1), Sampling(max_new_tokens=3))
    assert "division by zero" in str(error.value)
