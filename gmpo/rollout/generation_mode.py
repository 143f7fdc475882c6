"""The trainer's module, lent out for generation."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from transformers import GenerationConfig

from gmpo.sharding import whole_model

Autocast = Callable[[], AbstractContextManager[Any]]


def prompt_learning(model: Any) -> bool:
    """Whether an adapter puts virtual tokens in front of every prompt, which only PEFT's own `generate` does."""
    adapters = getattr(model, "peft_config", None) if hasattr(model, "get_base_model") else None
    return any(
        getattr(adapter, "is_prompt_learning", False) for adapter in (adapters or {}).values()
    )


def without_adapter_shell(model: Any) -> Any:
    """The transformers model inside of a PEFT model, where its adapters act without the shell, or the model itself."""
    return (
        model.get_base_model()
        if hasattr(model, "get_base_model") and not prompt_learning(model)
        else model
    )


@contextmanager
def generating(
    model: Any, *, autocast: Autocast | None = None, gather: bool = True
) -> Iterator[None]:
    """Within the block the module generates: no gradient, dropout or checkpointing; plain defaults.

    Args:
        model: With PEFT's shell, if there is one: it may be what FSDP2 calls the whole.
        autocast: Makes the context of mixed precision, if the trainer computes in it.
        gather: Make sharded parameters whole, so that no forward pass meets another rank; every rank must enter.
    """
    training = [module for module in model.modules() if module.training]
    owners = {
        id(m): m
        for m in (model, model.get_base_model() if hasattr(model, "get_base_model") else model)
    }.values()
    defaults = [owner.generation_config for owner in owners]  # PEFT keeps a second one
    with torch.no_grad(), whole_model(model, inner=gather), (autocast or nullcontext)():
        try:
            model.eval()  # also switches gradient checkpointing off, which transformers does in training mode only
            for owner in owners:
                owner.generation_config = GenerationConfig()
            yield
        finally:
            for owner, own in zip(owners, defaults, strict=True):
                owner.generation_config = own
            for module in training:
                module.training = True
