"""Requests of a `Work`, asked of servers by threads, and their samples given back as they come."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from queue import Empty, SimpleQueue

from gmpo.rollout.engine import Completion, Request, Work
from gmpo.rollout.vllm.http.client import Client

POLL = 0.02  # seconds between two looks at work that is not ready yet

# Asks a server for a request: yields the number of each sample, and the sample.
Ask = Callable[[Client, Request], Iterator[tuple[int, Completion]]]


@dataclass(frozen=True, slots=True)
class Finished:
    """A sample that has come."""

    request: Request
    number: int
    completion: Completion


@dataclass(frozen=True, slots=True)
class Ended:
    """The end of one request to a server."""

    error: BaseException | None


class Homes:
    """The server of each group: they are assigned in turn, and stay.

    A group's prompt is then read by one server, and so are its samples that go on.

    Args:
        clients: The servers.
        start: Where to begin; ranks begin at different servers.
    """

    def __init__(self, clients: Sequence[Client], start: int) -> None:
        self.clients = clients
        self.next = start
        # By the id of the group's prompt, which is kept so that no other prompt gets its id.
        self.homes: dict[int, tuple[object, Client]] = {}

    def of(self, request: Request) -> Client:
        key = id(request.prompt)
        if key not in self.homes:
            self.homes[key] = (request.prompt, self.clients[self.next % len(self.clients)])
            self.next += 1
        return self.homes[key][1]


class Puller:
    """Asks servers for the requests of `work`, and gives it their samples.

    `work` is called from the thread that calls `run` only; `ask` runs in others.

    Args:
        work: The requests.
        ask: Asks a server.
        homes: The server of each request.
        at_a_time: Requests to servers.
        samples_per_request: The most that a server takes; larger requests are asked for in parts.
    """

    def __init__(
        self, work: Work, ask: Ask, homes: Homes, *, at_a_time: int, samples_per_request: int
    ) -> None:
        self.work = work
        self.ask = ask
        self.homes = homes
        self.at_a_time = at_a_time
        self.samples_per_request = samples_per_request
        self.pool = ThreadPoolExecutor(max_workers=at_a_time)
        self.events: SimpleQueue[Finished | Ended] = SimpleQueue()
        self.num_open = 0
        self.over = False  # there will be no more requests

    def run(self, *, on_error: Callable[[BaseException], None]) -> None:
        """Serve until there is no more work.

        Args:
            on_error: Called with the first error, before the other threads are waited for: may end
                them.

        Raises:
            BaseException: The first error.  All samples that were finished have been given.
        """
        try:
            while self.num_open or not self.over:
                self._take()
                self._handle_next()
        except BaseException as error:
            # Cancel first, or others would begin in the place of those that are ended.
            self.pool.shutdown(wait=False, cancel_futures=True)
            on_error(error)
            raise
        finally:
            self.pool.shutdown(wait=True)
            self._give_the_rest()

    def _take(self) -> None:
        """Take as many requests as there is room for, and begin to ask for them."""
        room = self.at_a_time - self.num_open
        if self.over or room <= 0:
            return

        taken = self.work.take(room, wait=self.num_open == 0)
        self.over = taken is None
        for request in taken or ():
            client = self.homes.of(request)
            for start, part in parts(request, self.samples_per_request):
                self.pool.submit(self._ask, client, request, start, part)
                self.num_open += 1

    def _ask(self, client: Client, request: Request, start: int, part: Request) -> None:
        try:
            for number, completion in self.ask(client, part):
                self.events.put(Finished(request, start + number, completion))
            self.events.put(Ended(None))
        except BaseException as error:
            self.events.put(Ended(error))

    def _handle_next(self) -> None:
        """Wait for the next event: not for long, if requests may become ready meanwhile."""
        if not self.num_open:
            return
        may_take = self.num_open < self.at_a_time and not self.over
        try:
            event = self.events.get(timeout=POLL if may_take else None)
        except Empty:
            return

        if isinstance(event, Finished):
            self.work.give(event.request, event.number, event.completion)
            return
        self.num_open -= 1
        if event.error is not None:
            raise event.error

    def _give_the_rest(self) -> None:
        """Give what was finished while an error ended the rest."""
        while not self.events.empty():
            event = self.events.get()
            if isinstance(event, Finished):
                self.work.give(event.request, event.number, event.completion)


def parts(request: Request, at_most: int) -> Iterator[tuple[int, Request]]:
    """Cut a request into smaller ones, each with the number of its first sample.

    Example:
        A request for 8 samples from number 4 on, at most 3 each: (0, 3 from 4 on), (3, 3 from 7
        on), (6, 2 from 10 on).
    """
    for start in range(0, request.count, at_most):
        count = min(at_most, request.count - start)
        yield start, replace(request, count=count, first=request.first + start)
