"""The door through which the attention layers of transformers' models come here, for a while.

transformers looks up the attention function of a layer by a name in the model's config.  Who has
registered its own function under a name switches a model to it within a block.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from gmpo.attention.segments import Reach


@contextmanager
def switched(model: nn.Module, name: str) -> Iterator[set[str]]:
    """Use the attention function `name` within the block; yield the names that the model had.

    The model then makes no masks: transformers makes them only for functions that it knows.
    """
    configs: dict[int, Any] = {}
    for module in model.modules():
        config = getattr(module, "config", None)
        if hasattr(config, "_attn_implementation_internal"):
            configs[id(config)] = config
    before = {number: config._attn_implementation_internal for number, config in configs.items()}

    try:
        for config in configs.values():
            config._attn_implementation_internal = name
        yield {each for each in before.values() if each is not None}
    finally:
        for number, config in configs.items():
            config._attn_implementation_internal = before[number]


def reach_of(module: Any, keywords: dict[str, Any]) -> Reach:
    """Return how far back a layer sees.

    Args:
        module: The attention layer.
        keywords: Of its call of an attention function.
    """
    window = keywords.get("sliding_window")
    if "sliding_window" not in keywords:
        window = configured_window(module)
    chunk = None
    if layer_kind(module) == "chunked_attention":
        chunk = module.config.attention_chunk_size
    return Reach(window, chunk)


def configured_window(module: Any) -> int | None:
    """Return the window of a layer that tells it only to its mask, as Qwen2-MoE's do."""
    if not hasattr(sys.modules[type(module).__module__], "create_sliding_window_causal_mask"):
        return None  # the config may have a window all the same, which the model leaves alone
    kind = layer_kind(module)
    slides = kind is None or kind == "sliding_attention"
    return getattr(module.config, "sliding_window", None) if slides else None


def layer_kind(module: Any) -> str | None:
    """Return the name that transformers gives to a layer's kind; None if the model has one kind."""
    kinds = getattr(module.config, "layer_types", None)
    return None if kinds is None else kinds[module.layer_idx]
