"""transformers' continuous batching as an engine."""

import pytest
import torch

from gmpo.rollout.engine import Sampling
from gmpo.rollout.local.hf_continuous import ContinuousEngine, sized
from tests.rollout.cases import EOS, VOCABULARY, full_logps, requests, tiny


def engine(model, **options):
    return ContinuousEngine(lambda: model, eos=(EOS,), pad=0, options={"page_size": 16, **options})


def test_on_a_cpu_the_cache_is_no_larger_than_the_completions_need():
    # 10 + 30 tokens are 3 pages of 16, and one to spare; 40 + 30 are 5, and one
    options = sized({"page_size": 16}, [[0] * 10, [0] * 40], 30, torch.device("cpu"))
    assert options["num_blocks"] == 4 + 6
    assert sized({}, [[0]], 1, torch.device("cuda"))["max_memory_percent"] == 0.5
    assert sized({"num_blocks": 7}, [[0]], 1, torch.device("cpu")) == {"num_blocks": 7}


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


@pytest.mark.parametrize(
    "option", [{"top_p": 0.9}, {"top_k": 3}, {"min_p": 0.1}, {"repetition_penalty": 1.2}]
)
def test_what_cuts_or_bends_the_distribution_is_refused(option):
    with pytest.raises(ValueError, match=f"{next(iter(option))}=.*continuous batching off"):
        engine(tiny()).generate(requests(3), Sampling(max_new_tokens=2, **option))


def test_what_it_does_not_know_is_refused():
    with pytest.raises(ValueError, match="stop_strings="):
        engine(tiny()).generate(
            requests(3), Sampling(max_new_tokens=2, extra={"stop_strings": ["a"]})
        )
    with pytest.raises(ValueError, match=r"'page_sise'.*'page_size'"):
        ContinuousEngine(tiny, eos=(EOS,), pad=0, options={"page_sise": 16})
