"""What gmpo asks of a vLLM server, and what it does not put up with."""

import pytest

from gmpo.rollout.vllm.errors import VllmError
from gmpo.rollout.vllm.http.channel import Channel
from gmpo.rollout.vllm.http.client import INCOMPLETE, Client
from tests.rollout.vllm.fake_vllm import FACTS, FakeVllm, error


def client(server, **options):
    return Client(Channel(server.address, token=None, timeout=2.0, **options))


def test_the_worker_extension_tells_the_facts():
    with FakeVllm() as server:
        facts = client(server).facts()
        assert (facts.backend, facts.longest, facts.workers) == ("gmpo", 128, 1)
        assert server.count("/server_info") == 0


def test_a_server_without_the_extension_is_asked_for_its_configuration():
    config = {
        "model_config": {
            "logprobs_mode": "processed_logprobs",
            "max_model_len": 64,
            "dtype": "torch.bfloat16",
        },
        "weight_transfer_config": {"backend": "nccl"},
        "device_config": {"device": "cuda:0"},
        "scheduler_config": {"max_num_seqs": 48},
        "lora_config": None,
    }
    answers = {
        "/collective_rpc": error(500, "has no attribute 'gmpo_describe'"),
        "/server_info": {"vllm_config": config},
        "/get_world_size": {"world_size": 4},
    }
    with FakeVllm(answers=answers) as server:
        facts = client(server).facts()
    assert (
        facts.backend == "nccl"
        and facts.dtype == "bfloat16"
        and facts.device == "cuda"
        and facts.workers == 4
        and facts.max_num_seqs == 48
    )


@pytest.mark.parametrize(
    ("answers", "message"),
    [
        ({"/version": {"version": "0.27.1"}}, r"is vLLM 0.27.1, and gmpo works with 0.32.x"),
        ({"/version": {"detail": "hello"}}, r"is not a vLLM server"),
        ({"/version": (404, b"{}")}, r"GET .*/version was answered with 404"),
        (
            {"/collective_rpc": (404, b"{}"), "/server_info": (404, b"{}")},
            r"can't be given weights \(GET .*/server_info.* was answered with 404.*Start it with",
        ),
        (
            {"/collective_rpc": {"results": [{**FACTS, "backend": "ipc"}]}},
            r"its weight transfer is 'ipc'",
        ),
    ],
)
def test_servers_that_cannot_be_used_are_refused_with_the_reason(answers, message):
    with FakeVllm(answers=answers) as server, pytest.raises(VllmError, match=message):
        client(server).facts()


def test_while_weights_are_replaced_the_server_has_no_version_of_ours():
    with FakeVllm() as server:
        client(server).start_weight_update()
        assert server.version == INCOMPLETE
        client(server).update_weights({"path": "x"})
        client(server).finish_weight_update("run:7")
        assert server.version == "run:7"
        paths = [path for path, _ in server.requests]
    assert paths == [
        "/pause",
        "/update_weight_version",
        "/start_weight_update",
        "/update_weights",
        "/finish_weight_update",
        "/resume",
        "/reset_prefix_cache",
        "/update_weight_version",
    ]


def test_an_update_that_a_dead_trainer_has_left_open_is_ended():
    with FakeVllm() as server:
        client(server).start_weight_update()  # and the trainer dies
        client(server).start_weight_update()
        assert server.active
        client(server).finish_weight_update("run:1")
        assert server.version == "run:1"


def test_a_prefix_cache_in_use_by_others_is_an_error():
    with (
        FakeVllm(answers={"/reset_prefix_cache": {"success": False}}) as server,
        pytest.raises(VllmError, match="Does somebody else use it"),
    ):
        client(server).reset_prefix_cache()
