"""The memory that keys and values take, and the memory that there is for them."""

import torch
from transformers import PreTrainedModel

CPU_BYTES = 4 * 2**30  # for keys and values on a CPU


def bytes_per_token(model: PreTrainedModel) -> int:
    """Return the size of one token's keys and values in all layers of transformers' cache.

    One token is read to see them: configs say it in many ways, and some have a value per layer.
    """
    token = torch.zeros(1, 1, dtype=torch.int64, device=model.device)
    cache = model(input_ids=token, use_cache=True).past_key_values
    kept = [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]
    return max(1, sum(tensor.nbytes for tensor in kept))


def cache_bytes(device: torch.device) -> int:
    """Return the memory that a cache may take: half of what a GPU has left, or 4 GiB on a CPU."""
    if device.type != "cuda":
        return CPU_BYTES
    # What torch holds and does not use is free, too: after a step of training that is the most.
    free = torch.cuda.mem_get_info(device)[0]
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return (free + unused) // 2
