"""No route of a server of ours without the token."""

import asyncio
import os
import stat

import pytest

from gmpo.rollout.vllm.http.tokens import find_token, new_token, token_file
from gmpo.rollout.vllm.inside.guard import Guard


@pytest.fixture(autouse=True)
def state(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    monkeypatch.delenv("VLLM_API_KEY", raising=False)


def answer(path, headers=(), *, kind="http"):
    """What a client gets: "let in", or the first message that the guard sends."""
    sent = []

    async def app(scope, receive, send):
        sent.append("let in")

    async def send(message):
        sent.append(message)

    scope = {"type": kind, "path": path, "method": "POST", "headers": list(headers)}
    asyncio.run(Guard(app, "secret")(scope, None, send))
    return sent[0]


RIGHT = [(b"authorization", b"Bearer secret")]


@pytest.mark.parametrize(
    "path", ["/v1/models", "/update_weights", "/collective_rpc", "/server_info", "/metrics", "/"]
)
def test_every_path_asks_for_the_token(path):
    assert answer(path)["status"] == 401
    assert answer(path, [(b"authorization", b"Bearer wrong")])["status"] == 401
    assert answer(path, [(b"authorization", b"secret")])["status"] == 401
    assert answer(path, RIGHT) == "let in"


def test_health_is_open_and_nothing_that_looks_like_it():
    assert answer("/health") == "let in"
    assert answer("/health/../update_weights")["status"] == 401
    assert answer("/healthy")["status"] == 401


def test_websockets_are_closed_without_the_token():
    assert answer("/v1/realtime", kind="websocket") == {"type": "websocket.close", "code": 1008}
    assert answer("/v1/realtime", RIGHT, kind="websocket") == "let in"


def test_the_server_starts_and_stops_without_a_token():
    assert answer("", kind="lifespan") == "let in"


def test_a_guard_without_a_token_does_not_stand_there():
    with pytest.raises(ValueError, match="Set VLLM_API_KEY"):
        Guard(None)


def test_a_new_token_is_long_fresh_and_for_this_user_alone():
    token = new_token(8001)
    assert len(token) >= 40 and new_token(8001) != token
    assert stat.S_IMODE(os.stat(token_file(8001)).st_mode) == 0o600


def test_a_trainer_on_this_machine_finds_the_token_by_the_port():
    token = new_token(8001)
    assert find_token("http://127.0.0.1:8001") == find_token("http://localhost:8001/") == token
    assert find_token("http://127.0.0.1:8002") is None
    assert find_token("http://elsewhere:8001") is None


def test_the_environments_token_comes_first(monkeypatch):
    new_token(8001)
    monkeypatch.setenv("VLLM_API_KEY", "mine")
    assert find_token("http://127.0.0.1:8001") == find_token("http://elsewhere:1") == "mine"
