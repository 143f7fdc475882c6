"""The load-balancing loss of mixture-of-experts models, over the tokens of a layout."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from gmpo.unwrap import unwrap


def is_mixture(model: nn.Module) -> bool:
    """Return whether `model` has experts whose load can be balanced."""
    config: Any = unwrap(model).config
    return hasattr(config.get_text_config(), "output_router_logits")


@contextmanager
def recorded_routers(model: nn.Module) -> Iterator[list[Tensor]]:
    """Give a list that `model` fills with the router logits [tokens, experts] of its layers.

    They are not asked for with `output_router_logits`: the model would make its own loss of them,
    with a mask that holds rows and columns only.
    """
    causal = unwrap(model)
    kind, index = _router_output(causal)
    logits: list[Tensor] = []

    def record(module: nn.Module, inputs: object, output: Any) -> None:
        logits.append(output[index] if isinstance(output, tuple) else output)

    routers = [module for module in causal.modules() if isinstance(module, kind)]
    handles = [module.register_forward_hook(record) for module in routers]
    try:
        yield logits
    finally:
        for handle in handles:
            handle.remove()


def _router_output(causal: nn.Module) -> tuple[type[nn.Module], int]:
    """Return the class of the routers, and which of their outputs the logits are.

    transformers keeps both for `output_router_logits`.
    """
    for module in causal.modules():
        recorders = dict(getattr(module, "_can_record_outputs", None) or {})
        if "router_logits" in recorders:
            recorder: Any = recorders["router_logits"]
            return getattr(recorder, "target_class", recorder), getattr(recorder, "index", 0)
    raise ValueError(
        f"{type(causal).__name__} does not say where its router logits come from, which "
        "router_aux_loss_coef needs. Set router_aux_loss_coef=0."
    )


def load_balancing_loss(logits: list[Tensor], weight: Tensor, chosen: int) -> Tensor:
    """Return experts * sum over experts of (share of tokens that chose it) * (mean probability).

    All layers count together, as in transformers.  It is a product of two means, so the losses of
    chunks do not add up to the loss of their union.

    Args:
        logits: [tokens, experts] of each layer.
        weight: [tokens] number of times that a token counts; 0 on padding.
        chosen: Experts per token.

    Returns:
        A scalar, `chosen` when the load is even.

    Example:
        one layer, logits [[9, 0], [0, 9]], weight [1, 1], chosen 1
        shares [0.5, 0.5], mean probabilities [0.5, 0.5] -> 2 * (0.25 + 0.25) = 1

    Source: arXiv:2101.03961, equations 4 to 6.
    """
    experts = logits[0].shape[-1]
    picked = weight.new_zeros(experts, dtype=torch.float32)
    wanted = weight.new_zeros(experts, dtype=torch.float32)

    # One layer at a time: [layers, tokens, experts] of a large model would be gigabytes.
    for layer in logits:
        probabilities = layer.view(-1, experts).float().softmax(-1)  # [tokens, experts]
        best = probabilities.topk(chosen, dim=-1).indices  # [tokens, chosen]
        counts = weight.float()[:, None].expand_as(best)
        picked = picked.scatter_add(0, best.flatten(), counts.flatten())
        wanted = wanted + weight.to(probabilities.dtype) @ probabilities

    count = weight.sum().clamp_min(1) * len(logits)
    return experts * (picked / count * (wanted / count)).sum()
