"""Sampling options on their way to vLLM."""

import pytest

from gmpo.rollout.engine import Request, Sampling
from gmpo.rollout.vllm.sampling import check_room, completion, engine_seed, vllm_sampling
from gmpo.types import Prompt


def options(extra=None, *, regex=None, **changes):
    return vllm_sampling(
        Sampling(max_new_tokens=8, extra=extra or {}, **changes), eos=(1, 2), regex=regex
    )


def test_every_field_has_its_name_in_vllm():
    it = options(temperature=0.7, top_p=0.9, top_k=5, min_p=0.1, repetition_penalty=1.2)
    assert it.options == {
        "max_tokens": 8,
        "temperature": 0.7,
        "top_p": 0.9,
        "top_k": 5,
        "min_p": 0.1,
        "repetition_penalty": 1.2,
        "stop_token_ids": [1, 2],
    }


def test_generation_kwargs_win_under_both_names():
    assert options({"max_new_tokens": 3}).options["max_tokens"] == 3
    assert options({"max_tokens": 3}).options["max_tokens"] == 3
    assert options({"temperature": 0.5}).temperature == 0.5
    assert options({"do_sample": False}).temperature == 0.0
    assert options({"stop_strings": "END"}).options["stop"] == ["END"]


def test_further_end_tokens_are_added_to_the_models():
    assert options({"eos_token_id": 7}).options["stop_token_ids"] == [1, 2, 7]
    assert options({"stop_token_ids": [7, 1]}).options["stop_token_ids"] == [1, 2, 7]


def test_end_tokens_that_are_to_be_ignored_end_nothing():
    """vLLM's own ignore_eos knows nothing of further stop tokens."""
    options = vllm_sampling(
        Sampling(4, extra={"ignore_eos": True, "stop_token_ids": [9]}), eos=(1, 2)
    ).options
    assert options["stop_token_ids"] == [9] and options["ignore_eos"]


@pytest.mark.parametrize(
    "name", ["num_beams", "n", "seed", "logprobs", "prompt_logprobs", "tempreature"]
)
def test_what_vllm_does_not_know_or_gmpo_sets_is_refused(name):
    with pytest.raises(ValueError, match=rf"generation_kwargs has \['{name}'\]"):
        options({name: 1})


def test_a_regex_goes_along_and_is_refused_twice():
    assert options(regex="a+").options["structured_outputs"] == {"regex": "a+"}
    assert options(regex="a+").restricted and not options().restricted
    with pytest.raises(ValueError, match="the same thing twice"):
        options({"structured_outputs": {"regex": "b"}}, regex="a+")


def test_on_scaled_logits_the_temperature_is_one_and_what_is_added_to_logits_is_scaled():
    """Penalty a and temperature T: (l - a) / T = l / T - a / T."""
    it = options(
        {"presence_penalty": 0.6, "logit_bias": {"3": 1.0}}, temperature=0.5, repetition_penalty=1.2
    )
    assert it.logits_scale == 2.0
    scaled = it.on_scaled_logits()
    assert (scaled["temperature"], scaled["presence_penalty"], scaled["logit_bias"]) == (
        1.0,
        1.2,
        {"3": 2.0},
    )
    assert (
        scaled["repetition_penalty"] == 1.2
    )  # divides or multiplies logits: commutes with a scale
    assert it.options["presence_penalty"] == 0.6


def test_greedy_stays_greedy_on_unscaled_logits():
    assert options(temperature=0.0).logits_scale == 1.0
    assert options(temperature=0.0).on_scaled_logits()["temperature"] == 0.0


@pytest.mark.parametrize(
    ("changes", "truncated"),
    [
        ({}, False),
        ({"temperature": 0.3}, False),
        ({"top_p": 0.9}, True),
        ({"top_k": 3}, True),
        ({"min_p": 0.1}, True),
    ],
)
def test_truncation_is_known(changes, truncated):
    assert options(**changes).truncated == truncated


def test_seeds_leave_room_for_the_number_of_a_sample():
    assert engine_seed(Request(Prompt([1], ""), 4, 2**64 - 1)) < 2**62
    assert engine_seed(Request(Prompt([1], ""), 4, 12)) == 12


@pytest.mark.parametrize("seed", [77, 2**62 - 2, 2**64 - 1])
def test_a_sample_has_one_seed_however_its_group_is_cut(seed):
    """vLLM adds a sample's number within its request to the seed."""

    def seeds(count, first):
        start = engine_seed(Request(Prompt([1], ""), count, seed, first))
        return [start + number for number in range(count)]

    assert seeds(2, 0) + seeds(2, 2) == seeds(1, 0) + seeds(3, 1) == seeds(4, 0)


def test_what_does_not_fit_is_named():
    request = Request(Prompt([3] * 10, "the prompt"), 1, 0)
    check_room([request], options().options, 18, remedy="Do")
    with pytest.raises(
        ValueError, match=r"completion of up to 8 make 18, and vLLM takes 17. Do, lower"
    ):
        check_room([request], options().options, 17, remedy="Do")


def test_a_completion_is_finished_and_has_a_log_prob_per_token():
    assert completion((4, 5), "length", (-1.0, -2.0)).ids == [4, 5]
    with pytest.raises(ValueError, match="ended by 'abort'"):
        completion([4], "abort", [-1.0])
    with pytest.raises(ValueError, match="1 log-probs came for 2 tokens"):
        completion([4, 5], "stop", [-1.0])
    assert completion([4], "stop", [-1.0], report=False).logps is None


@pytest.mark.parametrize("logp", [float("nan"), float("inf"), -9999.0])
def test_log_probs_that_are_not_finite_are_refused_also_if_not_reported(logp):
    for report in (True, False):
        with pytest.raises(ValueError, match=r"token 1 \(id 5\) .* logits are not finite"):
            completion([4, 5], "stop", [-1.0, logp], report=report)


@pytest.mark.parametrize(
    ("changes", "mode", "token_sets", "reported"),
    [
        ({}, "raw_logprobs", False, True),
        ({}, "processed_logprobs", False, True),
        ({"top_k": 3, "logps_support": "full"}, "raw_logprobs", False, True),
        ({"top_k": 3, "logps_support": "full"}, "processed_logprobs", True, False),
        ({"top_k": 3}, "processed_logprobs", True, True),
        ({"repetition_penalty": 1.2}, "processed_logprobs", False, True),
        ({"top_k": 3}, "processed_logprobs", False, "return-sampling-mask"),
        ({"top_k": 3}, "raw_logprobs", False, "return-sampling-mask"),
        ({"repetition_penalty": 1.2}, "raw_logprobs", False, "logprobs-mode processed_logprobs"),
    ],
)
def test_log_probs_are_used_if_they_are_of_what_is_scored(changes, mode, token_sets, reported):
    """With "sampled" a distribution that can't be known is an error, not another distribution."""
    it = options(**changes)
    if isinstance(reported, bool):
        assert it.is_reported(mode, token_sets=token_sets) == reported
    else:
        with pytest.raises(
            ValueError, match=f"Start the server with `gmpo serve MODEL --{reported}"
        ):
            it.is_reported(mode, token_sets=token_sets)


def test_an_engine_with_token_sets_takes_the_most_probable_token_by_a_cut():
    """vLLM refuses temperature 0 and top_k 0 there."""
    made = options(temperature=0.0, top_p=0.5).for_engine(scaled_logits=True, token_sets=True)
    assert (made["temperature"], made["top_k"], made["top_p"]) == (1.0, 1, 1.0)
    made = options(temperature=0.0).for_engine(scaled_logits=True, token_sets=False)
    assert made["temperature"] == 0.0


def test_token_sets_are_those_that_came():
    sets = completion([4, 5], "stop", [-1.0, -2.0], kept=[[4, 9], [2, 5, 7]]).support
    assert sets.members(10).nonzero().tolist() == [[0, 4], [0, 9], [1, 2], [1, 5], [1, 7]]
    with pytest.raises(ValueError, match="1 sets of tokens came for 2 tokens"):
        completion([4, 5], "stop", [-1.0, -2.0], kept=[[4]])
    with pytest.raises(ValueError, match=r"token 1 \(id 5\) is not among those"):
        completion([4, 5], "stop", [-1.0, -2.0], kept=[[4], [7]])
