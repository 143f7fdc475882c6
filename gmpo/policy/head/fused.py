"""The loss and its gradient while the logits are there: each is computed once.

The loss of a completion depends on its own tokens only.  So in tiles made of whole completions the
loss of a tile, the gradient of its log-probs and, from the same logits, the gradients of the hidden
states and of the head follow at once.  The backward pass only multiplies what the forward pass
found by the gradient that comes in.
"""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from gmpo.policy.head.chunked import ChunkedHead
from gmpo.policy.head.lm_head import PLAIN, Transform, computing_dtype
from gmpo.policy.head.logits_shaping import Shaping


class RowsLoss(Protocol):
    """The loss of some rows of a chunk: all that passes from the objective to the head."""

    def __call__(self, rows: Tensor, logps: Tensor, entropy: Tensor) -> Tensor:
        """Return the share of `rows` in the loss, a scalar.

        Args:
            rows: [b] int64, indices within the chunk.
            logps: [M], of the trained tokens of these rows, one row after another.
            entropy: [M] nats.
        """
        ...


def fused_loss(
    hidden: Tensor,
    head: nn.Linear,
    targets: Tensor,
    tiles: Sequence[Tensor],
    sizes: Sequence[int],
    loss: RowsLoss,
    transform: Transform = PLAIN,
    *,
    shaping: Shaping | None = None,
) -> Tensor:
    """Return the sum of `loss` over tiles, a scalar with the gradients of `hidden` and `head`.

    Args:
        hidden: [N, H], the states of a tile next to each other.
        targets: [N] int64.
        tiles: Rows of the chunk ([b] int64) in each tile.
        sizes: States of each tile; they add up to N.
        loss: Called once per tile, while the tile's logits are there.
        shaping: [N] what the sampler did to the logits; None if it did nothing.
    """
    dtype = computing_dtype(hidden, head)
    return _FusedLoss.apply(
        hidden, head.weight, head.bias, targets, tiles, sizes, loss, dtype, transform, shaping
    )


class _FusedLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, tiles, sizes, loss, dtype, transform, shaping):
        # `dtype` says what is computed in; autocast would round sums and gradients once more.
        with torch.autocast(hidden.device.type, enabled=False):
            head = ChunkedHead(weight, bias, dtype, transform)
            total = torch.zeros((), dtype=head.wide, device=hidden.device)
            grad_hidden = torch.zeros(hidden.shape, dtype=head.wide, device=hidden.device)
            grad_weight, grad_bias = None, None
            if ctx.needs_input_grad[1]:
                grad_weight = torch.zeros_like(weight, dtype=head.wide)
            if ctx.needs_input_grad[2]:
                grad_bias = torch.zeros_like(bias, dtype=head.wide)

            start = 0
            for rows, size in zip(tiles, sizes, strict=True):
                tile = slice(start, start + size)
                start += size

                found = head.evaluate(
                    hidden[tile], targets[tile], None if shaping is None else shaping[tile]
                )
                share, grad_logps, grad_entropy = _loss_and_gradients(
                    loss, rows, found.logps, found.entropy
                )
                total += share

                # A tile without a gradient leaves its hidden states at 0.
                if grad_logps is None and grad_entropy is None:
                    continue
                if grad_logps is None:
                    grad_logps = torch.zeros_like(found.logps)
                grad_hidden[tile] = found.gradients(
                    grad_logps, grad_entropy, grad_weight, grad_bias
                )

        ctx.gradients = (grad_hidden, grad_weight, grad_bias)
        ctx.dtypes = (hidden.dtype, weight.dtype, None if bias is None else bias.dtype)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, *grad_outputs):  # pyright: ignore[reportIncompatibleMethodOverride] (torch calls it by position)
        # Freed at once, as they are as large as the head.  They are scaled in place, so that a
        # second backward pass would be wrong: without them it fails.
        gradients, ctx.gradients = ctx.gradients, None
        scaled = []
        for gradient, dtype in zip(gradients, ctx.dtypes, strict=True):
            scaled.append(None if gradient is None else gradient.mul_(grad_outputs[0]).to(dtype))
        return (*scaled, *[None] * 7)  # targets to shaping have no gradient


def _loss_and_gradients(
    loss: RowsLoss, rows: Tensor, logps: Tensor, entropy: Tensor
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return the loss of a tile and its gradients in log-probs and entropies, or None."""
    with torch.enable_grad():
        share = loss(rows, logps.requires_grad_(), entropy.requires_grad_())
        if not share.requires_grad:
            return share, None, None
        grad_logps, grad_entropy = torch.autograd.grad(share, (logps, entropy), allow_unused=True)
    return share.detach(), grad_logps, grad_entropy
