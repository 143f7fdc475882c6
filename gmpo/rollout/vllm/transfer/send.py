"""Bringing the policy's weights into a vLLM engine.

The steps are those of vLLM's own weight transfer: init, start, update (one bucket of whole tensors
after another), finish.  Only the two ends differ: a `Receiver` is the engine's side (this process,
or servers), and a `Carrier` knows how tensors travel (by reference, in files, over NCCL).

Making tensors whole is a collective of the ranks.  So a rank on which something fails goes on
taking part in it, without sending, and all ranks raise together at the end.
"""

import uuid
from collections.abc import Callable, Iterable, Iterator

import torch
from transformers import PreTrainedModel

from gmpo.distributed import FirstError, raise_on_all_ranks
from gmpo.rollout.vllm.transfer.carriers import Bucket, Carrier, NamedTensor
from gmpo.rollout.weights.named import named_weights

BUCKET_BYTES = 256 * 2**20


def send(carrier: Carrier | None, weights: Iterable[NamedTensor], *, tag: str) -> None:
    """Publish `weights` as version `tag`.  Every rank must call.

    Args:
        carrier: None on ranks that only help to make tensors whole.
        weights: Whole tensors; making each of them may be a collective.
        tag: The name of this version on the servers.

    Raises:
        VllmError: On every rank, if it failed on any.
    """
    first = FirstError()
    if carrier is not None:
        first.run(carrier.begin)

    # Iterate to the end, whatever happens: the other ranks wait in the collectives.
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


def buckets(weights: Iterable[NamedTensor], size: int = BUCKET_BYTES) -> Iterator[Bucket]:
    """Collect tensors until they have `size` bytes, so that no more than that is held twice.

    Example:
        Tensors of 16 bytes, size 32 -> two in each bucket, and what is left in the last.
    """
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
    """Return a name for a run, so that no server takes another run's weights for ours."""
    return f"gmpo-{uuid.uuid4().hex[:12]}"


def policy_weights(
    policy: Callable[[], PreTrainedModel], *, merge: bool, dtype: torch.dtype
) -> Iterator[NamedTensor]:
    """Yield the weights of the policy as it is when the iteration begins."""
    yield from named_weights(policy(), merge=merge, dtype=dtype)
