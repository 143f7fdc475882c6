"""Adapters: merged into whole weights out of place, or written as PEFT does."""

import copy
from typing import Any

from torch import Tensor, nn

from gmpo.sharding import full_tensor


def trained_copy(wrapper: Any) -> nn.Module:
    """What PEFT trains in place of a module that an adapter config names in `modules_to_save`."""
    active = list(wrapper.active_adapters)
    return (
        wrapper.modules_to_save[active[0]]
        if active and active[0] in wrapper.modules_to_save
        else wrapper.original_module
    )


def is_adapter_layer(module: nn.Module) -> bool:
    return (
        hasattr(module, "base_layer")
        and hasattr(module, "merge")
        and hasattr(module, "active_adapters")
    )


def merged_names(layer: Any) -> tuple[str, ...]:
    """What its active adapters change of an adapted layer."""
    biases: dict[str, bool] = getattr(layer, "lora_bias", {})
    return (
        ("weight", "bias")
        if any(biases.get(name) for name in layer.active_adapters)
        else ("weight",)
    )


def merged(layer: Any, name: str) -> Tensor:
    """The "weight" or "bias" of an adapted layer with its active adapters in it, from untouched base weights."""
    if is_plain_lora(layer):
        return plain_lora_weight(layer)
    sharded = any(hasattr(p, "ds_id") or hasattr(p, "full_tensor") for p in layer.parameters())
    if sharded:
        raise ValueError(
            f"{type(layer).__name__} with these adapter options can't be merged from shards. "
            "Use plain LoRA (no DoRA, no bias), or train without FSDP and ZeRO-3."
        )
    alone = copy.deepcopy(layer)
    alone.merge(safe_merge=False)
    return getattr(alone.base_layer, name).detach()


def is_plain_lora(layer: Any) -> bool:
    """Whether base + scaling * B A is all that this layer's active adapters do."""
    if not hasattr(layer, "lora_A") or hasattr(layer.base_layer.weight, "quant_state"):
        return False
    if any(
        layer.lora_variant.get(name) or layer.lora_bias.get(name) for name in layer.active_adapters
    ):
        return False  # DoRA and its like
    return not layer.merged and getattr(layer.base_layer, "kernel_size", None) is None


def plain_lora_weight(layer: Any) -> Tensor:
    base = full_tensor(layer.base_layer.weight)
    total = base.float()
    for name in layer.active_adapters:
        if name in layer.lora_A:
            down, up = (
                full_tensor(layer.lora_A[name].weight),
                full_tensor(layer.lora_B[name].weight),
            )
            delta = up.float() @ down.float()  # [out, in]
            delta = delta.T if getattr(layer, "fan_in_fan_out", False) else delta
        elif name in layer.lora_embedding_A:
            down, up = (
                full_tensor(layer.lora_embedding_A[name]),
                full_tensor(layer.lora_embedding_B[name]),
            )
            delta = (up.float() @ down.float()).T  # [vocabulary, hidden]
        else:
            continue
        total = total + layer.scaling[name] * delta
    return total.to(base.dtype)


def adapter_unsupported_reason(policy: Any) -> str | None:
    """Why an engine can't take the adapter of the policy as it is; None: it can."""
    if not hasattr(policy, "get_base_model"):
        return "there is no adapter"
    active = list(policy.active_adapters)
    config = policy.peft_config[active[0]]
    if len(active) != 1 or type(config).__name__ != "LoraConfig":
        return "it is not one LoRA adapter"
    if (
        config.modules_to_save
        or config.bias != "none"
        or getattr(config, "trainable_token_indices", None)
    ):
        return "more than LoRA matrices is trained"
    layers = [module for module in policy.modules() if is_adapter_layer(module)]
    if not all(is_plain_lora(layer) and active[0] in layer.lora_A for layer in layers):
        return "a layer has more than plain LoRA matrices"
    return None


def write_adapter(policy: Any, folder: str | None) -> None:
    """Save the active adapter as PEFT does.  Every rank must call; those with a `folder` of None only help.

    Args:
        folder: Exists.
    """
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    name = policy.active_adapters[0]
    state = {
        key: full_tensor(tensor) for key, tensor in policy.named_parameters() if f".{name}." in key
    }
    if folder is None:
        return
    plain = get_peft_model_state_dict(
        policy, state_dict=state, adapter_name=name, save_embedding_layers=False
    )
    config = copy.copy(policy.peft_config[name])
    config.init_lora_weights = (
        True  # whatever an init did to the base weights, the engine gets those as they are
    )
    config.inference_mode = True
    config.save_pretrained(folder)
    save_file(
        {key: tensor.cpu().contiguous() for key, tensor in plain.items()},
        f"{folder}/adapter_model.safetensors",
    )
