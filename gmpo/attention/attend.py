"""Attention of a row of segments as one differentiable function."""

from typing import Any

import torch
from torch import Tensor

from gmpo.attention import flex, varlen
from gmpo.attention.kernels import AttentionParams, attend_to, attend_to_backward, bias_of
from gmpo.attention.merge import drain, merge, sink_gradient
from gmpo.attention.segments import Call, Reach, Segments


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segments: Segments,
    reach: Reach,
    params: AttentionParams,
) -> Tensor:
    """Return the attention of each token to what it sees in its tree.

    Args:
        query: [L, Hq, D].
        key, value: [L, Hk, D]; Hk divides Hq.

    Returns:
        [L, Hq, D].
    """
    with torch.autocast(query.device.type, enabled=False):
        if varlen.serves(query, value, reach, params):
            return varlen.varlen_attention(query, key, value, segments, reach, params)
        if flex.serves(query, value):
            return flex.flex_attention_of(query, key, value, segments, reach, params)
        return _Attention.apply(query, key, value, params.sinks, segments.calls(reach), params)


class _Attention(torch.autograd.Function):
    """Every call of a kernel, merged; backward, the kernels get what was merged."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        sinks: Tensor | None,
        calls: list[Call],
        params: AttentionParams,
    ) -> Tensor:
        output = value.new_empty(query.shape[0], query.shape[1], value.shape[2])
        wide = torch.promote_types(query.dtype, torch.float32)
        lse = query.new_empty(query.shape[:2], dtype=wide)

        for call in calls:
            part, part_lse = attend_to(
                call.queries.take(query),
                call.keys.take(key),
                call.keys.take(value),
                params,
                causal=call.causal,
                bias=_bias(call, query.dtype),
            )
            if call.onto_prompt:
                own, own_lse = call.queries.take(output), call.queries.take(lse)
                part, part_lse = merge(own, own_lse, part, part_lse)
            call.queries.put(output, part)
            call.queries.put(lse, part_lse)

        if sinks is not None:
            output, lse = drain(output, lse, sinks)
        ctx.save_for_backward(query, key, value, sinks, output, lse)
        ctx.calls, ctx.params = calls, params
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        query, key, value, sinks, output, lse = ctx.saved_tensors
        gradient = gradients[0].contiguous()
        d_query = torch.empty_like(query)
        d_key, d_value = torch.zeros_like(key), torch.zeros_like(value)

        for call in ctx.calls:
            of_query, of_key, of_value = attend_to_backward(
                call.queries.take(gradient),
                call.queries.take(query),
                call.keys.take(key),
                call.keys.take(value),
                call.queries.take(output),
                call.queries.take(lse),
                ctx.params,
                causal=call.causal,
                bias=_bias(call, query.dtype),
            )
            # Calls over their own runs come first, and hold every token once.
            write = call.queries.add if call.onto_prompt else call.queries.put
            write(d_query, of_query)
            call.keys.add(d_key, of_key)
            call.keys.add(d_value, of_value)

        d_sinks = None if sinks is None else sink_gradient(gradient, output, lse, sinks)
        return d_query, d_key, d_value, d_sinks, None, None


def _bias(call: Call, dtype: torch.dtype) -> Tensor | None:
    return None if call.seen is None else bias_of(call.seen, dtype)[None, None]
