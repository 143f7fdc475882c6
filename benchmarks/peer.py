"""The peer, TRL, in a separate process and environment.  gmpo never imports it, nor does this file.

A program is a function `program(channel, **arguments)` in a module below the repository's root, named
"package.module:function".  `Worker` starts one in any Python and talks to it: one JSON object per line and direction.
Tensors travel as safetensors files that the messages name.

    python -m benchmarks.peer package.module:function '{"argument": 1}'
"""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
VARIABLE = "GMPO_PEER_PYTHON"
MISSING = (
    f"The peer is not installed: run `make peer`, or name a Python that has TRL in {VARIABLE}."
)


def peer_python() -> str | None:
    """Return the Python of the peer's environment: `GMPO_PEER_PYTHON`, else .venv-peer; None where there is neither.

    Raises:
        ValueError: If the variable names a file that does not exist.
    """
    named = os.environ.get(VARIABLE)
    if named:
        if not os.path.exists(named):
            raise ValueError(
                f"{VARIABLE}={named!r} does not exist. Name the python of an environment that has TRL."
            )
        return named
    built = ROOT / ".venv-peer"
    return str(built / "bin" / "python") if (built / "ready").exists() else None


class Worker:
    """A program in a separate process.  A context manager, which ends the process."""

    def __init__(self, python: str, program: str, **arguments: Any):
        self.program = program
        self._process = subprocess.Popen(
            [python, "-m", "benchmarks.peer", program, json.dumps(arguments)],
            cwd=ROOT,
            env={
                **os.environ,
                "HF_HUB_OFFLINE": "1",
                "TOKENIZERS_PARALLELISM": "false",
                "PYTHONUNBUFFERED": "1",
            },
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    @property
    def pid(self) -> int:
        return self._process.pid

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *exception: object) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()  # the program's `receive` gives None, and it returns
        if exception[0] is not None:
            self._process.kill()
        self._process.wait()
        self._process.stdout.close()

    def send(self, **message: Any) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(message) + "\n")
        self._process.stdin.flush()

    def receive(self) -> dict[str, Any]:
        """Return the program's next message.

        Raises:
            RuntimeError: If the program ended; its own error stands in the standard error above.
        """
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(
                f"{self.program} ended with exit code {self._process.wait()}; its error is above."
            )
        return json.loads(line)

    def ask(self, **message: Any) -> dict[str, Any]:
        self.send(**message)
        return self.receive()


class Channel:
    """The program's end of the line to its `Worker`."""

    def __init__(self):
        self._replies = os.fdopen(os.dup(sys.stdout.fileno()), "w")
        os.dup2(
            sys.stderr.fileno(), sys.stdout.fileno()
        )  # what libraries print must not mix with the replies

    def send(self, **message: Any) -> None:
        self._replies.write(json.dumps(message) + "\n")
        self._replies.flush()

    def receive(self) -> dict[str, Any] | None:
        """Return the next message; None when the other side wants no more."""
        line = sys.stdin.readline()
        return json.loads(line) if line else None


def main() -> None:
    module, function = sys.argv[1].split(":")
    arguments = json.loads(sys.argv[2])
    getattr(importlib.import_module(module), function)(Channel(), **arguments)


if __name__ == "__main__":
    main()
