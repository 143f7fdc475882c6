"""Attention by segments inside of a model: one row of tokens, no mask.

A model is switched to our attention function for its forward pass, which finds the segments in a
context variable.  Layers that are computed again in the backward pass, when the block is over, come
to it in two ways: transformers' gradient checkpointing enters the block again, and under other
wrappers (FSDP's) the layers switch themselves, by a keyword that travels through the model.
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from gmpo.attention.attend import attend
from gmpo.attention.door import reach_of, switched
from gmpo.attention.kernels import AttentionParams
from gmpo.attention.segments import Segments

NAME = "gmpo_segments"  # of our attention function, and of the keyword

# Where attention layers keep the rate at which they drop weights.
DROPOUT_NAMES = (
    "attention_dropout",
    "attn_dropout",
    "attn_drop",
    "dropout",
    "dropout_p",
    "dropout_prob",
)


@dataclass(frozen=True, slots=True)
class SegmentInputs:
    """The facts of a forward pass that our attention function needs."""

    segments: Segments
    softcaps: bool  # the model's own attention function bounds its scores


_active: ContextVar[SegmentInputs | None] = ContextVar("active", default=None)


@contextmanager
def attention_by_segments(model: nn.Module, segments: Segments) -> Iterator[dict[str, Any]]:
    """Let `model` attend by `segments` in a call with the keywords that are yielded."""
    _prepare_layers(model)
    with switched(model, NAME) as names:
        # transformers' sdpa leaves soft caps out, and so do we, to compute what the model computes.
        inputs = SegmentInputs(segments, softcaps="sdpa" not in names)
        with _activated(inputs), _checkpointing_within(model, inputs):
            yield {NAME: inputs}


@contextmanager
def _activated(inputs: SegmentInputs) -> Iterator[None]:
    token = _active.set(inputs)
    try:
        yield
    finally:
        _active.reset(token)


def attention_dropout(model: nn.Module) -> float:
    """Return the largest rate at which an attention layer drops weights; 0 in most models."""
    rates = [0.0]
    for module in attention_layers(model):
        for name in DROPOUT_NAMES:
            rate = getattr(module, name, 0.0)
            rate = getattr(rate, "p", rate)  # nn.Dropout
            if isinstance(rate, int | float):
                rates.append(float(rate))
    return max(rates)


def attention_layers(model: nn.Module) -> list[nn.Module]:
    """Return the modules with a layer number and a config, as attention layers have them."""
    return [
        module
        for module in model.modules()
        if hasattr(module, "layer_idx")
        and hasattr(getattr(module, "config", None), "_attn_implementation_internal")
    ]


@contextmanager
def differently_rounded_attention(model: nn.Module) -> Iterator[None]:
    """Let the outputs of attention layers differ by a rounding, as another kernel's would."""
    handles = [layer.register_forward_hook(_round) for layer in attention_layers(model)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _round(
    layer: nn.Module, args: tuple[Any, ...], output: Tensor | tuple[Any, ...]
) -> Tensor | tuple[Any, ...]:
    """Return a layer's output with an error of less than the precision of its dtype."""
    values = output[0] if isinstance(output, tuple) else output
    generator = torch.Generator(values.device).manual_seed(0)
    shift = torch.rand(values.shape, generator=generator, device=values.device) * 2 - 1
    moved = values * (1 + shift.to(values.dtype) * torch.finfo(values.dtype).eps)
    return (moved, *output[1:]) if isinstance(output, tuple) else moved


@torch.compiler.disable  # a compiled model goes on after it; it would be compiled for each row
def segment_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **keywords: Any,
) -> tuple[Tensor, None]:
    """Return attention by the segments among the keywords; transformers calls it.

    Args:
        query: [1, Hq, L, D].
        key, value: [1, Hk, L, D].

    Returns:
        [1, L, Hq, D], and None for the weights.
    """
    inputs: SegmentInputs | None = keywords.get(NAME) or _active.get()
    if inputs is None:
        raise ValueError(
            "a layer that is computed again did not get its segments: the model does not hand "
            "keywords on. Use transformers' gradient checkpointing, or batch_layout='padded'."
        )
    if dropout:
        raise ValueError(
            f"attention drops weights at the rate {dropout:g}, which only batch_layout='padded' "
            "can. Set disable_dropout=True."
        )

    params = AttentionParams(
        scale=query.shape[-1] ** -0.5 if scaling is None else scaling,
        softcap=keywords.get("softcap") if inputs.softcaps else None,
        sinks=keywords.get("s_aux"),
    )
    # Rotary embeddings are wider under autocast.
    query, key = query.to(value.dtype), key.to(value.dtype)
    output = attend(
        query.squeeze(0).transpose(0, 1),
        key.squeeze(0).transpose(0, 1),
        value.squeeze(0).transpose(0, 1),
        inputs.segments,
        reach_of(module, keywords),
        params,
    )
    return output[None], None


ALL_ATTENTION_FUNCTIONS.register(NAME, segment_attention)


# -- layers that are computed again --------------------------------------------------------------


@contextmanager
def _checkpointing_within(model: nn.Module, inputs: SegmentInputs) -> Iterator[None]:
    """Let transformers' gradient checkpointing, within the block, compute layers again as in it."""
    before: dict[Any, Callable[..., Any]] = {
        module: vars(module)["_gradient_checkpointing_func"]
        for module in model.modules()
        if "_gradient_checkpointing_func" in vars(module)
    }

    def checkpoint(original: Callable[..., Any], layer: Callable[..., Any], *args: Any) -> Any:
        return original(functools.partial(_run_again, model, inputs, layer), *args)

    try:
        for module, original in before.items():
            module._gradient_checkpointing_func = functools.partial(checkpoint, original)
        yield
    finally:
        for module, original in before.items():
            module._gradient_checkpointing_func = original


def _run_again(
    model: nn.Module, inputs: SegmentInputs, layer: Callable[..., Any], *args: Any
) -> Any:
    """Call a layer, the first time or again."""
    if _active.get() is inputs:
        return layer(*args)
    with switched(model, NAME), _activated(inputs):
        return layer(*args)


_prepared: WeakSet[nn.Module] = WeakSet()


def _prepare_layers(model: nn.Module) -> None:
    """Hook into the attention layers of `model`, once."""
    if model in _prepared:
        return
    for layer in attention_layers(model):
        switch = _LayerSwitch()
        layer.register_forward_pre_hook(switch.enter, with_kwargs=True)
        layer.register_forward_hook(switch.leave, always_call=True)
    _prepared.add(model)


class _LayerSwitch:
    """The switch of one layer, which acts where the model itself is not switched any more."""

    def __init__(self) -> None:
        self.before: str | None = None

    def enter(self, layer: Any, args: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        """Use our attention function if the layer is called with segments."""
        if NAME in keywords and layer.config._attn_implementation_internal != NAME:
            self.before = layer.config._attn_implementation_internal
            layer.config._attn_implementation_internal = NAME

    def leave(self, layer: Any, args: tuple[Any, ...], output: object) -> None:
        """Use the layer's own attention function again."""
        if self.before is not None:
            layer.config._attn_implementation_internal = self.before
            self.before = None
