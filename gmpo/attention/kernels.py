"""Attention of queries to keys with the log-sum-exp of its scores, forward and backward.

Two kernels compute the same: torch's flash attention for CPUs where it can, and plain matrix
products, tile by tile, everywhere else.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

QUERIES = 512  # whose scores are held at a time, by the plain kernel
HIDDEN = -1e30  # score of a key that is not seen; finite, as is the weight of a part that is not


@dataclass(frozen=True, slots=True)
class AttentionParams:
    """A layer's rules for weighing what it sees."""

    scale: float
    softcap: float | None = None  # bound of the scores
    sinks: Tensor | None = None  # [Hq] score of a position without a value that every token sees


def bias_of(seen: Tensor, dtype: torch.dtype) -> Tensor:
    """Return 0 where seen, else a large negative number."""
    hidden = max(HIDDEN, torch.finfo(dtype).min / 2)
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, hidden)


def attend_to(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    params: AttentionParams,
    *,
    causal: bool = False,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return softmax attention and the log-sum-exp of its scores; no gradient, no sinks.

    Args:
        query: [n, Hq, q, D].
        key, value: [n, Hk, k, D]; Hk divides Hq.
        causal: A query sees the keys up to its own number; q = k.
        bias: [n or 1, 1, q, k] of the dtype of query, added to the scores; None for 0.

    Returns:
        [n, Hq, q, D], and [n, Hq, q] float32 or wider.
    """
    if _flash_serves(query, value, params):
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, 0.0, causal, attn_mask=bias, scale=params.scale
        )

    outputs, lses = [], []
    for rows, columns in _tiles(query.shape[2], key.shape[2], causal):
        scores = _scores(query, key, params, bias, rows, columns, causal)
        lse = scores.logsumexp(-1)
        weights = (scores - lse[..., None]).exp().to(value.dtype)
        outputs.append(_per_query_head(_times(weights, value[:, :, columns])))
        lses.append(lse.flatten(1, 2))
    return torch.cat(outputs, dim=2), torch.cat(lses, dim=2)


def attend_to_backward(
    gradient: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    lse: Tensor,
    params: AttentionParams,
    *,
    causal: bool = False,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of query, key and value.

    Args:
        gradient: Of `output`.
        output, lse: Of everything that the queries see: these keys, and others (`merge.py`).
    """
    if _flash_serves(query, value, params):
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            gradient,
            query,
            key,
            value,
            output,
            lse,
            0.0,
            causal,
            attn_mask=bias,
            scale=params.scale,
        )

    heads = key.shape[1]
    d_query = torch.empty_like(query)
    d_key, d_value = torch.zeros_like(key), torch.zeros_like(value)
    for rows, columns in _tiles(query.shape[2], key.shape[2], causal):
        scores = _scores(query, key, params, bias, rows, columns, causal)
        weights = (scores - _grouped(lse[:, :, rows, None], heads)).exp()

        # ds = p (g v - g o), times the slope of the soft cap.
        wide = _grouped(gradient[:, :, rows], heads).to(scores.dtype)
        through = (wide * _grouped(output[:, :, rows], heads)).sum(-1, keepdim=True)
        d_scores = weights * (_times(wide, value[:, :, columns].transpose(-1, -2)) - through)
        if params.softcap is not None:
            d_scores *= 1 - (scores.clamp_min(-params.softcap) / params.softcap).square()
        d_scores *= params.scale

        wide_query = _grouped(query[:, :, rows], heads).to(scores.dtype)
        d_query[:, :, rows] = _per_query_head(_times(d_scores, key[:, :, columns])).to(query.dtype)
        d_key[:, :, columns] += _over_queries(d_scores, wide_query).to(key.dtype)
        d_value[:, :, columns] += _over_queries(weights, wide).to(value.dtype)
    return d_query, d_key, d_value


def _flash_serves(query: Tensor, value: Tensor, params: AttentionParams) -> bool:
    """Return whether torch's flash attention for CPUs computes this."""
    return (
        query.device.type == "cpu" and params.softcap is None and query.shape[-1] == value.shape[-1]
    )


# -- the plain kernel: [n, Hk, r, q, k], where r query heads share a key head ----------------------


def _tiles(queries: int, keys: int, causal: bool) -> list[tuple[slice, slice]]:
    """Return spans of queries, and the keys that each can see.

    Example:
        5 queries, 5 keys, causal, QUERIES 3 -> (0..2, 0..2), (3..4, 0..4)
    """
    spans = [slice(start, min(start + QUERIES, queries)) for start in range(0, queries, QUERIES)]
    return [(span, slice(0, span.stop if causal else keys)) for span in spans]


def _scores(
    query: Tensor,
    key: Tensor,
    params: AttentionParams,
    bias: Tensor | None,
    rows: slice,
    columns: slice,
    causal: bool,
) -> Tensor:
    """Return scores, float32 or wider, with HIDDEN where nothing is seen."""
    query = _grouped(query[:, :, rows], key.shape[1])
    scores = _times(query, key[:, :, columns].transpose(-1, -2))
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32)) * params.scale
    if params.softcap is not None:
        scores = torch.tanh(scores / params.softcap) * params.softcap

    if bias is not None:
        scores = scores + bias[:, :, None, rows, columns]
    if causal:
        number = torch.arange(rows.start, rows.stop, device=query.device)
        later = torch.arange(columns.stop, device=query.device) > number[:, None]
        scores = scores.masked_fill_(later, HIDDEN)
    return scores


def _grouped(tensor: Tensor, heads: int) -> Tensor:
    """Return [n, Hq, ...] as [n, Hk, r, ...]."""
    return tensor.unflatten(1, (heads, -1))


def _per_query_head(tensor: Tensor) -> Tensor:
    """Return [n, Hk, r, ...] as [n, Hq, ...]."""
    return tensor.flatten(1, 2)


def _times(left: Tensor, right: Tensor) -> Tensor:
    """Return [n, Hk, r, a, b] @ [n, Hk, b, c], as one product per key head."""
    flat = left.flatten(2, 3) @ right.to(left.dtype)
    return flat.unflatten(2, left.shape[2:4])


def _over_queries(left: Tensor, right: Tensor) -> Tensor:
    """Return the sum over query heads and queries of [.., q, k]^T @ [.., q, D]: [n, Hk, k, D]."""
    return left.flatten(2, 3).transpose(-1, -2) @ right.flatten(2, 3)
