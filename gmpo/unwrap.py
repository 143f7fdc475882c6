"""The model inside its wrappers: DDP, FSDP, DeepSpeed, torch.compile, adapters."""

from typing import TYPE_CHECKING, TypeGuard, cast

from torch import nn
from transformers import PreTrainedModel

if TYPE_CHECKING:
    from peft import PeftModel


def unwrap(model: nn.Module) -> PreTrainedModel:
    """Return the causal language model inside DDP, FSDP, DeepSpeed, torch.compile and adapters."""
    while not isinstance(model, PreTrainedModel):
        if is_adapted(model):
            return cast(PreTrainedModel, model.get_base_model())
        inner = getattr(model, "module", None) or getattr(model, "_orig_mod", None)
        if not isinstance(inner, nn.Module):
            break
        model = inner
    return cast(PreTrainedModel, model)


def without_ddp(model: nn.Module) -> nn.Module:
    """Return `model` without DDP, whose forward pass may wait for other ranks."""
    return model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model


def uses_prompt_learning(model: nn.Module) -> bool:
    """Return whether an adapter puts virtual tokens in front of every prompt.

    Only PEFT's own `generate` does that.
    """
    if not is_adapted(model):
        return False
    return any(
        getattr(adapter, "is_prompt_learning", False) for adapter in model.peft_config.values()
    )


def without_adapter(model: nn.Module) -> PreTrainedModel:
    """Return the transformers model inside a PEFT model, or the model itself.

    A PEFT model whose adapter acts only in PEFT's own forward pass (prompt learning) stays as it
    is; it passes attributes and calls on to the model inside.
    """
    if is_adapted(model) and not uses_prompt_learning(model):
        return cast(PreTrainedModel, model.get_base_model())
    return cast(PreTrainedModel, model)


def find_adapter(model: nn.Module) -> "PeftModel":
    """Return the PeftModel inside the wrappers of `model`."""
    for module in model.modules():
        if is_adapted(module):
            return module
    raise ValueError(f"{type(model).__name__} holds no adapter.")


def is_adapted(model: object) -> "TypeGuard[PeftModel]":
    """Return whether `model` is a PeftModel.

    peft is not imported for it: a PeftModel can't exist before peft was imported.
    """
    return any(
        kind.__name__ == "PeftModel" and kind.__module__.startswith("peft")
        for kind in type(model).__mro__
    )
