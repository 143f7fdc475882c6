"""JSON over HTTP with a server that may be gone, slow or strange.

Every request has a deadline, and is sent once.  The deadline of a stream is for silence: it moves
with each event, and is put off while the server works on something else first.
"""

import http.client
import json
import logging
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, NoReturn
from urllib.parse import urlsplit

from gmpo.rollout.vllm.errors import VllmError

logger = logging.getLogger(__name__)

ANSWER_BYTES = 2**30  # longer answers are refused
CONNECT_ATTEMPTS = 3  # before anything is sent, so that nothing can happen twice
HEALTH_TIMEOUT = 5.0  # seconds
PAUSE = 0.5  # seconds between two looks at a server that has not come yet
Json = dict[str, Any] | list[Any] | str | float | bool | None
HOW_TO_START = "Start it with `gmpo serve MODEL`, or as docs/vllm.md tells"


class Channel:
    """The way to one server.

    Args:
        address: Such as "http://127.0.0.1:8000".
        token: Sent with every request, unless it is None.
        timeout: Seconds that a request may take, from the connection to the last byte of the
            answer; of a stream, seconds between two events.

    Raises:
        ValueError: If `address` is not an http(s) URL.
    """

    def __init__(self, address: str, *, token: str | None, timeout: float) -> None:
        parts = urlsplit(address)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"{address!r} is not the address of a server. Use http://host:port.")
        self.address = address.rstrip("/")
        self.parts = parts
        self.token = token
        self.timeout = timeout
        self.accepted = False  # the server has taken the token before
        self._open: set[Watch] = set()  # of the connections that wait for an answer

    # -- requests ----------------------------------------------------------------------------------

    def get(self, path: str) -> Any:
        return self.call("GET", path)

    def post(self, path: str, body: Json = None) -> Any:
        return self.call("POST", path, body)

    def call(self, method: str, path: str, body: Json = None) -> Any:
        """Return the answer's JSON, or None if it is empty.

        Raises:
            VllmError: No answer within the timeout, no JSON, or one that is an error.
        """
        what = f"{method} {self.address}{path}"
        status, data = self.exchange(method, path, body)
        answer = self._parsed(what, data) if status != 401 else None
        if status != 200:
            self._refuse(what, status, answer)
        self.accepted = True
        return answer

    def exchange(
        self, method: str, path: str, body: Json = None, *, timeout: float | None = None
    ) -> tuple[int, bytes]:
        """Return status and content of the answer.

        Raises:
            VllmError: It does not come within the timeout.
        """
        watch = Watch(self.timeout if timeout is None else timeout)
        with self._answer(method, path, body, watch) as response:
            content = response.read(ANSWER_BYTES)
            # read(amount) does not raise where the rest is missing.
            if response.length and len(content) < ANSWER_BYTES:
                raise http.client.IncompleteRead(content, response.length)
        return response.status, content

    def stream(self, path: str, body: Json, *, works: Callable[[], bool]) -> Iterator[Any]:
        """Yield the JSON of each event of an answer (server-sent events), as they come.

        Args:
            path: Where to POST.
            body: JSON.
            works: Tells, after a silence of `timeout` seconds, whether the server works on other
                requests meanwhile, so that waiting is in order.

        Raises:
            VllmError: Silence, an error instead of events or among them, or an end without the last
                event.
        """
        what = f"POST {self.address}{path}"
        watch = Watch(self.timeout, works)
        with self._answer("POST", path, body, watch) as response:
            if response.status != 200:
                data = response.read(ANSWER_BYTES)
                answer = self._parsed(what, data) if response.status != 401 else None
                self._refuse(what, response.status, answer)

            while line := response.readline(ANSWER_BYTES):
                if not line.endswith(b"\n"):
                    break
                if not line.strip():
                    continue
                watch.extend()
                event = line.removeprefix(b"data:").strip()
                if event == b"[DONE]":
                    return
                parsed = self._parsed(what, event)
                if isinstance(parsed, dict) and "error" in parsed:
                    self._refuse(what, 500, parsed)
                yield parsed
            raise http.client.IncompleteRead(b"")  # an end without the last event

    def hang_up(self) -> None:
        """End all requests that wait for an answer, in whichever thread: they fail as lost."""
        for watch in list(self._open):
            watch.cut()

    def _parsed(self, what: str, data: bytes) -> Any:
        try:
            return json.loads(data) if data else None
        except ValueError:
            raise VllmError(f"{what} was answered with garbage: {data[:80]!r}.") from None

    def _refuse(self, what: str, status: int, answer: Json) -> NoReturn:
        """Raise what an answer that is an error says."""
        if status == 401:
            raise VllmError(
                f"The server at {self.address} refuses the token (401). Set VLLM_API_KEY to the "
                "token that it was started with; `gmpo serve` says where it is.",
                lost=self.accepted,  # a server that was started again has a new one
            )
        dead = status >= 500 and not self.is_healthy()
        raise VllmError(f"{what} was answered with {status}: {message_of(answer)}", lost=dead)

    # -- connections -------------------------------------------------------------------------------

    @contextmanager
    def _answer(
        self, method: str, path: str, body: Json, watch: "Watch"
    ) -> Iterator[http.client.HTTPResponse]:
        """Send a request, and turn whatever fails until the block ends into a VllmError."""
        what = f"{method} {self.address}{path}"
        headers = {"Content-Type": "application/json"}
        if self.token:
            headers["Authorization"] = f"Bearer {self.token}"
        data = None if body is None else json.dumps(body)

        connection = self._connect(watch.deadline, what)
        watch.begin(connection.sock)
        self._open.add(watch)
        try:
            connection.request(
                method, self.parts.path.rstrip("/") + path, body=data, headers=headers
            )
            yield connection.getresponse()
        except (OSError, http.client.HTTPException) as error:
            if watch.expired or isinstance(error, TimeoutError):
                raise silence(what, watch.seconds) from None
            raise VllmError(f"{what} broke off ({error!r}).", lost=True) from None
        finally:
            self._open.discard(watch)
            watch.end()
            connection.close()
        if watch.expired:
            raise silence(what, watch.seconds)

    def _connect(self, deadline: float, what: str) -> http.client.HTTPConnection:
        kinds = {"http": http.client.HTTPConnection, "https": http.client.HTTPSConnection}
        kind = kinds[self.parts.scheme]
        for attempt in range(CONNECT_ATTEMPTS):
            left = max(deadline - time.monotonic(), 0.01)
            connection = kind(self.parts.hostname or "", self.parts.port, timeout=left)
            try:
                connection.connect()
                connection.sock.settimeout(None)  # from here on the watch cuts it
                return connection
            except OSError as error:
                connection.close()
                if attempt == CONNECT_ATTEMPTS - 1 or time.monotonic() + PAUSE >= deadline:
                    raise VllmError(f"{what} found no server ({error!r}).", lost=True) from None
            time.sleep(PAUSE)
        raise AssertionError

    # -- is it there? ------------------------------------------------------------------------------

    def is_healthy(self) -> bool:
        return self._look(HEALTH_TIMEOUT) is None

    def wait(self, seconds: float) -> None:
        """Return as soon as the server is healthy.

        Raises:
            VllmError: It was not within `seconds`, and why.
        """
        deadline = time.monotonic() + seconds
        told = False
        while problem := self._look(max(min(deadline - time.monotonic(), HEALTH_TIMEOUT), 0.05)):
            if time.monotonic() + PAUSE >= deadline:
                raise VllmError(
                    f"No healthy vLLM server at {self.address} within {seconds:g} seconds: "
                    f"{problem} {HOW_TO_START}."
                )
            if not told:
                logger.warning(
                    "Waiting up to %g seconds for the vLLM server at %s: %s",
                    seconds,
                    self.address,
                    problem,
                )
                told = True
            time.sleep(PAUSE)

    def _look(self, timeout: float) -> str | None:
        """Return what is wrong with the server, or None if it is healthy."""
        try:
            status, _ = self.exchange("GET", "/health", timeout=min(self.timeout, timeout))
        except VllmError as error:
            return str(error)
        return None if status == 200 else f"GET {self.address}/health was answered with {status}."


class Watch:
    """A deadline that cuts a connection, however slowly bytes trickle in until then.

    Args:
        seconds: From now, and from each `extend`.
        works: Asked at the deadline: true puts it off by as many seconds again.
    """

    def __init__(self, seconds: float, works: Callable[[], bool] | None = None) -> None:
        self.seconds = seconds
        self.works = works
        self.deadline = time.monotonic() + seconds
        self.expired = False
        self._sock: socket.socket | None = None
        self._timer: threading.Timer | None = None
        self._ended = False

    def begin(self, sock: socket.socket) -> None:
        """Watch over `sock` until the end."""
        self._sock = sock
        self._sleep()

    def extend(self) -> None:
        self.deadline = time.monotonic() + self.seconds

    def cut(self) -> None:
        """End the connection under whoever waits for it."""
        self.expired = True
        if self._sock is not None:
            with suppress(OSError):
                self._sock.shutdown(socket.SHUT_RDWR)

    def end(self) -> None:
        self._ended = True
        if self._timer is not None:
            self._timer.cancel()

    def _sleep(self) -> None:
        self._timer = threading.Timer(max(self.deadline - time.monotonic(), 0.0), self._wake)
        self._timer.daemon = True
        self._timer.start()

    def _wake(self) -> None:
        if self._is_late() and self.works is not None and self.works():
            self.extend()
        # Ask again: an event may have come while `works` was asked.
        if self._is_late():
            self.cut()
        elif not self._ended:
            self._sleep()

    def _is_late(self) -> bool:
        return not self._ended and time.monotonic() >= self.deadline


def silence(what: str, seconds: float) -> VllmError:
    return VllmError(f"{what} was not answered within {seconds:g} seconds.", lost=True)


def message_of(answer: Json) -> str:
    """Return the message of an error answer, without vLLM's wrapping."""
    error = answer.get("error", answer) if isinstance(answer, dict) else answer
    text = str(error.get("message", error) if isinstance(error, dict) else error)
    inner = text.partition("Worker failed with error '")[2].rpartition(
        "', please check the stack trace"
    )[0]
    return (inner or text)[:600]
