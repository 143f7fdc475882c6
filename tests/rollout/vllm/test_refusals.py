"""vllm_* options act, or are refused with the reason."""

import dataclasses

import pytest
import torch

from gmpo.rollout.refusals import BOTH_MODES, COLOCATED_ONLY, SERVER_ONLY, check_vllm_options
from gmpo.rollout.settings import RolloutSettings
from gmpo.rollout.vllm.http.fleet import addresses
from gmpo.rollout.vllm.llm import RunOptions, check_ranks, engine_arguments, engine_dtype
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


# -- what a colocated engine is started with ---------------------------------------------------------------------------


def arguments(**options):
    settings = RolloutSettings(use_vllm=True, **options)
    run = RunOptions(seed=17)
    return engine_arguments(settings, tiny_model(), run=run, folder="F", dtype=torch.bfloat16)


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
    settings = RolloutSettings(use_vllm=True)
    elsewhere = engine_arguments(
        settings, tiny_model().to("meta"), run=RunOptions(), folder="F", dtype=torch.bfloat16
    )
    assert "enable_chunked_prefill" not in elsewhere and "block_size" not in elsewhere


@pytest.mark.parametrize(
    "name", ["model", "load_format", "weight_transfer_config", "logprobs_mode"]
)
def test_engine_kwargs_leave_what_is_ours_alone(name):
    with pytest.raises(ValueError, match=rf"'{name}', which gmpo sets itself"):
        arguments(vllm_engine_kwargs={name: "x"})


def test_engine_kwargs_point_to_the_option():
    with pytest.raises(ValueError, match="use the option vllm_max_model_length for it"):
        arguments(vllm_engine_kwargs={"max_model_len": 5})


def test_a_float32_head_is_one_in_vllm_too():
    settings = RolloutSettings(
        use_vllm=True, vllm_engine_kwargs={"hf_overrides": {"rope_theta": 1.0}}
    )
    run = RunOptions(float32_head=True)
    made = engine_arguments(settings, tiny_model(), run=run, folder="F", dtype=torch.bfloat16)
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
