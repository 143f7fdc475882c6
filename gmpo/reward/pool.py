"""Worker processes for rewards: each call has limits, and a process that breaks one is killed.

A worker is a fresh interpreter that runs `worker.py`, in its own session.  It is started by
`exec` rather than by a fork of the trainer or by multiprocessing's spawn: a fork would copy the
locks of torch's threads, and a spawn would run the user's script a second time.

Whatever a worker starts inherits a mark in its environment.  By this mark, and by its parents, it
is found and killed together with the worker, also where it has left the worker's process group.
"""

import atexit
import concurrent.futures
import contextlib
import dataclasses
import hashlib
import json
import os
import pickle
import pickletools
import queue
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import psutil

MARK = "GMPO_REWARD_WORKER"  # the environment variable by which a worker's processes are found
BEGUN = b"begun\n"  # what a worker writes once it has read a question
_TICK_S = 0.05  # between two looks at a busy worker's limits
_TICKS_PER_FAMILY = 10  # how many looks go by before a worker's children are counted in too
_START_S = 300.0  # to start a worker, and to import what it is to call


@dataclass(frozen=True, slots=True)
class Limits:
    """Limits of one call, past which its process is killed; None sets no limit."""

    wall_s: float | None = None
    cpu_s: float | None = None
    memory_bytes: int | None = None  # resident, of the worker and of what it started


@dataclass(frozen=True, slots=True)
class Outcome:
    """The outcome of one call."""

    value: Any = None  # the answer, as JSON can carry it
    lost: str | None = None  # why the process ended instead of answering
    error: str | None = None  # the exception that the function raised, with its traceback
    unloadable: bool = False  # the error came up before the function could be called
    untouched: bool = False  # the process had ended before it was asked


@dataclass(frozen=True, slots=True)
class Packed:
    """A Python object on its way to workers, each of which unpacks it once."""

    key: str
    blob: bytes
    modules: tuple[tuple[str, str], ...] = ()  # (name, file) of modules that it refers to


@dataclass(slots=True)
class Cancellation:
    """Ends the calls that were submitted with it."""

    event: threading.Event = field(default_factory=threading.Event)

    def cancel(self) -> None:
        self.event.set()


class WorkerPool:
    """Up to `max_workers` processes that call functions.  May be used from any thread.

    Processes start when they are needed, and stay for the next call.
    """

    def __init__(self, max_workers: int):
        self.max_workers = max_workers
        self._threads = concurrent.futures.ThreadPoolExecutor(max_workers, "reward-workers")
        self._idle: queue.LifoQueue[Worker] = queue.LifoQueue()
        self._alive: set[Worker] = set()
        self._lock = threading.Lock()
        self._closing = Cancellation()

    def submit(
        self,
        function: Packed,
        *arguments: Any,
        limits: Limits,
        shared: Packed | None = None,
        patience_s: float = 0.0,
        cancellation: Cancellation | None = None,
    ) -> concurrent.futures.Future[Outcome]:
        """Call `function` in a worker.

        Args:
            arguments: What it gets; pickled.
            shared: A last argument that many calls share; a worker unpacks it once.
            patience_s: Seconds to wait for a busy worker before another one is started.
            cancellation: Ends the call, and its process if it is running.

        Raises:
            TypeError, pickle.PicklingError, ...: If the arguments can't be pickled.
        """
        blob = pickle.dumps(arguments, protocol=pickle.HIGHEST_PROTOCOL)
        events = [self._closing.event]
        if cancellation is not None:
            events.append(cancellation.event)
        call = Call(function, blob, shared, limits, events)
        return self._threads.submit(self._run, call, patience_s)

    def close(self) -> None:
        """Kill every worker with what it started; calls that are running are lost."""
        self._closing.cancel()
        self._threads.shutdown(wait=True, cancel_futures=True)
        with self._lock:
            workers, self._alive = self._alive, set()
        for worker in workers:
            worker.end()

    @property
    def closed(self) -> bool:
        return self._closing.event.is_set()

    def pids(self) -> list[int]:
        """Return the process ids of the workers."""
        with self._lock:
            return sorted(worker.pid for worker in self._alive)

    def _run(self, call: "Call", patience_s: float) -> Outcome:
        if call.cancelled:
            return Outcome(lost="it was cancelled")
        while True:
            worker = self._take(patience_s)
            outcome = worker.ask(call)
            if not worker.ended:
                self._idle.put(worker)
                return outcome
            with self._lock:
                self._alive.discard(worker)
            if not (outcome.untouched and worker.has_answered):
                self._replace_later(call)
                return outcome

    def _replace_later(self, call: "Call") -> None:
        """Start another worker before it is asked for: importing what it calls takes seconds."""
        with contextlib.suppress(RuntimeError):  # the pool has been closed meanwhile
            events = [self._closing.event]
            self._threads.submit(self._prepare, dataclasses.replace(call, events=events))

    def _prepare(self, call: "Call") -> None:
        with self._lock:
            if call.cancelled or len(self._alive) >= self.max_workers:
                return
            worker = Worker()
            self._alive.add(worker)

        worker.load(call)
        if not worker.ended:
            self._idle.put(worker)
            return
        with self._lock:
            self._alive.discard(worker)

    def _take(self, patience_s: float) -> "Worker":
        """Return an idle worker, or a new one if none becomes idle in time."""
        with self._lock:
            wait = patience_s if self._alive else 0.0
        while True:
            try:
                worker = self._idle.get(timeout=wait) if wait else self._idle.get_nowait()
            except queue.Empty:
                worker = Worker()
                with self._lock:
                    self._alive.add(worker)
                return worker
            if worker.is_alive():
                return worker
            worker.end()  # it died while nobody asked it anything
            with self._lock:
                self._alive.discard(worker)


@dataclass(frozen=True, slots=True)
class Call:
    """One call of a function, as a worker gets it."""

    function: Packed
    arguments: bytes
    shared: Packed | None
    limits: Limits
    events: list[threading.Event]

    @property
    def cancelled(self) -> bool:
        return any(event.is_set() for event in self.events)


class Worker:
    """One worker process, which answers one call at a time."""

    def __init__(self):
        self.ended = False
        self.has_answered = False
        self._mark = uuid.uuid4().hex
        self._known: set[str] = set()  # keys of the objects that it has unpacked
        self._shared: str | None = None  # the key of the last shared argument
        self._lines: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        # -P and the parent's path: it imports what the parent would, and nothing from the
        # working directory.
        environment = os.environ | {
            MARK: self._mark,
            "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
        }
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "gmpo.reward.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            start_new_session=True,  # Ctrl-C is for the trainer; a group that can be killed
        )
        self._questions = _present(self._process.stdin)
        lines = _present(self._process.stdout)
        threading.Thread(target=self._read, args=(lines,), daemon=True).start()

    @property
    def pid(self) -> int:
        return self._process.pid

    def is_alive(self) -> bool:
        return not self.ended and self._process.poll() is None

    def ask(self, call: Call) -> Outcome:
        """Return what became of `call`; the worker has ended if it was lost."""
        failure = self.load(call)
        if failure is not None:
            return failure

        question = {
            "call": call.function.key,
            "arguments": call.arguments,
            "shared": None if call.shared is None else call.shared.key,
            "seconds": call.limits.wall_s,
        }
        return self._answer(question, call.limits, call)

    def load(self, call: Call) -> Outcome | None:
        """Let the process unpack what `call` needs; return None if all went well."""
        loading = Limits(wall_s=_START_S)
        for packed in filter(None, (call.function, call.shared)):
            if packed.key in self._known:
                continue
            question = {"unpack": packed.key, "blob": packed.blob, "modules": packed.modules}
            if packed is call.shared:
                question["instead_of"], self._shared = self._shared, packed.key
            outcome = self._answer(question, loading, call)
            if outcome.lost or outcome.error:
                return dataclasses.replace(outcome, unloadable=True)
            self._known.add(packed.key)
        return None

    def end(self) -> None:
        """Kill the process, and whatever it started."""
        if self.ended:
            return
        self.ended = True
        kill_family(self._process.pid, self._mark)
        self._process.wait()
        with contextlib.suppress(OSError):  # what was not written yet has no reader any more
            self._questions.close()

    def _answer(self, question: dict[str, Any], limits: Limits, call: Call) -> Outcome:
        try:
            pickle.dump(question, self._questions, protocol=pickle.HIGHEST_PROTOCOL)
            self._questions.flush()
        except OSError:  # a broken pipe: the process has ended
            return self._lost(self._how_it_ended(), untouched=True)

        watch, begun = Watch(self._process.pid, limits), False
        while True:
            with contextlib.suppress(queue.Empty):
                line = self._lines.get(timeout=_TICK_S)
                if line == BEGUN:
                    begun = True
                    continue
                if line is None:
                    return self._lost(self._how_it_ended(), untouched=not begun)
                self.has_answered = True
                return Outcome(**json.loads(line))

            if call.cancelled:
                return self._lost("it was cancelled")
            if self._process.poll() is not None and self._lines.empty():
                return self._lost(self._how_it_ended(), untouched=not begun)
            reason = watch.broken_limit()
            if reason is not None:
                return self._lost(reason)

    def _lost(self, reason: str, *, untouched: bool = False) -> Outcome:
        self.end()
        return Outcome(lost=reason, untouched=untouched)

    def _how_it_ended(self) -> str:
        with contextlib.suppress(subprocess.TimeoutExpired):
            status = self._process.wait(timeout=1.0)
            if status < 0:
                return f"its process was killed by {signal.Signals(-status).name}"
            return f"its process ended with exit status {status}"
        return "its process closed its output"

    def _read(self, lines: IO[bytes]) -> None:
        """Pass on the lines that the process writes; None is the end."""
        with lines, contextlib.suppress(OSError, ValueError):
            for line in lines:
                if line.endswith(b"\n"):
                    self._lines.put(line)
        self._lines.put(None)


class Watch:
    """Looks whether a call has broken one of its limits."""

    def __init__(self, pid: int, limits: Limits):
        self._limits = limits
        self._begun = time.monotonic()
        self._process: psutil.Process | None = None
        self._pid = pid
        self._looks = 0
        self._children_bytes = 0
        self._cpu_before = 0.0 if limits.cpu_s is None else self._cpu_seconds()

    def broken_limit(self) -> str | None:
        """Return which limit is broken, in words; None if none is."""
        limits = self._limits
        if limits.wall_s is not None and time.monotonic() - self._begun > limits.wall_s:
            return f"there was no answer within {limits.wall_s:g} s"

        with contextlib.suppress(psutil.Error):
            if limits.cpu_s is not None and self._cpu_seconds() - self._cpu_before > limits.cpu_s:
                return f"there was no answer within {limits.cpu_s:g} s of CPU time"
            if limits.memory_bytes is not None and self._bytes() > limits.memory_bytes:
                return f"it held more than {limits.memory_bytes / 2**30:g} GiB of memory"
        return None

    def _of(self) -> psutil.Process:
        if self._process is None:
            self._process = psutil.Process(self._pid)
        return self._process

    def _cpu_seconds(self) -> float:
        try:
            times = self._of().cpu_times()
        except psutil.Error:
            return 0.0
        return times.user + times.system

    def _bytes(self) -> int:
        if self._looks % _TICKS_PER_FAMILY == 0:
            self._children_bytes = 0
            for child in self._of().children(recursive=True):
                with contextlib.suppress(psutil.Error):
                    self._children_bytes += child.memory_info().rss
        self._looks += 1
        return self._of().memory_info().rss + self._children_bytes


def kill_family(pid: int, mark: str | None = None) -> None:
    """Kill the process `pid`, its group, its descendants, and all that carry `mark`."""
    for _ in range(50):  # until nothing new has come up meanwhile
        members = {pid, *_descendants(pid), *_marked(mark)}
        members.discard(os.getpid())
        _kill_group(pid)
        alive = [member for member in members if _kill(member)]
        if not alive:
            return
        time.sleep(0.01)


def pack(value: object) -> Packed:
    """Pack a function or other object for workers.

    What importable modules define is sent by name.  What the user's script or notebook defines is
    sent whole, by dill.

    Raises:
        ValueError: If it holds something that can't be sent.
    """
    try:
        blob = pickle.dumps(value, protocol=pickle.HIGHEST_PROTOCOL)
        by_name = "__main__" not in set(_strings(blob))
    except Exception:  # a lambda, a closure, or whatever a __reduce__ raises
        blob, by_name = b"", False

    if not by_name:
        import dill

        try:
            blob = dill.dumps(value, recurse=True)
        except Exception as error:
            raise ValueError(
                f"{value!r} can't be sent to worker processes ({type(error).__name__}: {error}). "
                "Create connections, locks and models inside of the function, move it into a "
                "module, or leave reward_workers at 0."
            ) from None

    modules = []
    for name in sorted(set(_strings(blob)) & sys.modules.keys() - {"__main__"}):
        file = getattr(sys.modules[name], "__file__", None)
        if file is not None and file.endswith(".py"):
            modules.append((name, str(Path(file).resolve())))
    return Packed(hashlib.sha256(blob).hexdigest(), blob, tuple(modules))


def shared_pool(max_workers: int | None = None) -> WorkerPool:
    """Return the pool of this process, which ends with it.

    Args:
        max_workers: Another number of processes than before replaces the pool.
    """
    known = _pools.get(os.getpid())  # a forked process has none of its parent's threads
    if known is not None and not known.closed:
        if max_workers in (None, known.max_workers):
            return known
        known.close()
    size = max_workers or min(4, os.cpu_count() or 1)
    pool = _pools[os.getpid()] = WorkerPool(size)
    return pool


_pools: dict[int, WorkerPool] = {}


@atexit.register
def _close_pool() -> None:
    pool = _pools.pop(os.getpid(), None)
    if pool is not None:
        pool.close()


def _strings(blob: bytes) -> Iterable[str]:
    """Yield the texts in a pickle, among which are the names of its modules."""
    for _, argument, _ in pickletools.genops(blob):
        if isinstance(argument, str):
            yield from (argument, argument.partition(" ")[0])


def _descendants(pid: int) -> set[int]:
    with contextlib.suppress(psutil.Error):
        return {child.pid for child in psutil.Process(pid).children(recursive=True)}
    return set()


def _marked(mark: str | None) -> set[int]:
    """Return the processes whose environment holds `mark`."""
    if mark is None:
        return set()
    found = set()
    for pid in psutil.pids():
        with contextlib.suppress(psutil.Error, OSError, ValueError):
            if psutil.Process(pid).environ().get(MARK) == mark:
                found.add(pid)
    return found


def _kill_group(pid: int) -> None:
    if hasattr(os, "killpg"):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(pid, signal.SIGKILL)


def _kill(pid: int) -> bool:
    """Kill `pid`; return True if it was still running."""
    with contextlib.suppress(psutil.Error):
        process = psutil.Process(pid)
        if process.status() == psutil.STATUS_ZOMBIE:
            return False
        process.kill()
        return True
    return False


def _present(pipe: IO[bytes] | None) -> IO[bytes]:
    assert pipe is not None
    return pipe
