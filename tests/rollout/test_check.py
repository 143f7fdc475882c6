"""vllm_* options act, or are refused with the reason."""

import dataclasses

import pytest
import torch

from gmpo.config import GMPOConfig
from gmpo.rollout.check import (
    BOTH_MODES,
    COLOCATED_ONLY,
    SERVER_ONLY,
    check_vllm_options,
)
from gmpo.rollout.sampling import sampling_from
from gmpo.rollout.settings import RolloutSettings
from gmpo.rollout.vllm.http.fleet import addresses
from gmpo.rollout.vllm.llm import RunOptions, check_ranks, engine_arguments, engine_dtype
from gmpo.rollout.vllm.sampling import vllm_sampling
from tests.tiny import tiny_model

OTHER = {  # a value of each option that is not its default
    "vllm_mode": "server",
    "vllm_structured_outputs_regex": "a+",
    "vllm_publication_tolerance": 0.5,
    "vllm_model_impl": "auto",
    "vllm_enable_sleep_mode": True,
    "vllm_gpu_memory_utilization": 0.5,
    "vllm_max_model_length": 64,
    "vllm_tensor_parallel_size": 2,
    "vllm_engine_kwargs": {"enforce_eager": True},
    "vllm_server_base_url": "http://x:1",
    "vllm_server_addresses": ["http://x:1"],
    "vllm_server_host": "x",
    "vllm_server_port": 1,
    "vllm_server_timeout": 1.0,
    "vllm_server_reconnect": 1.0,
    "vllm_group_port": 1,
    "vllm_weight_transfer": "file",
    "vllm_weight_folder": "/x",
}


def test_every_option_is_known_to_the_rules():
    names = {
        field.name
        for field in dataclasses.fields(RolloutSettings)
        if field.name.startswith("vllm_")
    }
    assert names == {*BOTH_MODES, *COLOCATED_ONLY, *SERVER_ONLY} == OTHER.keys()


@pytest.mark.parametrize("name", OTHER)
def test_without_vllm_its_options_are_refused(name):
    with pytest.raises(ValueError, match=rf"{name}=.* would do nothing. Set use_vllm=True"):
        check_vllm_options(RolloutSettings(**{name: OTHER[name]}))


@pytest.mark.parametrize("name", SERVER_ONLY)
def test_a_colocated_engine_refuses_what_is_for_servers(name):
    with pytest.raises(ValueError, match=rf"{name}=.* would do nothing"):
        check_vllm_options(RolloutSettings(use_vllm=True, **{name: OTHER[name]}))


@pytest.mark.parametrize("name", COLOCATED_ONLY)
def test_a_server_refuses_what_is_for_a_colocated_engine(name):
    with pytest.raises(
        ValueError, match=rf"{name}=.* would do nothing. Give it to the server \(gmpo serve MODEL"
    ):
        check_vllm_options(
            RolloutSettings(use_vllm=True, vllm_mode="server", **{name: OTHER[name]})
        )


@pytest.mark.parametrize(
    "options",
    [
        {"generation_engine": "generate"},
        {"cache_implementation": "static"},
        {"ds3_gather_for_generation": False},
    ],
)
def test_vllm_refuses_what_is_for_transformers(options):
    with pytest.raises(ValueError, match="would do nothing"):
        check_vllm_options(RolloutSettings(use_vllm=True, **options))


def test_the_defaults_of_all_engines_are_accepted():
    check_vllm_options(RolloutSettings())
    check_vllm_options(RolloutSettings(use_vllm=True))
    check_vllm_options(RolloutSettings(use_vllm=True, vllm_mode="server"))


def test_which_servers():
    server = {"use_vllm": True, "vllm_mode": "server"}
    assert addresses(RolloutSettings(**server)) == ["http://127.0.0.1:8000"]
    assert addresses(RolloutSettings(**server, vllm_server_host="n1", vllm_server_port=9)) == [
        "http://n1:9"
    ]
    assert addresses(RolloutSettings(**server, vllm_server_base_url="https://a/b")) == [
        "https://a/b"
    ]
    assert addresses(
        RolloutSettings(**server, vllm_server_addresses=["http://a:1", "http://b:1"])
    ) == [
        "http://a:1",
        "http://b:1",
    ]


def test_one_server_by_two_names_is_refused():
    settings = RolloutSettings(
        use_vllm=True,
        vllm_mode="server",
        vllm_server_base_url="http://a:1",
        vllm_server_addresses=["http://b:1"],
    )
    with pytest.raises(ValueError, match=r"are both set. Keep one"):
        check_vllm_options(settings)


# -- what a colocated engine is started with -------------------------------------------------------


def arguments(model=None, run=None, **options):
    settings = RolloutSettings(use_vllm=True, **options)
    return engine_arguments(
        settings,
        model or tiny_model(),
        run=run or RunOptions(seed=17),
        sampling=vllm_sampling(sampling_from(settings), eos=(1,)),
        folder="F",
        dtype=torch.bfloat16,
    )


def test_options_reach_vllm():
    made = arguments(
        vllm_gpu_memory_utilization=0.5,
        vllm_max_model_length=64,
        vllm_enable_sleep_mode=True,
        vllm_model_impl="auto",
    )
    assert (made["gpu_memory_utilization"], made["max_model_len"]) == (0.5, 64)
    assert made["enable_sleep_mode"] and made["model_impl"] == "auto"
    assert (made["seed"], made["dtype"], made["load_format"]) == (17, "bfloat16", "dummy")


def test_engine_kwargs_go_through_and_win():
    made = arguments(vllm_engine_kwargs={"enforce_eager": True, "seed": 3, "max_num_seqs": 7})
    assert (made["enforce_eager"], made["seed"], made["max_num_seqs"]) == (True, 3, 7)


def test_on_cpus_prompts_are_read_in_one_piece_unless_the_user_says_otherwise():
    assert arguments()["enable_chunked_prefill"] is False
    assert arguments()["block_size"] == 32
    assert arguments(vllm_engine_kwargs={"block_size": 64})["block_size"] == 64
    assert (
        arguments(vllm_engine_kwargs={"enable_chunked_prefill": True})["enable_chunked_prefill"]
        is True
    )
    elsewhere = arguments(model=tiny_model().to("meta"))
    assert "enable_chunked_prefill" not in elsewhere and "block_size" not in elsewhere


@pytest.mark.parametrize(
    "name",
    ["model", "load_format", "weight_transfer_config", "logprobs_mode", "return_sampling_mask"],
)
def test_engine_kwargs_leave_what_is_ours_alone(name):
    with pytest.raises(ValueError, match=rf"'{name}', which gmpo sets itself"):
        arguments(vllm_engine_kwargs={name: "x"})


def test_engine_kwargs_point_to_the_option():
    with pytest.raises(ValueError, match="use the option vllm_max_model_length for it"):
        arguments(vllm_engine_kwargs={"max_model_len": 5})


def test_a_float32_head_is_one_in_vllm_too():
    made = arguments(
        run=RunOptions(float32_head=True), vllm_engine_kwargs={"hf_overrides": {"rope_theta": 1.0}}
    )
    assert made["hf_overrides"] == {"rope_theta": 1.0, "head_dtype": "float32"}


def test_the_engine_computes_in_what_the_trainer_computes_in():
    settings = RolloutSettings(use_vllm=True)
    assert engine_dtype(settings, tiny_model(), None) == torch.float32
    assert engine_dtype(settings, tiny_model(dtype=torch.bfloat16), None) == torch.bfloat16
    mixed = engine_dtype(settings, tiny_model(), lambda: torch.autocast("cpu", torch.bfloat16))
    assert mixed == torch.bfloat16
    wanted = RolloutSettings(use_vllm=True, vllm_engine_kwargs={"dtype": "half"})
    assert engine_dtype(wanted, tiny_model(), None) == torch.float16


def test_ranks_that_share_an_engine_divide_all_ranks():
    check_ranks(1)
    with pytest.raises(ValueError, match="vllm_tensor_parallel_size=2 does not divide the 1 ranks"):
        check_ranks(2)


@pytest.mark.parametrize(
    ("options", "mode", "token_sets"),
    [
        ({}, "raw_logprobs", False),
        ({"temperature": 0.7}, "raw_logprobs", False),
        ({"top_k": 20, "top_p": 0.9}, "processed_logprobs", True),
        ({"repetition_penalty": 1.1}, "processed_logprobs", False),
        ({"top_k": 20, "logps_support": "full"}, "raw_logprobs", False),
    ],
)
def test_an_engine_reports_what_the_trainer_scores(options, mode, token_sets):
    made = arguments(**options)
    assert (made["logprobs_mode"], made["return_sampling_mask"]) == (mode, token_sets)


# -- generation_kwargs and the distribution, before weights are loaded -----------------------------


def accepted(**options):
    GMPOConfig("out", use_vllm=True, vllm_mode="server", use_cpu=True, **options)


def refused(match, **options):
    with pytest.raises(ValueError, match=match):
        accepted(**options)


@pytest.mark.parametrize("name", ["num_beams", "tempreature", "seed", "n"])
def test_options_that_vllm_does_not_have_are_told_by_the_config(name):
    refused(rf"generation_kwargs has \['{name}'\]", generation_kwargs={name: 2})


def test_options_that_vllm_has_are_accepted_under_both_names():
    accepted(generation_kwargs={"max_new_tokens": 4, "stop": ["x"]})
    accepted(generation_kwargs={"do_sample": True, "ignore_eos": True})


def test_cuts_are_scored_if_top_k_is_among_them():
    accepted(top_k=50)
    accepted(top_k=50, top_p=0.9, min_p=0.01, repetition_penalty=1.1)
    accepted(generation_kwargs={"top_k": 50, "top_p": 0.9})
    accepted(repetition_penalty=1.1)
    refused("top_p=0.9 can't be scored .* without a top_k. Set top_k", top_p=0.9)
    refused("min_p=0.1 can't be scored .* without a top_k", min_p=0.1)


def test_what_the_trainer_cannot_do_again_is_refused_also_with_top_k():
    for name in ("presence_penalty", "logit_bias", "min_tokens"):
        refused(f"{name}=.* can't be scored", top_k=50, generation_kwargs={name: 1})
    refused("regex=.* can't be scored", top_k=50, vllm_structured_outputs_regex="a")
