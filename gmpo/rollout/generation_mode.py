"""The trainer's module, lent out for generation."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from transformers import GenerationConfig

from gmpo.sharding import full_model

Autocast = Callable[[], AbstractContextManager[Any]]


@contextmanager
def generating(
    model: Any, *, autocast: Autocast | None = None, gather: bool = True
) -> Iterator[None]:
    """Let the module generate in the block: no gradient, dropout or checkpointing; plain defaults.

    Args:
        model: With PEFT's shell, if there is one: it may be what FSDP2 calls the whole.
        autocast: Makes the context of mixed precision, if the trainer computes in it.
        gather: Make sharded parameters whole, so that no forward pass meets another rank; every
            rank must enter.
    """
    training = [module for module in model.modules() if module.training]
    owners = [model]
    if hasattr(model, "get_base_model"):  # PEFT keeps a second generation config
        owners.append(model.get_base_model())
    defaults = [owner.generation_config for owner in owners]
    with torch.no_grad(), full_model(model, inner=gather), (autocast or nullcontext)():
        try:
            model.eval()  # gradient checkpointing, too, acts in training mode only
            for owner in owners:
                owner.generation_config = GenerationConfig()
            yield
        finally:
            for owner, own in zip(owners, defaults, strict=True):
                owner.generation_config = own
            for module in training:
                module.training = True
