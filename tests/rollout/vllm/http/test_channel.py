"""A request to a server ends by its deadline, whatever the server does, and is sent once."""

import json
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from gmpo.rollout.vllm.errors import VllmError
from gmpo.rollout.vllm.http.channel import Channel
from tests.rollout.vllm.fake_vllm import FakeVllm, breaking_off, dripping, error, silent

PATH = "/inference/v1/generate"


def channel(server, *, timeout=1.0, token=None):
    return Channel(server.address, token=token, timeout=timeout)


@pytest.mark.parametrize("behaviour", [silent, dripping])
def test_a_request_ends_by_its_deadline(behaviour):
    with FakeVllm(answers={PATH: behaviour}) as server:
        began = time.monotonic()
        with pytest.raises(
            VllmError, match=rf"POST {server.address}{PATH} was not answered within 1 seconds"
        ) as fault:
            channel(server).post(PATH, {})
        assert time.monotonic() - began < 10  # of the 30 that the server would take
        assert fault.value.lost
        assert server.count(PATH) == 1


def test_an_answer_that_breaks_off_is_not_asked_for_again():
    with FakeVllm(answers={PATH: breaking_off}) as server:
        with pytest.raises(VllmError, match="broke off") as fault:
            channel(server).post(PATH, {})
        assert fault.value.lost
        assert server.count(PATH) == 1


def test_no_server_is_told_apart_from_a_silent_one():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{taken.getsockname()[1]}"  # bound, but nobody listens
        with pytest.raises(VllmError, match="found no server") as fault:
            Channel(address, token=None, timeout=0.3).get("/version")
    assert fault.value.lost


def test_a_server_that_listens_late_is_found_without_a_second_request():
    with FakeVllm() as server:
        real = socket.socket.connect
        refusals = iter([ConnectionRefusedError("not yet")])

        def connect(self, address):
            if refused := next(refusals, None):
                raise refused
            return real(self, address)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(socket.socket, "connect", connect)
            assert channel(server, timeout=5).get("/version") == {"version": "0.32.0"}
        assert server.count("/version") == 1


def test_garbage_is_no_answer():
    with (
        FakeVllm(answers={PATH: (200, b"<html>")}) as server,
        pytest.raises(VllmError, match=r"garbage: b'<html>'"),
    ):
        channel(server).post(PATH, {})


def test_a_wrong_token_is_named():
    with FakeVllm(token="right") as server:
        with pytest.raises(
            VllmError, match=r"refuses the token \(401\). Set VLLM_API_KEY"
        ) as fault:
            channel(server, token="wrong").get("/version")
        assert not fault.value.lost
        assert channel(server, token="right").get("/version") == {"version": "0.32.0"}


def test_what_the_worker_says_is_passed_on_without_its_wrapping():
    wrapped = (
        "Call to collective_rpc method failed: Worker failed with error 'Sit down', please check "
        "the stack trace"
    )
    with (
        FakeVllm(answers={PATH: error(500, wrapped + " above")}) as server,
        pytest.raises(VllmError, match=r"was answered with 500: Sit down$") as fault,
    ):
        channel(server).post(PATH, {})
    assert not fault.value.lost  # the server is healthy: asking again would not help


def test_an_error_of_a_dying_server_counts_as_a_loss():
    answers = {PATH: error(500, "EngineCore encountered an issue"), "/health": (503, b"")}
    with FakeVllm(answers=answers) as server, pytest.raises(VllmError, match="EngineCore") as fault:
        channel(server).post(PATH, {})
    assert fault.value.lost


def test_waiting_ends_with_what_was_wrong():
    with (
        FakeVllm(answers={"/health": (503, b"")}) as server,
        pytest.raises(
            VllmError,
            match=r"within 1 seconds: GET .*/health was answered with 503. Start it with `gmpo",
        ),
    ):
        channel(server).wait(1.0)


def test_waiting_is_told_and_ends_when_the_server_becomes_healthy(caplog):
    looks = iter([503, 503])

    def health(handler):
        handler.send_response(next(looks, 200))
        handler.send_header("Content-Length", "0")
        handler.end_headers()

    with FakeVllm(answers={"/health": health}) as server, caplog.at_level("WARNING"):
        channel(server).wait(20.0)
        assert server.count("/health") == 3
    assert [record.getMessage().partition(" the vLLM")[0] for record in caplog.records] == [
        "Waiting up to 20 seconds for"
    ]


def test_hanging_up_ends_what_waits_in_another_thread():
    begun, over = threading.Event(), threading.Event()

    def slow(handler):
        begun.set()
        over.wait(60)

    with FakeVllm(answers={"/slow": slow}) as server, ThreadPoolExecutor(1) as pool:
        it = channel(server, timeout=50.0)
        answer = pool.submit(it.get, "/slow")
        assert begun.wait(10)
        it.hang_up()
        with pytest.raises(VllmError):
            answer.result(timeout=10)
        over.set()


def test_an_address_needs_a_scheme():
    with pytest.raises(
        ValueError, match=r"'localhost:8000' is not the address of a server. Use http://host:port."
    ):
        Channel("localhost:8000", token=None, timeout=1)


def test_bodies_travel_as_json():
    with FakeVllm(answers={PATH: lambda handler: None}) as server:
        server.answers[PATH] = {"seen": 1}
        assert channel(server).post(PATH, {"a": [1, 2]}) == {"seen": 1}
        assert server.requests == [(PATH, json.loads('{"a": [1, 2]}'))]
