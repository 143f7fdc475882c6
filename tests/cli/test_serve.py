"""What `gmpo serve` starts."""

import socket
import stat
import sys

import pytest

from gmpo.cli import serve
from gmpo.rollout.vllm import start
from gmpo.rollout.vllm.http.tokens import token_file


def free_port():
    with socket.socket() as it:
        it.bind(("127.0.0.1", 0))
        return it.getsockname()[1]


PORT = free_port()


def run(*options):
    serve.run(["some/model", "--port", str(PORT), *options])


@pytest.fixture(autouse=True)
def started(tmp_path, monkeypatch):
    """The command and the environment that would replace this process."""
    calls = []
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    monkeypatch.setattr(
        serve.os,
        "execve",
        lambda program, command, environment: calls.append((command, environment)),
    )
    monkeypatch.setattr(serve.importlib.util, "find_spec", lambda name: name)
    return calls


def options_of(command):
    return {
        name: value
        for name, value in zip(command, [*command[1:], ""], strict=True)
        if name.startswith("--")
    }


def test_it_listens_on_this_machine_alone_and_asks_for_a_token(started, capsys):
    run()
    ((command, environment),) = started
    options = options_of(command)
    assert command[0] == sys.executable and "some/model" in command
    assert (options["--host"], options["--port"]) == ("127.0.0.1", str(PORT))
    assert options["--middleware"] == "gmpo.rollout.vllm.inside.guard.Guard"
    assert environment["VLLM_API_KEY"] == token_file(PORT).read_text()
    assert stat.S_IMODE(token_file(PORT).stat().st_mode) == 0o600
    assert environment["VLLM_API_KEY"] not in capsys.readouterr().out


def test_it_can_be_given_weights_and_unpickles_nothing(started):
    run()
    ((command, environment),) = started
    options = options_of(command)
    assert options["--weight-transfer-config"] == '{"backend": "gmpo"}'
    assert options["--logprobs-mode"] == "raw_logprobs"
    assert "--enable-scale-out" in options
    assert environment["VLLM_SERVER_DEV_MODE"] == "1"
    assert environment["VLLM_ALLOW_INSECURE_SERIALIZATION"] == "0"


def test_other_options_go_to_vllm(started):
    run("--tensor-parallel-size", "4", "--enable-lora")
    ((command, environment),) = started
    assert command[-3:] == ["--tensor-parallel-size", "4", "--enable-lora"]
    assert options_of(command)["--port"] == str(PORT)
    assert environment["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] == "1"


@pytest.mark.parametrize("on_cpu", [True, False])
def test_on_cpus_prompts_are_read_in_one_piece(started, monkeypatch, on_cpu):
    monkeypatch.setattr(start, "is_cpu_build", lambda: on_cpu)
    run()
    assert ("--no-enable-chunked-prefill" in started[0][0]) == on_cpu
    assert ("--block-size" in started[0][0]) == on_cpu


def test_the_users_own_token_is_kept(started, monkeypatch):
    monkeypatch.setenv("VLLM_API_KEY", "mine")
    run()
    assert started[0][1]["VLLM_API_KEY"] == "mine"
    assert not token_file(PORT).exists()


def test_without_a_token_only_when_told(started, capsys):
    run("--no-token")
    ((command, environment),) = started
    assert "--middleware" not in command and "VLLM_API_KEY" not in environment
    assert "WITHOUT a token" in capsys.readouterr().out


def test_other_machines_only_when_told_and_with_a_warning(started, capsys):
    run("--host", "0.0.0.0")
    assert "other machines can reach this port" in capsys.readouterr().out


def test_without_vllm_it_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(serve.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install gmpo\[vllm\]"):
        run()


def test_the_port_is_8000_unless_told_otherwise():
    assert serve.parser().parse_args(["some/model"]).port == 8000


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0", "localhost"])
def test_a_port_in_use_is_told_before_its_servers_token_is_replaced(started, host):
    run()
    token = token_file(PORT).read_text()
    with socket.socket() as running:
        running.bind(("127.0.0.1", PORT))
        running.listen()
        with pytest.raises(ValueError, match=rf"can listen on {host} at port {PORT}: .* in use"):
            run("--host", host)
    assert token_file(PORT).read_text() == token
    assert len(started) == 1


def test_a_server_that_has_ended_leaves_its_port_to_the_next(started):
    run()
    run()
    assert len(started) == 2
    assert token_file(PORT).read_text() == started[1][1]["VLLM_API_KEY"]


def test_with_token_sets_log_probs_are_of_the_same_distribution(started):
    run("--return-sampling-mask")
    options = options_of(started[0][0])
    assert (
        options["--logprobs-mode"] == "processed_logprobs" and "--return-sampling-mask" in options
    )
