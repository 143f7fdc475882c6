"""Signals that ask a training to stop, noted when they come and acted upon between steps."""

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from types import FrameType

WATCHED = tuple(
    getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGHUP") if hasattr(signal, name)
)
ECHO_SECONDS = 1.0  # launchers pass on a signal that the terminal has sent already


class SignalWatch:
    """Notes signals within `watching`.

    Attributes:
        noted: The number of the first signal; None if there was none.
        leaving: A second signal came: nothing is to be saved any more.
    """

    def __init__(self) -> None:
        self.noted: int | None = None
        self.leaving = False
        self._since = 0.0
        self._may_raise = False
        self._process = os.getpid()

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Take the signals of the process within the block, which only its main thread can do."""
        self.noted, self.leaving, self._may_raise = None, False, False
        self._process = os.getpid()
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        former = {number: signal.signal(number, self._note) for number in WATCHED}
        try:
            yield
        finally:
            for number, handler in former.items():
                signal.signal(number, signal.SIG_DFL if handler is None else handler)

    @contextlib.contextmanager
    def raising(self, *, at_once: bool) -> Iterator[None]:
        """Raise as soon as a signal comes within the block, whose work is in no checkpoint yet.

        Args:
            at_once: Do so, which one rank out of several must not: the others would wait for it.
        """
        self._may_raise = at_once
        try:
            yield
        finally:
            self._may_raise = False

    def _note(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:  # a forked child, which others may want to end
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        name = signal.Signals(number).name
        if self.noted is None:
            self.noted, self._since = number, time.monotonic()
            when = "now" if self._may_raise else "after this step"
            say(f"{name}: a checkpoint is saved {when}. A second signal leaves at once.")
            if self._may_raise:
                raise StopRequest
        elif time.monotonic() - self._since > ECHO_SECONDS:
            self.leaving = True
            raise stopped_by(number)


class StopRequest(BaseException):
    """Ends work that is in no checkpoint yet; neither a reward nor an engine answers to it."""


class Interrupted(SystemExit, KeyboardInterrupt):
    """Ends a process with a code and no traceback; `except KeyboardInterrupt` catches it too."""


def stopped_by(number: int) -> SystemExit:
    """Return the exception that ends the process with the code of a signal: 128 and its number."""
    kind = Interrupted if number == signal.SIGINT else SystemExit
    return kind(128 + number)


def say(message: str) -> None:
    """Print one line to standard error; a closed one loses it."""
    with contextlib.suppress(OSError, ValueError):
        print(f"gmpo: {message}", file=sys.stderr, flush=True)
