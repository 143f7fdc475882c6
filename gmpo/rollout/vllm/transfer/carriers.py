"""Carriers of weights into an engine: by reference, in files, over NCCL."""

import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from typing import Any, Protocol

import torch
from torch import Tensor

from gmpo.rollout.vllm.errors import VllmError
from gmpo.rollout.vllm.transfer.folder import ExchangeFolder

PAUSE = 0.5  # seconds between two looks at whether the thread has failed

NamedTensor = tuple[str, Tensor]
Bucket = list[NamedTensor]


class Receiver(Protocol):
    """The engine's side of a publication; vLLM calls it a VLLMWeightSyncClient."""

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None: ...

    def start_weight_update(self) -> None: ...

    def update_weights(self, update_info: dict[str, Any]) -> None: ...

    def finish_weight_update(self, weight_version: str | None = None) -> None: ...

    def abandon(self) -> None: ...


class Carrier(Protocol):
    """Carries buckets of tensors from the trainer to a receiver."""

    def begin(self) -> None: ...

    def carry(self, bucket: Bucket) -> None: ...

    def end(self, tag: str) -> None: ...

    def abandon(self) -> None:
        """End a failed publication, so that another can begin."""
        ...


class TrainerEngine(Protocol):
    """The part of vLLM's trainer engine that sends all tensors of its source."""

    def send_weights(self) -> None: ...


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
    """A safetensors file for each bucket, in a folder that both sides see."""

    def __init__(self, receiver: Receiver, folder: ExchangeFolder) -> None:
        super().__init__(receiver)
        self.folder = folder

    def carry(self, bucket: Bucket) -> None:
        from safetensors.torch import save_file

        with self.folder.file("weights.safetensors") as path:
            save_file({name: tensor.cpu().contiguous() for name, tensor in bucket}, path)
            self.receiver.update_weights({"path": str(path)})


class ByNccl:
    """Over NCCL, by vLLM's own trainer engine.

    The engine works in a thread, so that the trainer never waits for a lost peer for ever.

    Args:
        make_engine: Gives vLLM's trainer engine for a source of named tensors.
        timeout: Seconds without progress after which a publication has failed.
    """

    def __init__(
        self,
        make_engine: Callable[[Iterable[NamedTensor]], TrainerEngine],
        *,
        timeout: float,
    ) -> None:
        self.make_engine = make_engine
        self.timeout = timeout
        self.queue: queue.Queue[NamedTensor | None] = queue.Queue(maxsize=4)
        self.thread: threading.Thread | None = None
        self.error: BaseException | None = None
        self.engine: TrainerEngine | None = None

    def begin(self) -> None:
        self.queue = queue.Queue(maxsize=4)
        self.error = None
        self.thread = threading.Thread(target=self._work, daemon=True, name="gmpo-publication")
        self.thread.start()

    def carry(self, bucket: Bucket) -> None:
        # The thread sends from other streams than the one that made the tensors.
        if bucket[0][1].is_cuda:
            torch.cuda.current_stream().synchronize()

        for pair in bucket:
            self._put(pair)

    def end(self, tag: str) -> None:
        self._put(None)
        assert self.thread is not None
        self.thread.join(self.timeout)
        self._check(late=self.thread.is_alive())

    def abandon(self) -> None:
        self.engine = None  # its group is of no use any more

    def _put(self, pair: NamedTensor | None) -> None:
        """Hand a tensor to the thread, unless it has failed, or does not take it in time."""
        deadline = time.monotonic() + self.timeout
        while True:
            self._check(late=time.monotonic() >= deadline)
            with suppress(queue.Full):
                self.queue.put(pair, timeout=min(self.timeout, PAUSE))
                return

    def _check(self, *, late: bool) -> None:
        if self.error is not None:
            raise VllmError(f"Sending weights over NCCL failed: {self.error}") from self.error
        if late:
            raise VllmError(
                f"Sending weights over NCCL did not move on for {self.timeout:g} seconds: the "
                "server, or the way to it, is lost. Restart the server."
            )

    def _work(self) -> None:
        try:
            if self.engine is None:
                self.engine = self.make_engine(self)
            self.engine.send_weights()
        except BaseException as error:
            self.error = error

    def __iter__(self) -> Iterator[NamedTensor]:
        while (pair := self.queue.get()) is not None:
            yield pair
