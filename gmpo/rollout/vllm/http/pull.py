"""Requests of a `Work`, asked of servers by threads, and their samples given back as they come."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
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


def pull(
    work: Work,
    ask: Ask,
    homes: Homes,
    *,
    at_a_time: int,
    samples_per_request: int,
    on_error: Callable[[BaseException], None],
) -> None:
    """Serve `work` until there is no more.

    `work` is called from this thread only; `ask` runs in others.

    Args:
        work: The requests.
        ask: Asks a server.
        homes: The server of each request.
        at_a_time: Requests to servers.
        samples_per_request: The most that a server takes; larger requests are asked for in parts.
        on_error: Called with the first error, before the other threads are waited for: may end
            them.

    Raises:
        BaseException: The first error.  All samples that were finished have been given.
    """
    events: SimpleQueue[Finished | Ended] = SimpleQueue()

    def run(request: Request, start: int, part: Request) -> None:
        try:
            for number, completion in ask(homes.of(request), part):
                events.put(Finished(request, start + number, completion))
            events.put(Ended(None))
        except BaseException as error:
            events.put(Ended(error))

    pool = ThreadPoolExecutor(max_workers=at_a_time)
    num_open, over = 0, False
    try:
        while num_open or not over:
            room = at_a_time - num_open
            if room > 0 and not over:
                taken = work.take(room, wait=num_open == 0)
                over = taken is None
                for request in taken or ():
                    homes.of(request)  # here, so that the order of requests decides
                    for start, part in parts(request, samples_per_request):
                        pool.submit(run, request, start, part)
                        num_open += 1

            # Look for more work meanwhile, unless there is no room or no more of it.
            patience = POLL if at_a_time > num_open and not over else None
            with suppress(Empty):
                event = events.get(timeout=patience) if num_open else None
                if isinstance(event, Finished):
                    work.give(event.request, event.number, event.completion)
                elif isinstance(event, Ended):
                    num_open -= 1
                    if event.error is not None:
                        raise event.error
    except BaseException as error:
        # Cancel first, or others would begin in the place of those that are ended.
        pool.shutdown(wait=False, cancel_futures=True)
        on_error(error)
        raise
    finally:
        pool.shutdown(wait=True)
        while not events.empty():
            event = events.get()
            if isinstance(event, Finished):
                work.give(event.request, event.number, event.completion)


def parts(request: Request, at_most: int) -> Iterator[tuple[int, Request]]:
    """Cut a request into smaller ones, each with the number of its first sample.

    Example:
        A request for 8 samples from number 4 on, at most 3 each: (0, 3 from 4 on), (3, 3 from 7
        on), (6, 2 from 10 on).
    """
    for start in range(0, request.count, at_most):
        count = min(at_most, request.count - start)
        yield start, replace(request, count=count, first=request.first + start)
