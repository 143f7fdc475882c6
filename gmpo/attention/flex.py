"""Attention of a row of segments by FlexAttention, on CUDA where `varlen.py` does not serve.

Its block mask is built from the segments, never from all pairs: for 34,000 tokens it takes
milliseconds and a megabyte.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gmpo.attention.kernels import AttentionParams
from gmpo.attention.merge import drain
from gmpo.attention.segments import Piece, Reach, Segments, pieces

BLOCK = 128  # tokens, of queries and of keys
SMALLEST_HEAD = 16

MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def serves(query: Tensor, value: Tensor) -> bool:
    """Return whether FlexAttention computes this here, with its gradient."""
    return query.is_cuda and min(query.shape[-1], value.shape[-1]) >= SMALLEST_HEAD


def flex_attention_of(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segments: Segments,
    reach: Reach,
    params: AttentionParams,
) -> Tensor:
    """Return attention as `attend` does: [L, Hq, D] of [L, Hq, D] and [L, Hk, D]."""
    mask = segments.remembered(("flex", reach), lambda: block_mask(segments, reach))
    options: dict[str, Any] = {}
    if params.sinks is not None:
        from torch.nn.attention.flex_attention import AuxRequest

        options["return_aux"] = AuxRequest(lse=True)

    output = _kernel(query.device.type)(
        *(tensor.transpose(0, 1)[None] for tensor in (query, key, value)),
        score_mod=None if params.softcap is None else _capped(params.softcap),
        block_mask=mask,
        scale=params.scale,
        enable_gqa=query.shape[1] != key.shape[1],
        **options,
    )
    if params.sinks is None:
        return output[0].transpose(0, 1)

    output, aux = output
    return drain(output[0].transpose(0, 1), aux.lse[0].transpose(0, 1), params.sinks)[0]


def block_mask(segments: Segments, reach: Reach) -> Any:
    """Return FlexAttention's mask of a row."""
    from torch.nn.attention.flex_attention import BlockMask

    own, prompts = pieces(segments.trees, reach)
    some, full = blocks([*own, *prompts], segments.tokens, BLOCK)
    return BlockMask.from_kv_blocks(
        *_ordered(some & ~full, segments.device),
        *_ordered(full, segments.device),
        BLOCK_SIZE=BLOCK,
        mask_mod=_visible(segments, reach),
        seq_lengths=(segments.tokens, segments.tokens),
    )


def blocks(row: list[Piece], tokens: int, size: int) -> tuple[Tensor, Tensor]:
    """Return which blocks of `size` queries and keys hold a pair that is seen, and only such pairs.

    Returns:
        [n, n] and [n, n] bool, query blocks first.

    Example:
        a prompt of 4 tokens with completions of 2 and 2, size 2 -> some, and those of them in full:

            x . . .         . . . .
            x x . .         x . . .
            x x x .         x x . .
            x x . x         x x . .
    """
    count = -(-tokens // size)
    earlier = torch.ones(count, count, dtype=torch.bool).tril(-1)
    some = torch.zeros(count, count, dtype=torch.bool)
    pairs = torch.zeros(count, count, dtype=torch.int64)

    for piece in row:
        queries = _overlap(piece.query, piece.num_queries, size, count)
        keys = _overlap(piece.key, piece.num_keys, size, count)
        met = queries[:, None] * keys
        some |= met > 0
        if piece.kind != "masked":
            pairs += met

    # Keys come before queries: of a later block nothing is seen, of an earlier one all that is met.
    return some & (earlier | torch.eye(count, dtype=torch.bool)), earlier & (pairs == size * size)


def _overlap(start: int, length: int, size: int, count: int) -> Tensor:
    """Return how many of the tokens from `start` on lie in each of `count` blocks.

    Example:
        start 1, length 4, size 2, count 4 -> [1, 2, 1, 0]
    """
    first = torch.arange(count) * size
    last = (first + size).clamp(max=start + length)
    return (last - first.clamp(min=start)).clamp(min=0)


def _ordered(chosen: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return how many blocks each query block meets, and all blocks with those first.

    Returns:
        [1, 1, n] and [1, 1, n, n] int32.
    """
    number = chosen.sum(-1, dtype=torch.int32)
    order = torch.sort(chosen.int(), dim=-1, descending=True, stable=True).indices.int()
    return number[None, None].to(device), order[None, None].to(device)


def _visible(segments: Segments, reach: Reach) -> MaskMod:
    """Return the function of places that says which key a query sees."""
    tree, branch, position = _numbers(segments)
    window, chunk = reach.window, reach.chunk

    def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        on_path = (branch[key] == 0) | (branch[key] == branch[query])
        seen = (tree[key] == tree[query]) & on_path & (key <= query)
        if window is not None:
            seen = seen & (position[key] > position[query] - window)
        if chunk is not None:
            seen = seen & (position[key] // chunk == position[query] // chunk)
        return seen

    return visible


def _numbers(segments: Segments) -> tuple[Tensor, Tensor, Tensor]:
    """Return the tree, the branch (0 in a prompt) and the position of each token, [L] each.

    Example:
        Tree(3, (2, 1)) -> [0, 0, 0, 0, 0, 0], [0, 0, 0, 1, 1, 2] and [0, 1, 2, 3, 4, 3]
    """
    trees, branches, positions = [], [], []
    for number, tree in enumerate(segments.trees):
        starts = [0, *(tree.prompt for _ in tree.completions)]
        for branch, length in enumerate((tree.prompt, *tree.completions)):
            trees.append(torch.full((length,), number))
            branches.append(torch.full((length,), branch))
            positions.append(torch.arange(starts[branch], starts[branch] + length))

    def on_device(parts: list[Tensor]) -> Tensor:
        return torch.cat(parts).to(segments.device)

    return on_device(trees), on_device(branches), on_device(positions)


@functools.cache
def _capped(cap: float) -> Callable[..., Tensor]:
    """Return the function that bounds scores: one object for each bound, which is compiled once."""

    def capped(score: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return torch.tanh(score / cap) * cap

    return capped


@functools.cache
def _kernel(device: str) -> Callable[..., Any]:
    """Return FlexAttention: compiled on CUDA, plain elsewhere, where it has no gradient."""
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=True) if device == "cuda" else flex_attention
