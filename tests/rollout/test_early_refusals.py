"""Options of sampling and engines that can't act are refused by the config, without a model."""

import pytest

from gmpo.config import GMPOConfig

CONTINUOUS = {"use_transformers_continuous_batching": True}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"generation_kwargs": {"num_beams": 2}}, "generation_kwargs has num_beams, which can't"),
        ({"generation_kwargs": {"temprature": 1.0}}, "Did you mean 'temperature'"),
        ({"generation_kwargs": {"pad_token_id": 3}}, "generation_kwargs has pad_token_id"),
        ({"generation_kwargs": {"top_p": 5.0}}, "generation_kwargs: top_p=5.0 is out of range"),
        ({"generation_kwargs": {"top_k": 2.5}}, r"top_k=2.5 \(float\) is not a whole number"),
        ({"generation_kwargs": {"max_new_tokens": 0}}, "max_new_tokens=0 must be 1 or more"),
        (
            {"generation_engine": "shared_prefix", "cache_implementation": "static"},
            "cache_implementation='static' is an option of transformers' generate",
        ),
        (
            {"generation_engine": "shared_prefix", "generation_kwargs": {"max_time": 1.0}},
            "max_time=1.0 is an option of transformers' generate",
        ),
        ({**CONTINUOUS, "generation_engine": "generate"}, "generation_engine='generate' does noth"),
        ({**CONTINUOUS, "cache_implementation": "static"}, "cache_implementation='static' does no"),
        (
            {**CONTINUOUS, "top_p": 0.9},
            "top_p=0.9 can't be combined with .*continuous batching off",
        ),
        ({**CONTINUOUS, "top_k": 3}, "top_k=3 can't be combined with"),
        ({**CONTINUOUS, "min_p": 0.1}, "min_p=0.1 can't be combined with"),
        (
            {**CONTINUOUS, "repetition_penalty": 1.2},
            "repetition_penalty=1.2 can't be combined with",
        ),
        ({**CONTINUOUS, "generation_kwargs": {"stop_strings": ["a"]}}, "stop_strings=.* does not"),
        (
            {**CONTINUOUS, "transformers_continuous_batching_config": {"page_sise": 16}},
            r"'page_sise'.*'page_size'",
        ),
        (
            {**CONTINUOUS, "transformers_continuous_batching_config": {"seed": 1}},
            "'seed', which can't be set",
        ),
        (
            {"transformers_continuous_batching_config": {"page_size": 16}},
            "transformers_continuous_batching_config=.* would do nothing",
        ),
        ({"use_vllm": True, "generation_kwargs": {"num_beams": 2}}, "num_beams"),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, dict) else "",
)
def test_what_cannot_act_is_refused_by_the_config(options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        GMPOConfig(str(tmp_path), **options)


@pytest.mark.parametrize(
    "options",
    [
        {"generation_kwargs": {"temperature": 0.0}, "logps_support": "full"},
        {"generation_kwargs": {"max_new_tokens": 3, "stop_strings": ["a"], "eos_token_id": [4]}},
        {"generation_engine": "generate", "generation_kwargs": {"max_time": 1.0}},
        {**CONTINUOUS, "generation_kwargs": {"max_new_tokens": 3}},
    ],
    ids=lambda value: "+".join(value),
)
def test_what_can_act_passes(options, tmp_path):
    GMPOConfig(str(tmp_path), **options)
