"""vLLM's own server: weights arrive exactly, and whatever becomes of the server, nothing hangs."""

import http.client
import logging
import signal
import threading
import time

import pytest
import torch
from datasets import Dataset

from gmpo.config import GMPOConfig
from gmpo.rollout.engine import Request, Sampling
from gmpo.rollout.settings import RolloutSettings
from gmpo.rollout.vllm.errors import VllmError
from gmpo.rollout.vllm.http.tokens import find_token
from gmpo.rollout.vllm.server import ServerEngine
from gmpo.trainer import GMPOTrainer
from gmpo.types import Prompt
from tests.tiny import tiny_tokenizer
from tests.vllm.servers import PlainServer, Server, free_port
from tests.vllm.small import (
    Conversations,
    base_weights,
    check_conversations,
    distances,
    small_policy,
    train,
    trainer_logps,
)

pytest.importorskip("vllm")
pytestmark = [pytest.mark.vllm, pytest.mark.timeout(1800)]

LONG = {"max_position_embeddings": 8192}  # so that a generation can be interrupted
TIMEOUT = 8.0  # seconds for any request, in the tests of faults
SLACK = 40.0  # what a busy machine may add


@pytest.fixture(scope="module", autouse=True)
def state(tmp_path_factory):
    """Tokens of these tests go where no other run looks."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_STATE_HOME", str(tmp_path_factory.mktemp("state")))
        patch.delenv("VLLM_API_KEY", raising=False)
        yield


@pytest.fixture(scope="module")
def process(tmp_path_factory):
    folder = tmp_path_factory.mktemp("served")
    small_policy(**LONG, seed=3).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    it = Server(
        folder, "--dtype", "float32", "--enable-lora", "--max-lora-rank", "8", "--max-loras", "1"
    )
    yield it
    it.kill()


@pytest.fixture
def server(process):
    """A healthy server with whatever weights it happens to have."""
    return process.ensure()


def engine(server, policy, **options):
    settings = RolloutSettings(
        use_vllm=True,
        vllm_mode="server",
        **{"vllm_server_base_url": server.address, "vllm_server_timeout": 240.0, **options},
    )
    return ServerEngine(settings, lambda: policy, tiny_tokenizer(), eos=(1,))


def logprobs(it):
    return lambda ids: it._score(it.fleet.clients[0], ids)


def request(ids, count=4, seed=3):
    return Request(Prompt(list(ids), "text"), count, seed)


# -- weights ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["whole", "merged adapter", "adapter"])
def test_after_each_optimizer_step_the_server_computes_what_is_trained(server, kind, monkeypatch):
    policy = small_policy(kind, **LONG)
    if kind == "merged adapter":
        monkeypatch.setattr(
            "gmpo.rollout.vllm.server.adapter_unsupported_reason",
            lambda policy: "we want it merged",
        )
    base = base_weights(policy)
    it = engine(server, policy)
    for version in range(3):
        it.publish(version)
        assert distances(logprobs(it), policy).max() < 1e-4
        assert (it.adapter is not None) == (kind == "adapter")
        train(policy, steps=1, seed=version)
    assert all(torch.equal(weight, policy.get_parameter(name)) for name, weight in base.items())
    it.close()


def test_completions_and_their_log_probs(server):
    policy = small_policy(**LONG)
    it = engine(server, policy)
    it.publish(0)
    sampling = Sampling(12, temperature=0.7, top_p=0.9, logps_support="full")
    groups = it.generate([request([5, 6], 3), request([7], 2, seed=8)], sampling)
    assert [len(group) for group in groups] == [3, 2]
    for completion in groups[0]:
        expected = trainer_logps(policy, [5, 6, *completion.ids], sampling.temperature)[1:]
        torch.testing.assert_close(torch.tensor(completion.logps), expected, rtol=0, atol=1e-4)
    assert it.generate([request([7], 2, seed=8)], sampling) == [groups[1]]


def test_samples_go_on_from_their_own_tokens(server):
    policy = small_policy(**LONG)
    it = engine(server, policy)
    it.publish(0)
    work = Conversations([request([5, 6], 3), request([7, 8, 9], 2, seed=8)])
    it.serve(work, Sampling(6))
    check_conversations(policy, work, samples=5)


def test_prompts_that_do_not_fit_into_one_batch_wait(server):
    it = engine(server, small_policy(**LONG))
    it.publish(0)
    requests = [request([5 + number] * 1500, 1, seed=number) for number in range(8)]
    together = it.generate(requests, Sampling(4))
    ((alone,),) = it.generate(requests[7:], Sampling(4))
    assert together[7][0].ids == alone.ids


def test_another_runs_weights_are_noticed(server):
    mine, theirs = small_policy(**LONG), small_policy(**LONG, seed=1)
    it, other = engine(server, mine), engine(server, theirs)
    it.publish(0)
    other.publish(0)
    with pytest.raises(VllmError, match=r"answered from the weights \['gmpo-.*not from 'gmpo-"):
        it.generate([request([5])], Sampling(3))


def test_a_trainer_that_died_while_it_published_does_not_spoil_the_next(server):
    dead = engine(server, small_policy(**LONG, seed=1))
    dead.publish(0)
    client = dead.fleet.clients[0]
    client.start_weight_update()  # and no word more
    policy = small_policy(**LONG)
    it = engine(server, policy)
    it.publish(0)
    assert distances(logprobs(it), policy).max() < 1e-4


# -- who may ---------------------------------------------------------------------------------------


ROUTES = [
    "GET /v1/models",
    "GET /version",
    "GET /server_info",
    "GET /metrics",
    "POST /collective_rpc",
]
ROUTES += [
    "POST /update_weights",
    "POST /start_weight_update",
    "POST /pause",
    "POST /inference/v1/generate",
]


@pytest.mark.parametrize("route", ROUTES)
def test_no_route_without_the_token(server, route):
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
    method, path = route.split()
    connection.request(method, path, body="{}", headers={"Content-Type": "application/json"})
    assert connection.getresponse().status == 401


def test_the_token_was_found_by_the_port(server):
    assert find_token(server.address)


def test_it_listens_on_this_machine_alone(server):
    """In /proc/net/tcp 0100007F is 127.0.0.1, and the state 0A is listening."""
    with open("/proc/net/tcp") as file:
        sockets = [line.split()[1:4] for line in file.readlines()[1:]]
    listening = [local.split(":") for local, _, state in sockets if state == "0A"]
    assert {host for host, port in listening if int(port, 16) == server.port} == {"0100007F"}


def test_a_wrong_token_is_told_at_once(server, monkeypatch):
    monkeypatch.setenv("VLLM_API_KEY", "wrong")
    with pytest.raises(VllmError, match=r"refuses the token \(401\)"):
        engine(server, small_policy(**LONG))


def test_another_model_is_refused_before_training(server):
    with pytest.raises(
        VllmError, match=r"trainer's model has num_hidden_layers=3, this engine's model has 2"
    ):
        engine(server, small_policy(**LONG, num_hidden_layers=3))


def test_a_file_that_the_server_cannot_see_is_named(server, tmp_path, monkeypatch):
    it = engine(server, small_policy(**LONG))
    monkeypatch.setattr(
        it.fleet,
        "update_weights",
        lambda info: [c.update_weights({"path": "/no/w.safetensors"}) for c in it.fleet.clients],
    )
    with pytest.raises(
        VllmError, match=r"can't see the trainer's file '.*'. Set vllm_weight_folder"
    ):
        it.publish(0)


# -- servers that can't be used --------------------------------------------------------------------


def refused(address, match, seconds=240.0):
    """Seconds until a trainer gives up a server, with a message that matches."""
    began = time.monotonic()
    settings = RolloutSettings(
        use_vllm=True, vllm_mode="server", vllm_server_base_url=address, vllm_server_timeout=seconds
    )
    with pytest.raises(VllmError, match=match):
        ServerEngine(settings, lambda: small_policy(**LONG), tiny_tokenizer(), eos=(1,))
    return time.monotonic() - began


def test_no_server_there():
    address = f"http://127.0.0.1:{free_port()}"
    match = (
        f"No healthy vLLM server at {address} within 4 seconds: .* found no server .* Start it "
        "with `gmpo serve"
    )
    assert refused(address, match, seconds=4.0) < 4.0 + SLACK


def test_a_server_that_does_not_answer_is_not_healthy(server):
    server.signal(signal.SIGSTOP)
    try:
        match = (
            rf"No healthy vLLM server at {server.address} within 8 seconds: .* was not answered "
            "within"
        )
        assert refused(server.address, match, seconds=8.0) < 8.0 + SLACK
    finally:
        server.signal(signal.SIGCONT)


def test_another_version_of_vllm(server, monkeypatch):
    monkeypatch.setattr("gmpo.rollout.vllm.http.client.SUPPORTED", "0.31.")
    refused(server.address, r"is vLLM 0\.32\.\S*, and gmpo works with 0\.31\.x. Install that one")


def test_a_server_without_weight_updates(process, tmp_path):
    small_policy(**LONG).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    plain = PlainServer(tmp_path)
    try:
        refused(
            plain.start().address, r"can't be given weights .* Start it with `gmpo serve MODEL`"
        )
    finally:
        plain.kill()


def test_a_prompt_that_is_too_long_is_named_before_it_is_sent(server):
    it = engine(server, small_policy(**LONG))
    with pytest.raises(
        ValueError, match=r"8190 tokens .* vLLM takes 8192. Serve with a larger --max-model-len"
    ):
        it.generate([request([5] * 8190)], Sampling(5))


# -- what can happen to a server -------------------------------------------------------------------


def generating(it):
    """A generation that takes minutes."""
    endless = Sampling(8000, extra={"ignore_eos": True})
    it.generate([request([5, 6], 16), request([7], 16)], endless)


def after(seconds, act):
    timer = threading.Timer(seconds, act)
    timer.start()
    return timer


def test_killed_during_generation(server):
    it = engine(server, small_policy(**LONG), vllm_server_timeout=300.0)
    it.publish(0)
    after(2.0, server.kill)
    began = time.monotonic()
    with pytest.raises(VllmError, match=r"POST .*/inference/v1/generate broke off") as fault:
        generating(it)
    assert time.monotonic() - began < 2 + SLACK
    assert fault.value.raised_on_all_ranks


def test_its_engine_killed_during_generation(server):
    """As where memory runs out: the process that listens still lives for a while."""
    it = engine(server, small_policy(**LONG), vllm_server_timeout=300.0)
    it.publish(0)
    after(2.0, server.kill_engine)
    began = time.monotonic()
    with pytest.raises(
        VllmError, match=r"POST .*/inference/v1/generate (broke off|was answered with 500)"
    ) as fault:
        generating(it)
    assert time.monotonic() - began < 2 + SLACK
    assert fault.value.lost


def test_paused_during_generation(server):
    it = engine(server, small_policy(**LONG))
    it.publish(0)
    it.fleet.clients[0].channel.timeout = TIMEOUT
    server.signal(signal.SIGSTOP)
    began = time.monotonic()
    try:
        with pytest.raises(
            VllmError, match=rf"/inference/v1/generate was not answered within {TIMEOUT:g} seconds"
        ):
            it.generate([request([5])], Sampling(3))
    finally:
        server.signal(signal.SIGCONT)
    assert TIMEOUT <= time.monotonic() - began < TIMEOUT + SLACK


def test_a_generation_longer_than_the_timeout_is_waited_for(server):
    """Also a request that waits in the queue for as long: the server has room for 16 samples."""
    it = engine(server, small_policy(**LONG))
    it.publish(0)
    it.fleet.clients[0].channel.timeout = 1.0
    sampling = Sampling(500, extra={"ignore_eos": True})
    began = time.monotonic()
    groups = it.generate([request([5, 6], 16), request([7], 16)], sampling)
    assert time.monotonic() - began > 2.0  # else this shows nothing
    assert [len(sample.ids) for group in groups for sample in group] == [500] * 32


def test_a_generation_that_is_hung_up_is_ended_on_both_sides(server):
    it = engine(server, small_policy(**LONG))
    it.publish(0)
    after(3.0, it.fleet.clients[0].channel.hang_up)
    with pytest.raises(VllmError, match="/inference/v1/generate"):
        generating(it)
    it.generate([request([5])], Sampling(3))  # the server has dropped the endless ones


def test_more_samples_than_the_server_takes_at_a_time(server):
    """vLLM refuses a request for more than its --max-num-seqs, which is 16 here."""
    it = engine(server, small_policy(**LONG))
    it.publish(0)
    (samples,) = it.generate([request([5, 6], 20, seed=40)], Sampling(6))
    (last,) = it.generate([Request(Prompt([5, 6], "text"), 4, 40, first=16)], Sampling(6))
    assert len(samples) == 20
    assert [sample.ids for sample in samples[16:]] == [sample.ids for sample in last]


@pytest.mark.parametrize("step", ["start_weight_update", "update_weights", "finish_weight_update"])
def test_paused_during_publication(server, step):
    policy = small_policy(**LONG)
    it = engine(server, policy)
    it.publish(0)
    for client in it.fleet.clients:
        client.channel.timeout = TIMEOUT
    real = getattr(it.fleet, step)
    setattr(it.fleet, step, lambda *arguments: (server.signal(signal.SIGSTOP), real(*arguments)))
    began = time.monotonic()
    try:
        with pytest.raises(VllmError, match=rf"was not answered within {TIMEOUT:g} seconds"):
            it.publish(1)
    finally:
        server.signal(signal.SIGCONT)
    assert time.monotonic() - began < TIMEOUT + SLACK
    setattr(it.fleet, step, real)
    for client in it.fleet.clients:
        client.channel.timeout = 240.0
    train(policy, steps=1)
    it.publish(2)  # the server goes on where it stood, and takes new weights
    assert distances(logprobs(it), policy).max() < 1e-4


def test_with_reconnect_training_goes_on_after_a_kill(server, tmp_path, caplog):
    """The server dies in the second collection and comes back; the run ends as if it had not."""
    caplog.set_level(logging.WARNING)
    trainer = run(server, tmp_path, vllm_server_reconnect=600.0)
    seen = []
    real = trainer.stages.engine.generate

    def generate(requests, sampling):
        seen.append(trainer.stages.engine.version)
        if len(seen) == 2:
            server.kill()
            after(1.0, server.launch)
        return real(requests, sampling)

    trainer.stages.engine.generate = generate
    trainer.train()
    assert trainer.state.global_step == 3 and seen == [0, 1, 2]
    assert "The vLLM server is back." in caplog.text
    assert (
        distances(logprobs(trainer.stages.engine), trainer.unwrapped_policy()).max() > 0
    )  # it still serves us


def test_killed_during_publication(server):
    it = engine(server, small_policy(**LONG))
    it.publish(0)
    real = it.fleet.update_weights
    it.fleet.update_weights = lambda info: (server.kill(), real(info))
    began = time.monotonic()
    with pytest.raises(VllmError, match=r"/update_weights (broke off|found no server)") as fault:
        it.publish(1)
    assert time.monotonic() - began < SLACK
    assert fault.value.raised_on_all_ranks


def test_without_reconnect_a_run_ends_with_a_checkpoint(server, tmp_path):
    trainer = run(server, tmp_path)
    real = trainer.stages.engine.generate
    seen = []

    def generate(requests, sampling):
        seen.append(1)
        if len(seen) == 3:
            server.kill()
        return real(requests, sampling)

    trainer.stages.engine.generate = generate
    with pytest.raises(VllmError) as fault:
        trainer.train()
    assert "checkpoint-2" in "".join(fault.value.__notes__)
    assert (tmp_path / "checkpoint-2" / "trainer_state.json").exists()


def run(server, folder, **options):
    prompts = Dataset.from_list([{"prompt": " ".join("abcdefgh"[: 1 + i % 6])} for i in range(8)])
    config = GMPOConfig(
        str(folder),
        use_vllm=True,
        vllm_mode="server",
        vllm_server_base_url=server.address,
        per_device_train_batch_size=8,
        num_generations=4,
        max_completion_length=6,
        max_steps=3,
        learning_rate=1e-2,
        gradient_checkpointing=False,
        save_strategy="no",
        disable_tqdm=True,
        report_to=[],
        use_cpu=True,
        **options,
    )
    policy = small_policy(**LONG)
    return GMPOTrainer(
        policy,
        lambda completions, **columns: [float(len(c)) for c in completions],
        config,
        prompts,
        processing_class=tiny_tokenizer(),
    )
