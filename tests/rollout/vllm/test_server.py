"""The server engine against servers that behave and servers that don't."""

import random
import time
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from gmpo.rollout.engine import Completion, Request, Sampling
from gmpo.rollout.settings import RolloutSettings
from gmpo.rollout.vllm.errors import VllmError
from gmpo.rollout.vllm.http.tokens import token_file
from gmpo.rollout.vllm.server import ServerEngine
from gmpo.types import Prompt
from tests.rollout.vllm.fake_vllm import (
    FACTS,
    GENERATE,
    FakeVllm,
    breaking_off,
    dripping,
    error,
    events_of,
    silent,
    stream,
)
from tests.tiny import tiny_model, tiny_tokenizer

SAMPLING = Sampling(max_new_tokens=8)


def engine(*servers, model=None, **options):
    model = model or tiny_model()
    settings = RolloutSettings(
        use_vllm=True,
        vllm_mode="server",
        vllm_server_addresses=[server.address for server in servers],
        **{"vllm_server_timeout": 2.0, "vllm_publication_tolerance": 1e9, **options},
    )
    return ServerEngine(settings, lambda: model, tiny_tokenizer(), eos=(1,))


def request(*ids, count=2, seed=5):
    return Request(Prompt(list(ids), "text"), count, seed)


def prompts_of(server):
    """The prompts that a server was asked to complete, without the text of the check."""
    bodies = [body for path, body in server.requests if path == GENERATE]
    return [body["token_ids"] for body in bodies if "seed" in body["sampling_params"]]


def test_each_prompt_is_sent_once_with_its_count_and_its_seed():
    with FakeVllm() as server:
        it = engine(server)
        it.publish(0)
        completions = it.generate([request(3, 4), request(7, count=3, seed=2**63 + 1)], SAMPLING)
        bodies = [
            body
            for path, body in server.requests
            if path == GENERATE and "seed" in body["sampling_params"]
        ]
    assert completions[0] == [Completion([4, number, 1], "stop", [-0.5] * 3) for number in range(2)]
    assert [len(group) for group in completions] == [2, 3]
    assert sorted((body["token_ids"], body["sampling_params"]["n"]) for body in bodies) == [
        ([3, 4], 2),
        ([7], 3),
    ]
    assert {body["sampling_params"]["seed"] for body in bodies} == {5, (2**63 + 1) % 2**62}


def test_a_group_over_ranks_gets_the_samples_of_the_whole_group():
    """The fake draws sample i of a request with its seed plus i, as vLLM does."""

    def drawing(server, body):
        params = body["sampling_params"]
        sampled = []
        for number in range(params["n"]):
            ids = random.Random(params["seed"] + number).choices(range(2, 16), k=5)
            logprobs = {"content": [{"token_id": token, "logprob": -0.5} for token in ids]}
            changes = {"token_ids": ids, "logprobs": logprobs, "finish_reason": "length"}
            sampled.append(server.choice(number, body, **changes))
        return sampled

    with FakeVllm(choices=drawing) as server:
        it = engine(server)
        it.publish(0)
        prompt = Prompt([3], "text")
        (whole,) = it.generate([Request(prompt, 4, 77)], SAMPLING)
        parts = it.generate([Request(prompt, 2, 77, 0), Request(prompt, 2, 77, 2)], SAMPLING)
    assert parts[0] + parts[1] == whole
    assert len({tuple(completion.ids) for completion in whole}) == 4


def test_weights_are_published_when_the_version_changes_and_only_then():
    with FakeVllm() as server:
        it = engine(server)
        it.publish(0)
        it.publish(0)
        assert server.count("/start_weight_update") == 1
        it.publish(3)
        it.generate([request(3)], SAMPLING)
        it.publish(2)  # a best model loaded at the end, a resume: any other number
        assert server.count("/start_weight_update") == 3
        assert server.version == f"{it.run}:2"


def test_before_the_first_publication_the_server_forgets_what_it_has():
    with FakeVllm() as server:
        it = engine(server)
        it.publish(0)
        it.publish(1)
        paths = [path for path, _ in server.requests]
    assert paths.index("/weight_checker") < paths.index("/start_weight_update")
    assert paths.count("/weight_checker") == 1


def test_all_weights_arrive_in_safetensors_files_that_are_gone_afterwards(tmp_path):
    model = tiny_model()
    seen = {}

    with FakeVllm() as server:

        def update(handler):
            seen.update(load_file(server.requests[-1][1]["update_info"]["path"]))
            handler.send_response(200)
            handler.send_header("Content-Length", "0")
            handler.end_headers()

        server.answers["/update_weights"] = update
        it = engine(server, model=model, vllm_weight_folder=str(tmp_path))
        it.publish(0)
    assert seen.keys() == dict(model.named_parameters()).keys()
    assert all(torch.equal(seen[name], parameter) for name, parameter in model.named_parameters())
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["lock"]
    it.close()
    assert list(tmp_path.iterdir()) == []


def test_two_servers_share_the_prompts_and_get_the_same_weights():
    with FakeVllm() as first, FakeVllm() as second:
        it = engine(first, second)
        it.publish(0)
        it.generate([request(3), request(4), request(5)], SAMPLING)
        assert first.version == second.version == f"{it.run}:0"
    assert sorted(prompts_of(first)) == [[3], [5]] and prompts_of(second) == [[4]]


def test_servers_that_differ_are_refused():
    other = {"/collective_rpc": {"results": [{**FACTS, "dtype": "bfloat16"}]}}
    with (
        FakeVllm() as first,
        FakeVllm(answers=other) as second,
        pytest.raises(VllmError, match="The servers differ"),
    ):
        engine(first, second)


def test_an_engine_that_computes_something_else_is_refused():
    with FakeVllm() as server:  # all its log-probs are -1
        it = engine(server, vllm_publication_tolerance=None)
        with pytest.raises(VllmError, match="vLLM does not compute what is trained"):
            it.publish(0)


def test_temperature_is_the_servers_logit_scale():
    """So that raw log-probs are of the distribution that was sampled from."""
    with FakeVllm() as server:
        it = engine(server)
        it.publish(0)
        it.generate([request(3)], Sampling(8, temperature=0.5, top_p=0.9, logps_support="full"))
        it.generate([request(3)], Sampling(8, temperature=0.5, top_p=0.9, logps_support="full"))
        infos = [
            body["init_info"]
            for path, body in server.requests
            if path == "/init_weight_transfer_engine"
        ]
        params = server.requests[-1][1]["sampling_params"]
    assert [info["logits_scale"] for info in infos] == [1.0, 2.0]
    assert (params["temperature"], params["top_p"], params["logprobs"]) == (1.0, 0.9, 0)


@pytest.mark.parametrize(
    ("mode", "sampling", "reported"),
    [
        ("raw_logprobs", Sampling(8), True),
        ("raw_logprobs", Sampling(8, top_p=0.5, logps_support="full"), True),
        ("raw_logprobs", Sampling(8, temperature=0.5), False),
        ("processed_logprobs", Sampling(8, temperature=0.5), True),
        ("processed_logprobs", Sampling(8, top_k=3, logps_support="full"), False),
    ],
)
def test_a_server_without_gmpo_reports_log_probs_only_of_the_right_distribution(
    mode, sampling, reported
):
    facts = {**FACTS, "backend": "nccl", "logprobs_mode": mode}
    with FakeVllm(answers={"/collective_rpc": {"results": [facts]}}) as server:
        it = engine(server)
        it.version = 0
        server.version = it.tag
        (completions,) = it.generate([request(3)], sampling)
        assert (completions[0].logps is not None) == reported
        assert server.requests[-1][1]["sampling_params"]["temperature"] == sampling.temperature


def test_token_sets_that_a_server_reports_reach_the_completions():
    """The fake's samples are [3, number, 1]; each is drawn from itself and token 9."""
    facts = {**FACTS, "logprobs_mode": "processed_logprobs", "token_sets": True}

    def cut(server, body):
        choices = server.all_choices(body)
        for choice in choices:
            choice["sampling_mask"] = [[token, 9] for token in choice["token_ids"]]
        return choices

    with FakeVllm(answers={"/collective_rpc": {"results": [facts]}}, choices=cut) as server:
        it = engine(server)
        it.publish(0)
        sampling = Sampling(8, temperature=0.5, top_k=2, top_p=0.9)
        (completions,) = it.generate([request(3)], sampling)
        (_, body) = server.requests[-1]
    params = body["sampling_params"]
    assert (params["temperature"], params["top_k"], params["top_p"]) == (1.0, 2, 0.9)
    assert completions[0].logps == [-0.5] * 3
    members = [one.support.members(10).nonzero()[:, 1].tolist() for one in completions]
    assert members == [[3, 9, 0, 9, 1, 9], [3, 9, 1, 9, 1, 9]]


def test_a_server_without_token_sets_is_refused_before_it_is_asked():
    with FakeVllm() as server:
        it = engine(server)
        it.publish(0)
        before = server.count(GENERATE)
        with pytest.raises(ValueError, match="gmpo serve MODEL --return-sampling-mask"):
            it.generate([request(3)], Sampling(8, top_k=2))
        assert server.count(GENERATE) == before


def wrong(**changes):
    """An answer with one choice that differs from a good one."""

    def answer(server, body):
        return {
            "choices": [
                server.choice(n, body, **changes) for n in range(body["sampling_params"]["n"])
            ]
        }

    return answer


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (wrong(finish_reason="abort"), r"returned a malformed completion: .*ended by 'abort'"),
        (wrong(token_ids=["a"]), r"returned a malformed completion: .*token_ids"),
        (wrong(token_ids=None), r"returned a malformed completion"),
        (wrong(logprobs=None), r"returned a malformed completion"),
        (wrong(logprobs={"content": []}), r"its log-probs are of other tokens"),
        (wrong(index=None), r"returned a malformed completion"),
        (lambda server, body: {"choices": []}, r"0 completions came for 2"),
        (lambda server, body: {"nothing": 1}, r"asked for completions and answered"),
        (lambda server, body: [1, 2], r"asked for completions and answered"),
    ],
)
def test_malformed_answers_are_errors(answer, message):
    with FakeVllm() as server:
        it = engine(server)
        it.publish(0)
        real = server._answer
        server._answer = lambda path, body: (
            answer(server, body) if path == GENERATE else real(path, body)
        )
        with pytest.raises(VllmError, match=message) as fault:
            it.generate([request(3)], SAMPLING)
        assert fault.value.raised_on_all_ranks


@pytest.mark.parametrize("versions", [[{"version": "default"}], [], None, "mixed"])
def test_an_answer_from_other_weights_is_an_error(versions):
    with FakeVllm() as server:
        it = engine(server)
        it.publish(0)
        spans = [{"version": it.tag}, {"version": "default"}] if versions == "mixed" else versions
        real = server._answer
        server._answer = lambda path, body: (
            wrong(weight_versions=spans)(server, body) if path == GENERATE else real(path, body)
        )
        with pytest.raises(VllmError, match=r"answered from the weights .*, not from 'gmpo-"):
            it.generate([request(3)], SAMPLING)


@pytest.mark.parametrize("behaviour", [silent, dripping, breaking_off])
def test_a_generation_that_does_not_come_ends_in_time_and_is_asked_for_once(behaviour):
    with FakeVllm() as server:
        it = engine(server)
        it.publish(0)
        before = server.count(GENERATE)
        server.answers[GENERATE] = behaviour
        began = time.monotonic()
        with pytest.raises(VllmError, match=r"was not answered within 2 seconds|broke off"):
            it.generate([request(3)], SAMPLING)
        assert time.monotonic() - began < 15
        assert server.count(GENERATE) == before + 1


@pytest.mark.parametrize(
    "path", ["/pause", "/start_weight_update", "/update_weights", "/finish_weight_update"]
)
@pytest.mark.parametrize("behaviour", [silent, breaking_off])
def test_a_publication_that_stops_anywhere_ends_in_time(path, behaviour):
    with FakeVllm() as server:
        it = engine(server)
        it.publish(0)
        server.answers[path] = behaviour
        began = time.monotonic()
        with pytest.raises(
            VllmError, match=rf"{path}.* (was not answered within 2 seconds|broke off)"
        ) as fault:
            it.publish(1)
        assert time.monotonic() - began < 15
        assert fault.value.raised_on_all_ranks
        del server.answers[path]
        it.publish(1)
        assert server.version == f"{it.run}:1"


def test_weights_that_do_not_fit_are_an_error_after_which_another_update_can_begin():
    with FakeVllm() as server:
        it = engine(server)
        it.publish(0)
        server.answers["/finish_weight_update"] = error(500, "The weight update lacks 1 parameters")
        with pytest.raises(VllmError, match="lacks 1 parameters"):
            it.publish(1)
        assert not server.active
        del server.answers["/finish_weight_update"]
        it.publish(1)


def test_a_prompt_that_is_too_long_is_named_before_anything_is_sent():
    with FakeVllm() as server:
        it = engine(server)
        it.publish(0)
        before = server.count(GENERATE)
        with pytest.raises(
            ValueError, match=r"make 129, and vLLM takes 128. Serve with a larger --max-model-len"
        ):
            it.generate([request(*[3] * 121)], SAMPLING)
        assert server.count(GENERATE) == before


def test_with_reconnect_a_restarted_server_gets_the_weights_and_the_open_requests():
    with FakeVllm() as server:
        it = engine(server, vllm_server_reconnect=20.0)
        it.publish(4)
        it.generate([request(3)], SAMPLING)
        server.version = "default"  # a new server, with the weights that it was started with
        (completions,) = it.generate([request(3)], SAMPLING)
        assert len(completions) == 2
        assert server.version == f"{it.run}:4"
        assert server.count("/start_weight_update") == 2


def test_a_server_that_was_restarted_between_steps_is_noticed_before_it_gets_weights():
    with FakeVllm() as server:
        it = engine(server)
        it.publish(0)
        server.version = "default"
        with pytest.raises(
            VllmError, match=r"answered from the weights \['default'\], not from 'gmpo-.*:0'"
        ):
            it.publish(1)
        assert server.count("/start_weight_update") == 1


def test_with_reconnect_a_restarted_server_is_told_everything_anew():
    with FakeVllm() as server:
        it = engine(server, vllm_server_reconnect=20.0)
        it.publish(0)
        it.generate([request(3)], Sampling(8, temperature=0.5))
        server.version = "default"
        it.publish(1)
        it.generate([request(3)], Sampling(8, temperature=0.5))
        infos = [
            body["init_info"]
            for path, body in server.requests
            if path == "/init_weight_transfer_engine"
        ]
        assert [info["logits_scale"] for info in infos] == [1.0, 2.0, 1.0, 2.0]
        assert server.count("/weight_checker") == 2 and server.version == f"{it.run}:1"


def test_with_reconnect_a_restarted_server_may_have_another_token(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    with FakeVllm(token="first") as server:
        file = token_file(server.server.server_port)
        file.parent.mkdir(parents=True)
        file.write_text("first")
        it = engine(server, vllm_server_reconnect=20.0)
        it.publish(0)
        server.token, server.version = "second", "default"
        file.write_text("second")
        it.generate([request(3)], SAMPLING)
        assert server.version == f"{it.run}:0"


def test_with_reconnect_what_was_generated_is_not_generated_again():
    with FakeVllm() as good, FakeVllm() as lost:
        it = engine(good, lost, vllm_server_reconnect=20.0)
        it.publish(0)
        answers = iter([breaking_off])
        real = lost._answer
        lost._answer = lambda path, body: (
            next(answers, None) or real(path, body) if path == GENERATE else real(path, body)
        )
        completions = it.generate([request(3, count=1), request(4, count=1)], SAMPLING)
        assert [group[0].ids[0] for group in completions] == [3, 4]
    assert prompts_of(good) == [[3]]


@pytest.mark.parametrize("lost_first", [True, False])
def test_with_reconnect_finished_prompts_are_not_asked_for_again(lost_first):
    """Whatever the order in which prompts fail: the first failure used to drop the rest."""
    with FakeVllm() as one, FakeVllm() as other:
        it = engine(one, other, vllm_server_reconnect=20.0)
        lost, good = (one, other) if lost_first else (other, one)
        it.publish(0)
        answers = iter([breaking_off])
        real = lost._answer
        lost._answer = lambda path, body: (
            next(answers, None) or real(path, body) if path == GENERATE else real(path, body)
        )
        completions = it.generate([request(n, count=1) for n in (3, 4, 5, 6)], SAMPLING)
        assert [group[0].ids[0] for group in completions] == [3, 4, 5, 6]
    assert sorted(prompts_of(good)) == ([[4], [6]] if lost_first else [[3], [5]])
    assert len(prompts_of(lost)) == 3


def test_with_reconnect_only_the_missing_samples_of_a_group_are_asked_for():
    """A server is lost after the second of four samples; the others keep their own seeds."""
    with FakeVllm() as server:
        it = engine(server, vllm_server_reconnect=20.0)
        it.publish(0)

        def lost_after_the_second(handler):
            del server.answers[GENERATE]
            (_, body) = server.requests[-1]
            parts = events_of({"choices": server.all_choices(body)})
            stream(handler, [*parts[:4], parts[5]], end=False)

        server.answers[GENERATE] = lost_after_the_second
        (completions,) = it.generate([request(3, count=4, seed=50)], SAMPLING)
        asked = [
            (body["sampling_params"]["n"], body["sampling_params"]["seed"])
            for path, body in server.requests
            if path == GENERATE and body.get("stream")
        ]
    assert len(completions) == 4
    assert asked[0] == (4, 50) and sorted(asked[1:]) == [(1, 50), (2, 52)]


def test_a_group_larger_than_a_server_takes_is_asked_for_in_parts():
    """vLLM refuses more samples per request than its --max-num-seqs."""
    answers = {"/collective_rpc": {"results": [{**FACTS, "max_num_seqs": 3}]}}
    with FakeVllm(answers=answers) as server:
        it = engine(server)
        it.publish(0)
        (completions,) = it.generate([request(3, count=8, seed=50)], SAMPLING)
        asked = [
            (body["sampling_params"]["n"], body["sampling_params"]["seed"])
            for path, body in server.requests
            if path == GENERATE and body.get("stream")
        ]
    assert len(completions) == 8
    assert sorted(asked, key=lambda pair: pair[1]) == [(3, 50), (3, 53), (2, 56)]


def test_a_generation_longer_than_the_timeout_is_waited_for():
    """Ten events, each half a second after the last, with a timeout of two seconds."""
    with FakeVllm() as server:
        it = engine(server, vllm_server_timeout=2.0)
        it.publish(0)

        def slow(handler):
            (_, body) = server.requests[-1]
            stream(handler, events_of({"choices": server.all_choices(body)}), pause=0.5)

        server.answers[GENERATE] = slow
        (completions,) = it.generate([request(3, count=5)], SAMPLING)
        assert len(completions) == 5
        assert server.count(GENERATE) == 2  # the check's text, and this


@pytest.mark.parametrize("busy", [True, False])
def test_a_queue_at_a_server_that_works_is_waited_for(busy):
    """Silence for longer than the timeout is a loss only if the server writes nothing at all."""
    metrics = (f"vllm:generation_tokens_total{{}} {7 + busy * n}\n" for n in range(100))
    with FakeVllm() as server:
        it = engine(server, vllm_server_timeout=1.0)
        it.publish(0)

        def queued(handler):
            (_, body) = server.requests[-1]
            events = events_of({"choices": server.all_choices(body)})
            time.sleep(4.0)
            stream(handler, events)

        server.answers[GENERATE] = queued
        real = server._answer
        server._answer = lambda path, body: (
            (200, next(metrics).encode()) if path == "/metrics" else real(path, body)
        )
        if busy:
            assert len(it.generate([request(3)], SAMPLING)[0]) == 2
        else:
            with pytest.raises(VllmError, match="was not answered within 1 seconds") as fault:
                it.generate([request(3)], SAMPLING)
            assert fault.value.lost


@pytest.mark.parametrize("logp", [-9999.0, float("nan"), float("-inf")])
def test_log_probs_that_are_not_finite_end_the_run(logp):
    """A server writes -9999 for them; training on them would go on in silence."""

    def diverged(server, body):
        choices = server.all_choices(body)
        choices[1]["logprobs"]["content"][2]["logprob"] = logp
        return choices

    with FakeVllm(choices=diverged) as server:
        it = engine(server)
        it.publish(0)
        match = r"token 2 \(id 1\) of a completion has the log-prob .* The logits are not finite"
        with pytest.raises(VllmError, match=match):
            it.generate([request(3)], SAMPLING)


def test_with_reconnect_a_server_that_stays_away_ends_the_run():
    with FakeVllm() as server:
        it = engine(server, vllm_server_reconnect=1.0)
        it.publish(0)
        server.answers |= {GENERATE: breaking_off, "/health": (503, b"")}
        with pytest.raises(VllmError, match=r"No healthy vLLM server at .* within 1 seconds"):
            it.generate([request(3)], SAMPLING)


def test_with_reconnect_a_server_that_fails_again_and_again_ends_the_run():
    with FakeVllm() as server:
        it = engine(server, vllm_server_reconnect=5.0)
        it.publish(0)
        server.answers[GENERATE] = breaking_off
        before = server.count(GENERATE)
        with pytest.raises(VllmError, match="broke off"):
            it.generate([request(3)], SAMPLING)
        assert server.count(GENERATE) == before + 4


# -- requests as they come -------------------------------------------------------------------------


class Conversations:
    """Samples of two turns: what a sample has written is answered by token 9, and it goes on."""

    def __init__(self, requests):
        self.waiting = list(requests)
        self.open = 0
        self.given = []
        self.rooms = []

    def take(self, room, *, wait):
        self.rooms.append(room)
        if not self.waiting and not self.open:
            return None
        taken, self.waiting = self.waiting[:room], self.waiting[room:]
        self.open += sum(it.count for it in taken)
        return taken

    def give(self, request, number, completion):
        self.open -= 1
        self.given.append((tuple(request.so_far), number, tuple(completion.ids)))
        if not request.so_far:
            so_far = [*completion.ids, 9]
            first = request.first + number
            self.waiting.append(replace(request, count=1, first=first, so_far=so_far))


def streamed(server):
    return [body for path, body in server.requests if path == GENERATE and body.get("stream")]


def test_samples_go_on_from_their_own_tokens_as_soon_as_they_are_finished():
    with FakeVllm() as server:
        it = engine(server)
        it.publish(0)
        work = Conversations([request(3, 4, count=2, seed=50)])
        it.serve(work, SAMPLING)
        bodies = streamed(server)
    first, *others = work.given
    assert first == ((), 0, (4, 0, 1))
    assert ((), 1, (4, 1, 1)) in others and ((4, 1, 1, 9), 0, (9, 0, 1)) in others
    assert len(work.given) == 4
    assert sorted(body["token_ids"] for body in bodies) == [
        [3, 4],
        [3, 4, 4, 0, 1, 9],
        [3, 4, 4, 1, 1, 9],
    ]
    seeds = [body["sampling_params"]["seed"] for body in bodies]
    assert len({*seeds, seeds[0] + 1}) == 4  # no turn has the random numbers of another


def test_a_request_has_its_own_budget_and_ends():
    with FakeVllm() as server:
        it = engine(server)
        it.publish(0)
        own = replace(request(3, count=1), max_new_tokens=5, stop=["</tool_call>"])
        it.generate([own, request(4, count=1)], Sampling(8, extra={"stop": ["END"]}))
        params = {body["token_ids"][0]: body["sampling_params"] for body in streamed(server)}
    assert params[3]["max_tokens"] == 5 and params[3]["stop"] == ["END", "</tool_call>"]
    assert params[4]["max_tokens"] == 8 and params[4]["stop"] == ["END"]


def test_a_group_stays_with_its_server_also_when_it_goes_on():
    with FakeVllm() as one, FakeVllm() as other:
        it = engine(one, other)
        it.publish(0)
        it.serve(Conversations([request(n, count=2) for n in (3, 4, 5)]), SAMPLING)
    assert {ids[0] for ids in prompts_of(one)} == {3, 5}
    assert {ids[0] for ids in prompts_of(other)} == {4}


def test_finished_samples_are_given_although_another_fails():
    with FakeVllm() as server:
        it = engine(server)
        it.publish(0)

        def lost_after_the_first(handler):
            (_, body) = server.requests[-1]
            parts = events_of({"choices": server.all_choices(body)})
            stream(handler, [*parts[:2], parts[2]], end=False)

        server.answers[GENERATE] = lost_after_the_first
        work = Conversations([])
        work.waiting = [request(3, count=2)]
        with pytest.raises(VllmError, match="broke off"):
            it.serve(work, SAMPLING)
    assert ((), 0, (3, 0, 1)) in work.given


def test_a_sample_that_no_longer_fits_is_told_with_all_of_its_tokens():
    with FakeVllm() as server:
        it = engine(server)
        it.publish(0)
        long = replace(request(3, count=1), so_far=[4] * 120)
        with pytest.raises(ValueError, match="A prompt of 121 tokens and a completion of up to 8"):
            it.serve(Conversations([long]), SAMPLING)
