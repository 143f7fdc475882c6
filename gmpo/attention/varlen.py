"""Attention of a row of segments by flash attention for sequences of unequal lengths, on CUDA.

Each run of tokens is a sequence: its queries stand in place, and its keys are gathered, those of
its prompt before its own.  Causal attention aligned at the end is then exactly what it sees.
"""

import functools
import importlib.util
import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gmpo.attention.kernels import AttentionParams
from gmpo.attention.segments import Reach, Segments, Tree, runs


@dataclass(frozen=True, slots=True)
class Sequences:
    """N sequences of a row, as the kernel takes them."""

    query_ends: Tensor  # [N + 1] int32, from 0: where each sequence of queries ends
    key_ends: Tensor  # [N + 1] int32, of gathered keys
    keys: Tensor  # [K] int64, places of the gathered keys in the row
    max_queries: int
    max_keys: int


def sequences(trees: Sequence[Tree], device: torch.device) -> Sequences:
    """Return the sequences of a row of trees.

    Example:
        Tree(3, (2, 1)) -> query_ends [0, 3, 5, 6], key_ends [0, 3, 8, 12] and
        keys [0, 1, 2,  0, 1, 2, 3, 4,  0, 1, 2, 5]
    """
    query_ends, key_ends, keys, lengths, place = [0], [0], [], [], 0
    for tree in trees:
        for run in runs(tree, place):
            # A run's position is the length of the prompt before it.
            keys.append(torch.arange(run.prompt, run.prompt + run.position))
            keys.append(torch.arange(run.place, run.place + run.length))
            query_ends.append(query_ends[-1] + run.length)
            key_ends.append(key_ends[-1] + run.position + run.length)
            lengths.append((run.length, run.position + run.length))
        place += tree.tokens

    return Sequences(
        query_ends=torch.tensor(query_ends, dtype=torch.int32, device=device),
        key_ends=torch.tensor(key_ends, dtype=torch.int32, device=device),
        keys=torch.cat(keys).to(device),
        max_queries=max(length for length, _ in lengths),
        max_keys=max(length for _, length in lengths),
    )


def serves(query: Tensor, value: Tensor, reach: Reach, params: AttentionParams) -> bool:
    """Return whether the kernel computes this here."""
    size = query.shape[-1]
    return (
        query.is_cuda
        and _is_installed()
        and query.dtype in (torch.float16, torch.bfloat16)
        and size == value.shape[-1]
        and size <= 256
        and size % 8 == 0
        and reach.chunk is None
        and params.softcap is None
        and params.sinks is None
        and torch.backends.cuda.is_flash_attention_available()
        and torch.cuda.get_device_capability(query.device) >= (8, 0)
    )


@functools.cache
def _is_installed() -> bool:
    """Return whether this torch has the kernel with windows and grouped queries."""
    if importlib.util.find_spec("torch.nn.attention.varlen") is None:
        return False
    from torch.nn.attention.varlen import varlen_attn

    return {"window_size", "enable_gqa"} <= set(inspect.signature(varlen_attn).parameters)


def varlen_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segments: Segments,
    reach: Reach,
    params: AttentionParams,
) -> Tensor:
    """Return attention as `attend` does: [L, Hq, D] of [L, Hq, D] and [L, Hk, D]."""
    from torch.nn.attention.varlen import varlen_attn

    found = segments.remembered("varlen", lambda: sequences(segments.trees, segments.device))
    output = varlen_attn(
        query.contiguous(),
        _Gather.apply(key, found.keys),
        _Gather.apply(value, found.keys),
        found.query_ends,
        found.key_ends,
        found.max_queries,
        found.max_keys,
        scale=params.scale,
        window_size=(-1 if reach.window is None else reach.window - 1, 0),
        enable_gqa=query.shape[1] != key.shape[1],
    )
    assert isinstance(output, Tensor)
    return output


class _Gather(torch.autograd.Function):
    """Tokens at some places of a row; their gradients add up in float32."""

    @staticmethod
    def forward(ctx: Any, row: Tensor, places: Tensor) -> Tensor:
        ctx.save_for_backward(places)
        ctx.shape = row.shape
        return row.index_select(0, places)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        (places,) = ctx.saved_tensors
        wide = torch.promote_types(gradients[0].dtype, torch.float32)
        total = gradients[0].new_zeros(ctx.shape, dtype=wide)
        total.index_add_(0, places, gradients[0].to(wide))
        return total.to(gradients[0].dtype), None
