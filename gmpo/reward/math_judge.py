"""Is a mathematical answer right?  math-verify decides, in a process of its own that ends when it takes too long.

A completion like \\boxed{9^{9^{9^{9}}}} keeps sympy busy for ever, or takes all memory.  math-verify's own time limit
is an alarm signal: it works on the main thread alone, and takes the alarm away from everyone else.  So the second half
of this file runs as a child, started with this same interpreter: a line of JSON in, a line of JSON out.
"""

import atexit
import contextlib
import faulthandler
import functools
import importlib.util
import json
import logging
import os
import re
import signal
import subprocess
import sys
import threading
from typing import IO, Any

logger = logging.getLogger(__name__)

_DELIMITER = re.compile(r"(?<!\\)\$|\\boxed|\\\(|\\\[")  # of LaTeX within text
_TEXT_COMMAND = re.compile(r"\\(?:text\w*|mbox|mathrm)\s*\{[^{}]*\}")
_PROSE = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{2,}\s+[A-Za-z]{2,}")  # two words
_MEMORY_LIMIT = 4 * 2**30  # bytes of address space of the child, where the system can limit it


class MathJudge:
    """Keeps one child process that verifies answers.  May be used from any thread.

    Args:
        timeout_s: Seconds for one answer, after which the child ends and a new one takes the next.
    """

    def __init__(self, timeout_s: float = 5.0):
        self.timeout_s = timeout_s
        self._lock = threading.Lock()
        self._child: subprocess.Popen[bytes] | None = None

    def verdict(self, gold: str, text: str) -> bool | None:
        """Whether `text` gives the answer `gold`; None if `gold` is no mathematics.

        What is not decided in time is taken for wrong, with a warning.

        Raises:
            ImportError: If math-verify is not installed.
        """
        with self._lock:
            try:
                answer = self._ask({"gold": gold, "text": text})
            except BaseException:
                self._end()  # or the next answer read would be this one's
                raise
            if answer is None:
                self._end()
                logger.warning(
                    "math-verify gave no answer within %g s; scored as wrong: %r",
                    self.timeout_s,
                    text[-200:],
                )
                return False
            return answer["right"]

    def close(self) -> None:
        """End the child.  The next question starts another one."""
        with self._lock:
            self._end()

    def _ask(self, question: dict[str, str]) -> dict[str, Any] | None:
        """The child's answer; None if it ended without one."""
        child = self._child = self._child or start_child(self.timeout_s)
        assert child.stdin is not None and child.stdout is not None
        try:
            child.stdin.write(json.dumps(question).encode() + b"\n")
            child.stdin.flush()
            line = child.stdout.readline()
        except BrokenPipeError:
            return None
        return json.loads(line) if line.endswith(b"\n") else None

    def _end(self) -> None:
        if self._child is not None:
            end_child(self._child)
            self._child = None


@functools.cache
def shared_judge() -> MathJudge:
    """The judge of this process, ended with it."""
    judge = MathJudge()
    atexit.register(judge.close)
    return judge


def require_math_verify() -> None:
    """Raise an ImportError that says what to install, unless math-verify is there."""
    if importlib.util.find_spec("math_verify") is None:
        raise ImportError(
            "The reward 'accuracy' needs math-verify. Install it with: pip install 'gmpo[math]'."
        )


def start_child(timeout_s: float) -> subprocess.Popen[bytes]:
    require_math_verify()
    # -P and the parent's path: the child imports what the parent would, and nothing from the working directory.
    child = subprocess.Popen(
        [sys.executable, "-P", "-m", "gmpo.reward.math_judge", str(timeout_s)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )
    assert child.stdout is not None
    if child.stdout.readline() != b"ready\n":
        end_child(child)
        raise RuntimeError(
            f"The process that verifies answers did not start (exit status {child.returncode})."
        )
    return child


def end_child(child: subprocess.Popen[bytes]) -> None:
    child.kill()
    child.wait()
    for pipe in (child.stdin, child.stdout):
        if pipe is not None and not pipe.closed:
            with contextlib.suppress(
                BrokenPipeError
            ):  # what was not yet written has no reader any more
                pipe.close()


# -- the child ---------------------------------------------------------------------------------------------------------


def serve(timeout_s: float) -> None:
    """Answer questions from stdin until it ends."""
    signal.signal(
        signal.SIGINT, signal.SIG_IGN
    )  # Ctrl-C is the parent's business; its end ends stdin
    answers, nowhere = private_stdout(), open(os.devnull, "w")  # noqa: SIM115 (open as long as the process lives)
    limit_memory()
    logging.disable()  # math-verify warns that its own alarms are off
    import math_verify  # noqa: F401 (start-up is not part of the first answer's time)

    answers.write(b"ready\n")
    answers.flush()
    for line in sys.stdin.buffer:
        # Ends the process even from within C code that holds the interpreter, which no signal handler could.
        faulthandler.dump_traceback_later(timeout_s, exit=True, file=nowhere)
        question = json.loads(line)
        answer = {"right": is_right(question["gold"], question["text"])}
        faulthandler.cancel_dump_traceback_later()
        answers.write(json.dumps(answer).encode() + b"\n")
        answers.flush()


def is_right(gold: str, text: str) -> bool | None:
    """Whether `text` gives `gold`; None if `gold` is no mathematics.  Takes any time; call it in the child."""
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

    expected = parsed_gold(gold)
    if not expected:
        return None
    try:
        targets = (LatexExtractionConfig(boxed_match_priority=0), ExprExtractionConfig())
        return bool(
            verify(list(expected), parse(text, targets, parsing_timeout=0), timeout_seconds=0)
        )
    except Exception:  # whatever a parser makes of what a policy writes: it is not the answer
        return False


@functools.lru_cache(maxsize=4096)
def parsed_gold(gold: str) -> tuple[Any, ...]:
    """What math-verify reads in `gold`: LaTeX, with or without its delimiters, or a plain expression; (): nothing."""
    from math_verify import parse

    as_it_is = _DELIMITER.search(gold) or _PROSE.search(_TEXT_COMMAND.sub("", gold))
    try:
        # Without delimiters math-verify takes \frac{1}{2} for the number 2, and between them prose for a product.
        return tuple(
            (not as_it_is and parse(f"${gold}$", parsing_timeout=0))
            or parse(gold, parsing_timeout=0)
        )
    except Exception:
        return ()


def private_stdout() -> IO[bytes]:
    """Our stdout, which from here on nobody else writes to: their output goes to stderr."""
    own = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    return own


def limit_memory() -> None:
    if importlib.util.find_spec("resource") is not None:  # not on Windows
        import resource

        with contextlib.suppress(
            ValueError, OSError
        ):  # a lower limit holds already, or macOS refuses
            resource.setrlimit(
                resource.RLIMIT_AS, (_MEMORY_LIMIT, resource.getrlimit(resource.RLIMIT_AS)[1])
            )


if __name__ == "__main__":
    serve(float(sys.argv[1]))
