"""The policy's weights as an engine with a copy gets them: whole tensors, one at a time, under checkpoint names."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from gmpo.rollout.weights.adapters import is_adapter_layer, merged, merged_names, trained_copy
from gmpo.sharding import WRAPPERS, full_tensor
from gmpo.unwrap import uses_prompt_learning, without_adapter

Piece = tuple[
    str, Callable[[], Tensor]
]  # a weight's name in the module tree, and what makes it whole


def named_weights(
    policy: Any, *, merge: bool = True, dtype: torch.dtype | None = None
) -> Iterator[tuple[str, Tensor]]:
    """Every weight of the policy, as a checkpoint of the bare model names it.

    Adapters are merged out of place, in float32, one layer at a time: the policy itself is never touched.  Tied weights
    come once.  Making a sharded weight whole is a collective: every rank must iterate, to the end.

    Args:
        policy: A transformers model, bare, sharded by FSDP2 or ZeRO-3, or a PEFT model of one; no DDP around it.
        merge: False gives the weights below the adapters.
        dtype: Of what floating-point weights are cast to; None: as they are.

    Raises:
        ValueError: An adapter that can't be merged from shards, or that makes tied weights differ.
    """
    if uses_prompt_learning(policy):
        raise ValueError(
            "Prompt-learning adapters put tokens in front of prompts, which vLLM can't do. Use LoRA."
        )
    model = without_adapter(policy)
    rename = checkpoint_renaming(model)
    for name, make in pieces(model, merge=merge):
        with torch.no_grad():
            tensor = make()
            tensor = (
                tensor.to(dtype) if dtype is not None and tensor.is_floating_point() else tensor
            )
            renamed = rename(name, tensor)
        yield from renamed


def description(policy: Any) -> dict[str, Any]:
    """What a copy of the policy must agree in, to be a copy at all."""
    config = without_adapter(policy).config.get_text_config()
    names = ("model_type", "vocab_size", "hidden_size", "num_hidden_layers", "tie_word_embeddings")
    return {name: getattr(config, name) for name in names if hasattr(config, name)}


def checkpoint_renaming(model: Any) -> Callable[[str, Tensor], Iterator[tuple[str, Tensor]]]:
    """What turns a weight of the module tree into those of a checkpoint: transformers fuses and renames some."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, revert_weight_conversion

    conversions = getattr(model, "_weight_conversions", None) or get_model_conversion_mapping(
        model, add_legacy=False
    )
    split = [
        c for c in conversions if isinstance(c, WeightConverter) and len(c.target_patterns) > 1
    ]
    if split:
        raise ValueError(
            f"{type(model).__name__} splits {split[0].source_patterns} of its checkpoint into several weights, which "
            "can't be put together again one at a time. Generate without vLLM."
        )
    if not conversions:
        return lambda name, tensor: iter([(name, tensor)])
    return lambda name, tensor: iter(revert_weight_conversion(model, {name: tensor}).items())


# -- the module tree, with adapters where they are ---------------------------------------------------------------------


def pieces(model: nn.Module, *, merge: bool) -> Iterator[Piece]:
    """The weights of a model in the order of its modules, each once."""
    owners: dict[int, str] = {}  # of shared weights
    adapted: set[int] = set()
    for name, module in walk(model, ""):
        has_adapter = is_adapter_layer(module)
        for weight_name, tensor in own_weights(module.base_layer if has_adapter else module):  # pyright: ignore
            first = owners.setdefault(id(tensor), name)
            changed = has_adapter and merge and weight_name in merged_names(module)
            if first != name and (changed or id(tensor) in adapted):
                raise ValueError(
                    f"An adapter changes {name!r}, which shares its weight with {first!r}: no engine can hold both. "
                    "Leave tied embeddings and heads out of target_modules, or untie them in the base model."
                )
            if changed:
                adapted.add(id(tensor))
            if first == name:
                full = f"{name}.{weight_name}" if name else weight_name
                make = (
                    (lambda m=module, n=weight_name: merged(m, n))
                    if changed
                    else (lambda t=tensor: full_tensor(t))
                )
                yield full, make


def walk(module: nn.Module, name: str) -> Iterator[tuple[str, nn.Module]]:
    """Modules by name, an adapter's wrapper standing for the layer that it wraps."""
    if hasattr(module, "modules_to_save") and hasattr(module, "original_module"):
        module = trained_copy(module)
    yield name, module
    if is_adapter_layer(module):
        return
    for child_name, child in module.named_children():
        parts = [part for part in (name, child_name) if part and part not in WRAPPERS]
        yield from walk(child, ".".join(parts))


def own_weights(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and persistent buffers of a module itself."""
    yield from module.named_parameters(recurse=False)
    for name, buffer in module.named_buffers(recurse=False):
        if name not in module._non_persistent_buffers_set:
            yield name, buffer


# -- adapters --------------------------------------------------------------------------------------------------------
