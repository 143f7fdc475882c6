"""Adapters: merged into whole weights out of place, or written as PEFT does."""

import copy
from typing import Any

from torch import Tensor, nn

from gmpo.rollout.weights.quantized import check_not_packed, dequantized, is_quantized
from gmpo.sharding import WRAPPERS, full_tensor

# PEFT's classes: gmpo runs without PEFT.
AdapterLayer = Any
PeftModel = Any


def trained_copy(wrapper: AdapterLayer) -> nn.Module:
    """Return the module that PEFT trains in place of one named in `modules_to_save`."""
    active = list(wrapper.active_adapters)
    if active and active[0] in wrapper.modules_to_save:
        return wrapper.modules_to_save[active[0]]
    return wrapper.original_module


def is_adapter_layer(module: nn.Module) -> bool:
    """Return whether `module` is PEFT's wrapper around a layer."""
    return all(hasattr(module, name) for name in ("base_layer", "merge", "active_adapters"))


def whole_weight(layer: nn.Module, name: str) -> Tensor:
    """Return a weight without sharding and quantisation.  Every rank must call."""
    if name == "weight" and is_quantized(layer):
        return dequantized(layer).detach()
    tensor = full_tensor(getattr(layer, name))
    check_not_packed(f"{type(layer).__name__}.{name}", tensor)
    return tensor


def merged_names(layer: AdapterLayer) -> tuple[str, ...]:
    """Return the names of the weights that the active adapters of a layer change."""
    biases: dict[str, bool] = getattr(layer, "lora_bias", {})
    if any(biases.get(name) for name in layer.active_adapters):
        return ("weight", "bias")
    return ("weight",)


def merged(layer: AdapterLayer, name: str) -> Tensor:
    """Return the "weight" or "bias" of a layer with its active adapters merged into it.

    The layer itself is not touched.

    Raises:
        ValueError: The layer is sharded, and its adapters are more than plain LoRA.
    """
    if is_plain_lora(layer):
        return plain_lora_weight(layer)

    sharded = any(hasattr(p, "ds_id") or hasattr(p, "full_tensor") for p in layer.parameters())
    if sharded:
        raise ValueError(
            f"{type(layer).__name__} with these adapter options can't be merged from shards. "
            "Use plain LoRA (no DoRA, no bias), or train without FSDP and ZeRO-3."
        )
    duplicate = copy.deepcopy(layer)
    duplicate.merge(safe_merge=False)
    return getattr(duplicate.base_layer, name).detach()


def is_plain_lora(layer: AdapterLayer) -> bool:
    """Return whether base + scaling * B A is all that the active adapters of a layer do."""
    if not hasattr(layer, "lora_A"):
        return False
    for name in layer.active_adapters:
        if layer.lora_variant.get(name) or layer.lora_bias.get(name):
            return False  # DoRA and its like
    is_convolution = getattr(layer.base_layer, "kernel_size", None) is not None
    return not layer.merged and not is_convolution


def plain_lora_weight(layer: AdapterLayer) -> Tensor:
    """Return base + scaling * B A over the active adapters, summed in float32."""
    base = whole_weight(layer.base_layer, "weight")
    total = base.float()
    for name in layer.active_adapters:
        delta = lora_product(layer, name)
        if delta is not None:
            total = total + layer.scaling[name] * delta
    return total.to(base.dtype)


def lora_product(layer: AdapterLayer, name: str) -> Tensor | None:
    """Return B A of one adapter, in the shape of the layer's weight, or None if it has none here.

    Example:
        A linear layer of 8 inputs and 6 outputs, rank 2: A is [2, 8], B is [6, 2], and the result
        [6, 8].  An embedding of 16 tokens and 8 dimensions: A is [2, 16], B is [8, 2], and the
        result is transposed to [16, 8].
    """
    if name in layer.lora_A:
        down = full_tensor(layer.lora_A[name].weight)
        up = full_tensor(layer.lora_B[name].weight)
        transposed = getattr(layer, "fan_in_fan_out", False)
    elif name in layer.lora_embedding_A:
        down = full_tensor(layer.lora_embedding_A[name])
        up = full_tensor(layer.lora_embedding_B[name])
        transposed = True
    else:
        return None

    delta = up.float() @ down.float()
    return delta.T if transposed else delta


def adapter_unsupported_reason(policy: PeftModel) -> str | None:
    """Return why an engine can't take the adapter of the policy as it is, or None if it can."""
    if not hasattr(policy, "get_base_model"):
        return "there is no adapter"

    active = list(policy.active_adapters)
    config = policy.peft_config[active[0]]
    if len(active) != 1 or type(config).__name__ != "LoraConfig":
        return "it is not one LoRA adapter"

    trains_tokens = getattr(config, "trainable_token_indices", None)
    if config.modules_to_save or config.bias != "none" or trains_tokens:
        return "more than LoRA matrices is trained"

    layers = [module for module in policy.modules() if is_adapter_layer(module)]
    if not all(is_plain_lora(layer) and active[0] in layer.lora_A for layer in layers):
        return "a layer has more than plain LoRA matrices"
    return None


def adapter_state(policy: PeftModel) -> dict[str, Tensor]:
    """Return the whole tensors of the active adapter by their names in `policy`.

    Every rank must call.
    """
    name = policy.active_adapters[0]
    return {
        key: full_tensor(tensor) for key, tensor in policy.named_parameters() if f".{name}." in key
    }


def write_adapter(policy: PeftModel, state: dict[str, Tensor], folder: str) -> None:
    """Save the active adapter as PEFT does.

    Args:
        policy: For the adapter's config.
        state: The result of `adapter_state`.
        folder: It exists.
    """
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    name = policy.active_adapters[0]
    plain = get_peft_model_state_dict(
        policy, state_dict=state, adapter_name=name, save_embedding_layers=False
    )

    # Whatever an init did to the base weights, the engine gets those as they are.
    config = copy.copy(policy.peft_config[name])
    config.init_lora_weights = True
    config.inference_mode = True
    config.save_pretrained(folder)
    tensors = {without_wrappers(key): tensor.cpu().contiguous() for key, tensor in plain.items()}
    save_file(tensors, f"{folder}/adapter_model.safetensors")


def without_wrappers(name: str) -> str:
    """Return a parameter's name without what torch wraps modules in.

    Example:
        "layers.0._checkpoint_wrapped_module.q_proj.weight" -> "layers.0.q_proj.weight"
    """
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)
