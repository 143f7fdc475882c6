"""The model inside of what wraps it: DDP, FSDP, DeepSpeed, torch.compile, adapters."""

from typing import Any

from torch import nn
from transformers import PreTrainedModel


def unwrap(model: nn.Module) -> nn.Module:
    """The causal language model inside of DDP, FSDP, DeepSpeed, torch.compile and adapters."""
    while not isinstance(model, PreTrainedModel):
        if hasattr(model, "get_base_model"):
            return model.get_base_model()  # pyright: ignore
        inner = getattr(model, "module", None) or getattr(model, "_orig_mod", None)
        if not isinstance(inner, nn.Module):
            break
        model = inner
    return model


def without_ddp(model: nn.Module) -> nn.Module:
    """`model` without DDP, whose forward pass may wait for that of other ranks."""
    return model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model


def uses_prompt_learning(model: Any) -> bool:
    """Whether an adapter puts virtual tokens in front of every prompt, which only PEFT's own `generate` does."""
    adapters = getattr(model, "peft_config", None) if hasattr(model, "get_base_model") else None
    return any(
        getattr(adapter, "is_prompt_learning", False) for adapter in (adapters or {}).values()
    )


def without_adapter(model: Any) -> Any:
    """The transformers model inside of a PEFT model, where its adapters act without the shell, or the model itself."""
    return (
        model.get_base_model()
        if hasattr(model, "get_base_model") and not uses_prompt_learning(model)
        else model
    )


def find_adapter(model: nn.Module) -> nn.Module:
    """The PeftModel inside of what wraps it."""
    for module in model.modules():
        if is_adapted(module):
            return module
    raise ValueError(f"{type(model).__name__} holds no adapter.")


def is_adapted(model: Any) -> bool:
    """Whether `model` is a PeftModel (without importing peft: a PeftModel can't exist before it is imported)."""
    return any(
        kind.__name__ == "PeftModel" and kind.__module__.startswith("peft")
        for kind in type(model).__mro__
    )
