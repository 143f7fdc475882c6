"""Bringing the policy's weights into a vLLM engine.

The steps are those of vLLM's own weight transfer: init, start, update (one bucket of whole tensors after another),
finish. What takes them differs only in its two ends: a `Receiver` is the engine's side (this process, or servers), a
`Carrier` says how tensors travel (by reference, in files, over NCCL).

Making tensors whole is a collective of the ranks.  So a rank on which something fails goes on taking part in it,
without sending, and all ranks raise together at the end.
"""

import os
import queue
import tempfile
import threading
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from gmpo.distributed import FirstError, raise_on_all_ranks
from gmpo.rollout.vllm.errors import VllmError
from gmpo.rollout.weights.named import named_weights

Bucket = list[tuple[str, Tensor]]

BUCKET_BYTES = 256 * 2**20


class Receiver(Protocol):
    """The engine's side of a publication; what vLLM calls a VLLMWeightSyncClient."""

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None: ...

    def start_weight_update(self) -> None: ...

    def update_weights(self, update_info: dict[str, Any]) -> None: ...

    def finish_weight_update(self, weight_version: str | None = None) -> None: ...

    def abandon(self) -> None: ...


class Carrier(Protocol):
    """How buckets travel."""

    def begin(self) -> None: ...

    def carry(self, bucket: Bucket) -> None: ...

    def end(self, tag: str) -> None: ...

    def abandon(self) -> None:
        """End what has failed, so that it can begin anew."""
        ...


def send(carrier: Carrier | None, weights: Iterable[tuple[str, Tensor]], *, tag: str) -> None:
    """Publish `weights` as version `tag`.  Every rank must call.

    Args:
        carrier: None on ranks that only help to make tensors whole.

    Raises:
        VllmFault: On every rank, if it failed on any.
    """
    first = FirstError()
    if carrier is not None:
        first.run(carrier.begin)
    try:
        for bucket in buckets(weights):
            if carrier is not None:
                first.run(carrier.carry, bucket)
    except Exception as error:  # of making weights whole: the engine must hear of it, too
        first.note(error)
    if carrier is not None:
        first.run(carrier.end, tag)
        if first.error is not None and not getattr(first.error, "lost", False):
            carrier.abandon()
    with raise_on_all_ranks("publish the policy's weights"):
        first.raise_if_any()


def buckets(weights: Iterable[tuple[str, Tensor]], size: int = BUCKET_BYTES) -> Iterator[Bucket]:
    """Tensors together until they have `size` bytes, so that no more than that is held twice."""
    bucket: Bucket = []
    held = 0
    for name, tensor in weights:
        bucket.append((name, tensor))
        held += tensor.nbytes
        if held >= size:
            yield bucket
            bucket, held = [], 0
    if bucket:
        yield bucket


def new_run() -> str:
    """A name for a run, so that no server takes the weights of another run for ours."""
    return f"gmpo-{uuid.uuid4().hex[:12]}"


# -- carriers --------------------------------------------------------------------------------------------------------


class ByReference:
    """Within one process: the engine reads the trainer's tensors."""

    def __init__(self, receiver: Receiver) -> None:
        self.receiver = receiver

    def begin(self) -> None:
        self.receiver.start_weight_update()

    def carry(self, bucket: Bucket) -> None:
        self.receiver.update_weights({"weights": bucket})

    def end(self, tag: str) -> None:
        self.receiver.finish_weight_update(tag)

    def abandon(self) -> None:
        with suppress(Exception):  # there is a better error to raise
            self.receiver.abandon()


class ByFile(ByReference):
    """A safetensors file for each bucket, in a folder that both sides see; shared memory where they share a machine."""

    def __init__(self, receiver: Receiver, folder: str | None = None) -> None:
        super().__init__(receiver)
        self.parent = shared_folder(folder)

    def carry(self, bucket: Bucket) -> None:
        from safetensors.torch import save_file

        with tempfile.TemporaryDirectory(prefix="gmpo-weights-", dir=self.parent) as folder:
            path = Path(folder) / "weights.safetensors"
            os.chmod(folder, 0o755)  # a server of another user may read it
            save_file({name: tensor.cpu().contiguous() for name, tensor in bucket}, path)
            self.receiver.update_weights({"path": str(path)})


def shared_folder(folder: str | None) -> str | None:
    """`folder`, else shared memory, else (None) the machine's folder for temporary files."""
    return folder or ("/dev/shm" if os.access("/dev/shm", os.W_OK) else None)


class ByNccl:
    """Over NCCL, by vLLM's own trainer engine, in a thread of its own, so that nobody waits for a lost peer for ever.

    Args:
        make_engine: Gives the vLLM trainer engine for a source of (name, tensor).
        timeout: Seconds that a publication may take.
    """

    def __init__(
        self, make_engine: Callable[[Iterable[tuple[str, Tensor]]], Any], *, timeout: float
    ) -> None:
        self.make_engine = make_engine
        self.timeout = timeout
        self.queue: queue.Queue[tuple[str, Tensor] | None] = queue.Queue(maxsize=4)
        self.thread: threading.Thread | None = None
        self.error: BaseException | None = None
        self.engine: Any = None

    def begin(self) -> None:
        self.queue = queue.Queue(maxsize=4)
        self.error = None
        self.thread = threading.Thread(target=self._work, daemon=True, name="gmpo-publication")
        self.thread.start()

    def carry(self, bucket: Bucket) -> None:
        if bucket[0][1].is_cuda:
            torch.cuda.current_stream().synchronize()  # the thread sends from streams of its own
        for pair in bucket:
            self._put(pair)

    def end(self, tag: str) -> None:
        self._put(None)
        assert self.thread is not None
        self.thread.join(self.timeout)
        self._check(late=self.thread.is_alive())

    def abandon(self) -> None:
        self.engine = None  # its group is of no use any more

    def _put(self, pair: tuple[str, Tensor] | None) -> None:
        try:
            self.queue.put(pair, timeout=self.timeout)
        except queue.Full:
            self._check(late=True)
        self._check(late=False)

    def _check(self, *, late: bool) -> None:
        if self.error is not None:
            raise VllmError(f"Sending weights over NCCL failed: {self.error}") from self.error
        if late:
            raise VllmError(
                f"Sending weights over NCCL did not move on for {self.timeout:g} seconds: the server, or the way to "
                "it, is lost. Restart the server."
            )

    def _work(self) -> None:
        try:
            if self.engine is None:
                self.engine = self.make_engine(self)
            self.engine.send_weights()
        except BaseException as error:
            self.error = error

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        while (pair := self.queue.get()) is not None:
            yield pair


def policy_weights(
    policy: Callable[[], Any], *, merge: bool, dtype: torch.dtype
) -> Iterator[tuple[str, Tensor]]:
    """The weights of the policy as it is when the iteration begins."""
    yield from named_weights(policy(), merge=merge, dtype=dtype)
