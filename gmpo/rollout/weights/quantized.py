"""Quantised base weights (QLoRA): dequantised, or refused, but never published as packed bytes."""

from typing import Any

import torch
from torch import Tensor, nn

PACKED = ("Params4bit", "Int8Params")  # bitsandbytes' classes of weights


def is_quantized(layer: nn.Module) -> bool:
    """Return whether bitsandbytes holds the weight of `layer` in 4 or 8 bits."""
    return type(getattr(layer, "weight", None)).__name__ in PACKED


def dequantized(layer: nn.Module) -> Tensor:
    """Return the weight of a quantised layer in floating point.

    Example:
        A linear layer of 64 inputs and 32 outputs in 4 bits holds [1024, 1] uint8; the result is
        [32, 64], in the precision that it had before.
    """
    import bitsandbytes

    weight: Any = layer.weight
    if type(weight).__name__ == "Params4bit":
        return bitsandbytes.functional.dequantize_4bit(weight.data, weight.quant_state)

    # The first forward pass moves the scale of each row from the weight to the layer.
    state: Any = layer.state
    scale = weight.SCB if weight.SCB is not None else state.SCB
    return bitsandbytes.functional.int8_vectorwise_dequant(weight.data, scale)


def check_not_packed(name: str, tensor: Tensor) -> None:
    """Raise a ValueError for a matrix of 8-bit numbers: without its scales it is not a weight."""
    if tensor.ndim >= 2 and tensor.element_size() == 1 and tensor.dtype != torch.bool:
        raise ValueError(
            f"{name!r} is stored as {tensor.dtype}, quantised in a way that gmpo can't undo (only "
            "bitsandbytes' 4 and 8 bits, and not from shards of FSDP or ZeRO-3). Generate without "
            "vLLM, or load the model without quantisation."
        )
