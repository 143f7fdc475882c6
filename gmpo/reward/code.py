"""The reward `code`: run the program in a completion against tests, apart from the training.

Each run is a separate process, in an empty directory, without network, with limits on CPU time,
memory, file sizes and open files; what it started is killed with it.  This stops accidents and
lazy cheats: endless loops, fork bombs, full disks, `exit(0)` before the tests.  It is no wall
against a determined attacker: the program runs as the same user, can read what that user can read
and write where that user can write, and could find the tests in its own process.  For that, run
the training in a container.
"""

import concurrent.futures
import json
import os
import re
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gmpo.reward.pool import MARK, kill_family
from gmpo.reward.sandbox import NO_NETWORK_ISOLATION
from gmpo.reward.text import Completion, answer_text, texts_opened

_BLOCK = re.compile(
    r"^[ \t]*```[ \t]*(?:python3?|py)?[ \t]*\n(.*?)^[ \t]*```", re.DOTALL | re.MULTILINE
)
_OUTPUT_BYTES = 2**20  # of a program, as far as it is compared
_SANDBOX = str(Path(__file__).with_name("sandbox.py"))


@dataclass(frozen=True)
class Code:
    """1 where the program in a completion passes its tests, else 0; None for rows without tests.

    The program is the last fenced block of the answer, marked as Python or not at all.

    Args:
        timeout_s: Seconds of CPU time for each test; twice as many seconds may go by.
        memory_gib: Address space of the process.
        partial: Give the share of tests that pass, rather than 1 only if all do.
        network: Leave the network open, where it can't be closed (macOS, some containers).
    """

    timeout_s: float = 5.0
    memory_gib: float = 2.0
    partial: bool = False
    network: bool = False
    __name__ = "code"
    in_process = True  # it starts processes, with limits, by itself
    needs_any_column = ("tests",)

    def __post_init__(self):
        if self.timeout_s <= 0 or self.memory_gib <= 0:
            raise ValueError(
                f"timeout_s={self.timeout_s} and memory_gib={self.memory_gib} must be above 0."
            )

    def __call__(
        self,
        completions: Sequence[Completion],
        tests: Sequence[Any],
        opened: Sequence[str] | None = None,
        **_: Any,
    ) -> list[float | None]:
        """Run each program.

        Args:
            tests: For each row Python statements that raise if the program is wrong (as text, or a
                list of texts that count apart); or a list of {"input": ..., "output": ...}, what
                the program reads and what it must print; or either as JSON text.
            opened: What each prompt already holds of the model's turn.
        """
        begun = texts_opened(opened, len(completions))
        programs = [
            program_in(answer_text(completion, start))
            for completion, start in zip(completions, begun, strict=True)
        ]
        cases = [as_cases(value) for value in tests]
        with concurrent.futures.ThreadPoolExecutor(os.cpu_count() or 1) as threads:
            return list(threads.map(self._score, programs, cases))

    def _score(self, program: str | None, cases: Sequence[Any]) -> float | None:
        if not cases:
            return None
        if program is None:
            return 0.0

        passed = 0
        for case in cases:
            if self._passes(program, case):
                passed += 1
            elif not self.partial:
                return 0.0
        return passed / len(cases)

    def _passes(self, program: str, case: str | Mapping[str, Any]) -> bool:
        if isinstance(case, str):
            token = uuid.uuid4().hex
            status, output = self._run(program, tests=case, token=token)
            return status == 0 and output.endswith(token)
        status, output = self._run(program, stdin=str(case["input"]))
        return status == 0 and same_output(output, str(case["output"]))

    def _run(
        self, program: str, *, tests: str | None = None, token: str = "", stdin: str = ""
    ) -> tuple[int | None, str]:
        """Return the exit status (None if time ran out) and what the program wrote."""
        if sys.platform == "win32":
            raise ValueError("The reward 'code' needs Linux or macOS, whose limits it uses.")
        job = {
            "program": program,
            "tests": tests,
            "passed": token,
            "cpu_s": self.timeout_s,
            "memory_bytes": int(self.memory_gib * 2**30),
            "network": self.network,
        }
        mark = uuid.uuid4().hex
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as outside:
            home = Path(outside, "home")
            home.mkdir()
            Path(home, "job.json").write_text(json.dumps(job), encoding="utf-8")
            Path(outside, "stdin").write_text(stdin, encoding="utf-8")
            environment = {
                "PATH": os.environ.get("PATH", os.defpath),
                "HOME": str(home),
                "TMPDIR": str(home),
                "OMP_NUM_THREADS": "1",
                "PYTHONHASHSEED": "0",
                MARK: mark,
            }

            with (
                open(Path(outside, "stdin"), "rb") as reads,
                open(Path(outside, "stdout"), "w+b") as writes,
            ):
                process = subprocess.Popen(
                    [sys.executable, "-I", "-B", _SANDBOX, "job.json"],
                    stdin=reads,
                    stdout=writes,
                    stderr=subprocess.DEVNULL,
                    cwd=home,
                    env=environment,
                    start_new_session=True,
                )
                try:
                    status = process.wait(timeout=2 * self.timeout_s)
                except subprocess.TimeoutExpired:
                    status = None
                finally:
                    kill_family(process.pid, mark)
                    process.wait()
                writes.seek(0)
                output = writes.read(_OUTPUT_BYTES).decode("utf-8", errors="replace")

        if status == NO_NETWORK_ISOLATION:
            raise RuntimeError(
                "The reward 'code' can't cut the network off here (it needs Linux's unprivileged "
                "user namespaces). Allow them, or use code(network=True)."
            )
        return status, output


def program_in(text: str) -> str | None:
    """Return the last fenced block of Python in `text`; None if there is none."""
    blocks = _BLOCK.findall(text)
    return blocks[-1] if blocks else None


def as_cases(tests: Any) -> list[str | Mapping[str, Any]]:
    """Return the tests of a row as a list; [] if there are none.

    Raises:
        ValueError: If they are of another form.
    """
    if isinstance(tests, str):
        try:
            parsed = json.loads(tests)
        except json.JSONDecodeError:
            parsed = [tests]
        tests = parsed if isinstance(parsed, list) else [tests]
    cases = list(tests or [])
    for case in cases:
        pair = isinstance(case, Mapping) and {"input", "output"} <= case.keys()
        if not (isinstance(case, str) or pair):
            raise ValueError(
                f"The column tests holds {case!r}. A test is Python text, or a mapping with input "
                "and output."
            )
    return [case for case in cases if not isinstance(case, str) or case.strip()]


def same_output(output: str, expected: str) -> bool:
    """Return True if both have the same lines, white space at their ends aside."""

    def lines(text: str) -> list[str]:
        return [line.rstrip() for line in text.rstrip().splitlines()]

    return lines(output) == lines(expected)
