"""JSON over HTTP with a server that may be gone, slow or strange.

Every request has a deadline, and is sent once.
"""

import http.client
import json
import logging
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any
from urllib.parse import urlsplit

from gmpo.rollout.vllm.errors import VllmError

logger = logging.getLogger(__name__)

ANSWER_BYTES = 2**30  # longer answers are refused
CONNECT_ATTEMPTS = 3  # before anything is sent, so that nothing can happen twice
HEALTH_TIMEOUT = 5.0  # seconds
PAUSE = 0.5  # seconds between two looks at a server that has not come yet
HOW_TO_START = "Start it with `gmpo serve MODEL`, or as docs/vllm.md tells"


class Channel:
    """The way to one server.

    Args:
        address: Such as "http://127.0.0.1:8000".
        token: Sent with every request, unless it is None.
        timeout: Seconds that any request may take, from the connection to the last byte of the
            answer.

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
        # Connections, and the event that tells that one was cut.
        self._open: dict[socket.socket, threading.Event] = {}

    def get(self, path: str) -> Any:
        return self.call("GET", path)

    def post(self, path: str, body: Any = None) -> Any:
        return self.call("POST", path, body)

    def call(self, method: str, path: str, body: Any = None) -> Any:
        """Return the answer's JSON, or None if it is empty.

        Raises:
            VllmError: No answer within the timeout, no JSON, or one that is an error.
        """
        what = f"{method} {self.address}{path}"
        status, data = self.exchange(method, path, body)
        if status == 401:
            raise VllmError(
                f"The server at {self.address} refuses the token (401). Set VLLM_API_KEY to the "
                "token that it was started with; `gmpo serve` says where it is.",
                lost=self.accepted,  # a server that was started again has a new one
            )
        try:
            answer = json.loads(data) if data else None
        except ValueError:
            raise VllmError(f"{what} was answered with garbage: {data[:80]!r}.") from None
        if status != 200:
            dead = status >= 500 and not self.is_healthy()
            raise VllmError(f"{what} was answered with {status}: {message_of(answer)}", lost=dead)
        self.accepted = True
        return answer

    def exchange(
        self, method: str, path: str, body: Any = None, *, timeout: float | None = None
    ) -> tuple[int, bytes]:
        """Return status and content of the answer.

        Raises:
            VllmError: It does not come within the timeout.
        """
        timeout = self.timeout if timeout is None else timeout
        what = f"{method} {self.address}{path}"
        headers = {"Content-Type": "application/json"}
        if self.token:
            headers["Authorization"] = f"Bearer {self.token}"
        data = None if body is None else json.dumps(body)
        with self._connected(time.monotonic() + timeout, what) as (connection, expired):
            try:
                connection.request(
                    method, self.parts.path.rstrip("/") + path, body=data, headers=headers
                )
                response = connection.getresponse()
                content = response.read(ANSWER_BYTES)
                # read(amount) does not raise where the rest is missing.
                if response.length and len(content) < ANSWER_BYTES:
                    raise http.client.IncompleteRead(content, response.length)
            except (OSError, http.client.HTTPException) as error:
                if expired.is_set() or isinstance(error, TimeoutError):
                    problem = f"was not answered within {timeout:g} seconds"
                else:
                    problem = f"broke off ({error!r})"
                raise VllmError(f"{what} {problem}.", lost=True) from None
        if expired.is_set():
            raise VllmError(f"{what} was not answered within {timeout:g} seconds.", lost=True)
        return response.status, content

    @contextmanager
    def _connected(
        self, deadline: float, what: str
    ) -> Iterator[tuple[http.client.HTTPConnection, threading.Event]]:
        """Open a connection that is cut at the deadline, however slowly bytes trickle in."""
        connection = self._connect(deadline, what)
        expired = threading.Event()
        timer = threading.Timer(
            max(deadline - time.monotonic(), 0.0), cut, [connection.sock, expired]
        )
        timer.daemon = True
        timer.start()
        sock = connection.sock
        self._open[sock] = expired
        try:
            yield connection, expired
        finally:
            del self._open[sock]
            timer.cancel()
            connection.close()

    def hang_up(self) -> None:
        """End all requests that wait for an answer, in whichever thread: they fail as lost."""
        for sock, expired in list(self._open.items()):
            cut(sock, expired)

    def _connect(self, deadline: float, what: str) -> http.client.HTTPConnection:
        kinds = {"http": http.client.HTTPConnection, "https": http.client.HTTPSConnection}
        kind = kinds[self.parts.scheme]
        for attempt in range(CONNECT_ATTEMPTS):
            left = max(deadline - time.monotonic(), 0.01)
            connection = kind(self.parts.hostname or "", self.parts.port, timeout=left)
            try:
                connection.connect()
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


def cut(sock: socket.socket, expired: threading.Event) -> None:
    """End a connection under whoever waits for it."""
    expired.set()
    with suppress(OSError):
        sock.shutdown(socket.SHUT_RDWR)


def message_of(answer: Any) -> str:
    """Return the message of an error answer, without vLLM's wrapping."""
    error = answer.get("error", answer) if isinstance(answer, dict) else answer
    text = str(error.get("message", error) if isinstance(error, dict) else error)
    inner = text.partition("Worker failed with error '")[2].rpartition(
        "', please check the stack trace"
    )[0]
    return (inner or text)[:600]
