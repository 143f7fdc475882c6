"""The trainer's end of a publication over NCCL: vLLM's own engine, without unpickling.

vLLM can bring trainer and workers together over a TCPStore, whose values it unpickles, or by an
NCCL unique id that the trainer makes.  The id travels with the other init infos, over HTTP, under
the token.
"""

import base64
import os
import socket
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, wait
from dataclasses import asdict, dataclass
from typing import Any, ParamSpec, TypeVar
from urllib.parse import urlsplit

import torch

from gmpo.rollout.vllm.transfer.carriers import NamedTensor, Receiver, TrainerEngine

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class WeightSource:
    """The tensors that vLLM's trainer engine sends; `metadata` announces exactly those."""

    names: Sequence[tuple[str, torch.dtype, tuple[int, ...]]]
    tensors: Iterable[NamedTensor]

    def metadata(self) -> list[Any]:
        from vllm.distributed.weight_transfer.base import ParamMeta

        return [ParamMeta(*entry) for entry in self.names]

    def __iter__(self) -> Iterator[NamedTensor]:
        return iter(self.tensors)


def trainer_engine(
    source: WeightSource,
    receiver: Receiver,
    *,
    join: Callable[[dict[str, Any]], None],
    workers: int,
    host: str,
    port: int,
) -> TrainerEngine:
    """Return vLLM's NCCL trainer engine, joined with all workers.

    Args:
        source: The tensors of each publication.
        receiver: Told by the engine to start, update and finish.
        join: Gives every server the init info; blocks until its workers have joined.
        workers: Their number, over all servers.
        host: This machine, as the servers reach it.
        port: The port on which NCCL waits for the workers.
    """
    from vllm.distributed.device_communicators.pynccl_wrapper import NCCLLibrary
    from vllm.distributed.weight_transfer.nccl_common import (
        NCCLWeightTransferInitInfo,
        uid_init_process_group,
    )
    from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerWeightTransferEngine

    engine: Any = NCCLTrainerWeightTransferEngine(
        client=receiver,  # pyright: ignore[reportArgumentType] (vLLM asks for its own class)
        source=source,  # pyright: ignore[reportArgumentType] (vLLM asks for its own class)
        is_sender=True,
    )
    os.environ["NCCL_COMM_ID"] = f"{host}:{port}"  # else NCCL chooses a port
    try:
        identity = bytes(NCCLLibrary().ncclGetUniqueId().internal)
        info = NCCLWeightTransferInitInfo(
            rank_offset=1,
            world_size=workers + 1,
            nccl_unique_id_b64=base64.b64encode(identity).decode(),
            packed=engine.packed,
            packed_buffer_size_bytes=engine.packed_buffer_size_bytes,
            packed_num_buffers=engine.packed_num_buffers,
        )
        payload = {name: value for name, value in asdict(info).items() if value is not None}

        # Both sides wait for each other in here.  If the servers refuse to join, nobody comes to
        # the group: its thread is left behind, and the reason is told at once.
        device = torch.accelerator.current_device_index()
        joined = in_thread(join, payload)
        group = in_thread(uid_init_process_group, identity, 0, workers + 1, device)
        ended, _ = wait([joined, group], return_when=FIRST_EXCEPTION)
        for future in ended:
            future.result()
        engine.model_update_group = group.result()
    finally:
        del os.environ["NCCL_COMM_ID"]
    return engine


def in_thread(
    work: Callable[Arguments, Result], *arguments: Arguments.args, **options: Arguments.kwargs
) -> Future[Result]:
    """Run `work` in a thread that does not keep the process from ending."""
    future: Future[Result] = Future()

    def run() -> None:
        try:
            future.set_result(work(*arguments, **options))
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True, name="gmpo-nccl").start()
    return future


def own_host(address: str) -> str:
    """Return this machine's address on the way to a server."""
    parts = urlsplit(address)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((parts.hostname, parts.port or 80))  # sends nothing
        return probe.getsockname()[0]
