"""The load-balancing loss of mixture-of-experts models, over the tokens of a layout."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from gmpo.unwrap import unwrap


def is_mixture(model: nn.Module) -> bool:
    """Whether `model` has experts whose load can be balanced."""
    config = unwrap(model).config.get_text_config()  # pyright: ignore
    return hasattr(config, "output_router_logits")


@contextmanager
def recorded_routers(model: nn.Module) -> Iterator[list[Tensor]]:
    """Within the block, the router logits [tokens, experts] of each layer that `model` runs, in a list.

    They are not asked for with `output_router_logits`: the model would make its own loss of them, with a mask that
    holds rows and columns only.
    """
    recorders = (
        getattr(module, "_can_record_outputs", None) or {} for module in unwrap(model).modules()
    )
    recorder: Any = next(
        (dict(found)["router_logits"] for found in recorders if "router_logits" in found), None
    )  # pyright: ignore
    if recorder is None:
        raise ValueError(
            f"{type(unwrap(model)).__name__} does not say where its router logits come from, which "
            "router_aux_loss_coef needs. Set router_aux_loss_coef=0."
        )
    kind, index = getattr(recorder, "target_class", recorder), getattr(recorder, "index", 0)
    logits: list[Tensor] = []

    def record(module: nn.Module, inputs: tuple, output: Tensor | tuple) -> None:
        logits.append(output[index] if isinstance(output, tuple) else output)

    handles = [
        m.register_forward_hook(record) for m in unwrap(model).modules() if isinstance(m, kind)
    ]
    try:
        yield logits
    finally:
        for handle in handles:
            handle.remove()


def load_balancing_loss(logits: list[Tensor], weight: Tensor, chosen: int) -> Tensor:
    """experts * sum over experts of (share of the tokens that chose it) * (its mean probability).

    Args:
        logits: [tokens, experts] of each layer.
        weight: [tokens] how often a token counts; 0 on padding.
        chosen: Experts per token.

    Returns:
        A scalar, `chosen` when the load is even.

    Source: arXiv:2101.03961, equations 4 to 6, over all layers together, as transformers computes it.
    """
    experts = logits[0].shape[-1]
    probabilities = (
        torch.stack([layer.view(-1, experts) for layer in logits]).float().softmax(-1)
    )  # [layers, tokens, experts]
    picks = torch.zeros_like(probabilities).scatter_(
        -1, probabilities.topk(chosen, dim=-1).indices, 1.0
    )
    count = weight.sum().clamp_min(1) * len(logits)
    share = (picks * weight[:, None]).sum((0, 1)) / count
    mean = (probabilities * weight[:, None]).sum((0, 1)) / count
    return experts * (share * mean).sum()
