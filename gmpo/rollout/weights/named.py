"""The policy's weights for an engine with a copy: whole tensors, one by one, by checkpoint name."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from gmpo.rollout.weights.adapters import (
    is_adapter_layer,
    merged,
    merged_names,
    trained_copy,
    whole_weight,
)
from gmpo.rollout.weights.quantized import check_not_packed, is_quantized
from gmpo.sharding import WRAPPERS
from gmpo.unwrap import uses_prompt_learning, without_adapter

NamedTensor = tuple[str, Tensor]
# A weight's name in the module tree, and a function that makes it whole.
NamedMaker = tuple[str, Callable[[], Tensor]]


def named_weights(
    policy: PreTrainedModel, *, merge: bool = True, dtype: torch.dtype | None = None
) -> Iterator[NamedTensor]:
    """Yield every weight of the policy, named as in a checkpoint of the bare model.

    Adapters are merged out of place, in float32, one layer at a time: the policy itself is never
    touched.  Tied weights come once.  Making a sharded weight whole is a collective: every rank
    must iterate, to the end.  Weights of bitsandbytes are dequantised.

    Args:
        policy: A transformers model, bare, sharded by FSDP2 or ZeRO-3, or a PEFT model of one; no
            DDP around it.
        merge: False gives the weights below the adapters.
        dtype: Cast floating-point weights to it; None leaves them as they are.

    Raises:
        ValueError: An adapter that can't be merged from shards, or that makes tied weights differ,
            or a quantised weight that can't be dequantised.
    """
    if uses_prompt_learning(policy):
        raise ValueError(
            "Prompt-learning adapters put tokens in front of prompts, which vLLM can't do. Use "
            "LoRA."
        )
    model = without_adapter(policy)
    rename = checkpoint_renaming(model)
    for name, make in weight_makers(model, merge=merge):
        with torch.no_grad():
            tensor = make()
            if dtype is not None and tensor.is_floating_point():
                tensor = tensor.to(dtype)
            renamed = rename(name, tensor)
        yield from renamed


def check_publishable(policy: PreTrainedModel) -> None:
    """Raise a ValueError if the policy has weights that an engine with a copy can't be given."""
    for name, module in walk(without_adapter(policy), ""):
        layer = wrapped_layer(module)
        for weight_name, tensor in own_weights(module):
            if not is_quantized(layer):
                check_not_packed(f"{name}.{weight_name}", tensor)


def description(policy: PreTrainedModel) -> dict[str, Any]:
    """Return what a copy of the policy must agree in, to be a copy at all."""
    config = without_adapter(policy).config.get_text_config()
    names = ("model_type", "vocab_size", "hidden_size", "num_hidden_layers", "tie_word_embeddings")
    return {name: getattr(config, name) for name in names if hasattr(config, name)}


def checkpoint_renaming(
    model: PreTrainedModel,
) -> Callable[[str, Tensor], Iterator[NamedTensor]]:
    """Return a function from a weight of the module tree to those of a checkpoint.

    transformers fuses and renames some weights when it loads a checkpoint.

    Raises:
        ValueError: It splits one, so that a weight of the checkpoint needs several of ours.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, revert_weight_conversion

    conversions = getattr(model, "_weight_conversions", None)
    if not conversions:
        conversions = get_model_conversion_mapping(model, add_legacy=False)

    for conversion in conversions:
        if isinstance(conversion, WeightConverter) and len(conversion.target_patterns) > 1:
            raise ValueError(
                f"{type(model).__name__} splits {conversion.source_patterns} of its checkpoint "
                "into several weights, which can't be put together again one at a time. Generate "
                "without vLLM."
            )

    def unchanged(name: str, tensor: Tensor) -> Iterator[NamedTensor]:
        return iter([(name, tensor)])

    def reverted(name: str, tensor: Tensor) -> Iterator[NamedTensor]:
        return iter(revert_weight_conversion(model, {name: tensor}).items())

    return reverted if conversions else unchanged


# -- the module tree, with adapters where they are -------------------------------------------------


def weight_makers(model: nn.Module, *, merge: bool) -> Iterator[NamedMaker]:
    """Yield the weights of a model in the order of its modules, each once.

    Example:
        A model whose head is tied to its embedding yields "embed_tokens.weight" and no
        "lm_head.weight".  A layer q_proj under an adapter yields "q_proj.weight" (merged) instead
        of "q_proj.base_layer.weight" and the adapter's own matrices.
    """
    owners: dict[int, str] = {}  # id of a weight -> the first module that holds it
    adapted: set[int] = set()  # ids of the weights that an adapter changes
    for name, module in walk(model, ""):
        changed_names = merged_names(module) if merge and is_adapter_layer(module) else ()
        for weight_name, tensor in own_weights(module):
            owner = owners.setdefault(id(tensor), name)
            changed = weight_name in changed_names
            if owner != name and (changed or id(tensor) in adapted):
                raise ValueError(
                    f"An adapter changes {name!r}, which shares its weight with {owner!r}: no "
                    "engine can hold both. Leave tied embeddings and heads out of target_modules, "
                    "or untie them in the base model."
                )
            if owner != name:
                continue

            if changed:
                adapted.add(id(tensor))
                make = partial(merged, module, weight_name)
            else:
                make = partial(whole_weight, wrapped_layer(module), weight_name)
            yield (f"{name}.{weight_name}" if name else weight_name), make


def walk(module: nn.Module, name: str) -> Iterator[tuple[str, nn.Module]]:
    """Yield modules by name, an adapter's wrapper standing for the layer that it wraps."""
    if hasattr(module, "modules_to_save") and hasattr(module, "original_module"):
        module = trained_copy(module)
    yield name, module
    if is_adapter_layer(module):
        return

    for child_name, child in module.named_children():
        parts = [part for part in (name, child_name) if part and part not in WRAPPERS]
        yield from walk(child, ".".join(parts))


def wrapped_layer(module: nn.Module) -> nn.Module:
    """Return the layer that an adapter's wrapper wraps, or the module itself."""
    layer: Any = module
    return layer.base_layer if is_adapter_layer(module) else module


def own_weights(module: nn.Module) -> Iterator[NamedTensor]:
    """Yield the parameters and persistent buffers of a module itself, or of the layer it wraps."""
    layer = wrapped_layer(module)
    yield from layer.named_parameters(recurse=False)
    for name, buffer in layer.named_buffers(recurse=False):
        if name not in layer._non_persistent_buffers_set:
            yield name, buffer
