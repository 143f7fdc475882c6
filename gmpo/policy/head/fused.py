"""The loss and its gradient while the logits are there: each is computed once.

The loss of a completion depends on its own tokens only.  So in tiles made of whole completions the loss of a tile, the
gradient of its log-probs and, from the same logits, the gradients of the hidden states and of the head follow at once;
the backward pass only multiplies what the forward pass found by the gradient that comes in.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from gmpo.policy.head.chunked import LinearTiles
from gmpo.policy.head.lm_head import PLAIN, Transform, computing_dtype
from gmpo.policy.head.logits_shaping import Shaping

LossOfTile = Callable[
    [int, Tensor, Tensor], Tensor
]  # (number of the tile, logps [r], entropy [r]) -> scalar


def fused_loss(
    hidden: Tensor,
    head: nn.Linear,
    targets: Tensor,
    sizes: Sequence[int],
    loss_of: LossOfTile,
    transform: Transform = PLAIN,
    *,
    shaping: Shaping | None = None,
) -> Tensor:
    """Sum over tiles of `loss_of`, a scalar; carries the gradients of `hidden` and of `head`.

    Args:
        hidden: [N, H], the rows of a tile next to each other.
        targets: [N] int64.
        sizes: Rows of each tile.
        shaping: [N] what the sampler did to the logits; None: nothing.
    """
    dtype = computing_dtype(hidden, head)
    return _FusedLoss.apply(
        hidden, head.weight, head.bias, targets, sizes, loss_of, dtype, transform, shaping
    )


class _FusedLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, sizes, loss_of, dtype, transform, shaping):
        with torch.autocast(hidden.device.type, enabled=False):
            tiles = LinearTiles(weight, bias, dtype, transform)
            total = torch.zeros((), dtype=tiles.wide, device=hidden.device)
            into_hidden = torch.zeros(hidden.shape, dtype=tiles.wide, device=hidden.device)
            into_weight = (
                torch.zeros_like(weight, dtype=tiles.wide) if ctx.needs_input_grad[1] else None
            )
            into_bias = (
                torch.zeros_like(bias, dtype=tiles.wide) if ctx.needs_input_grad[2] else None
            )
            stop = 0
            for number, size in enumerate(sizes):
                rows = slice(stop, stop := stop + size)
                logps, entropy = tiles.scores(
                    hidden[rows], targets[rows], None if shaping is None else shaping[rows]
                )
                share, into_logps, into_entropy = _loss_and_gradients(
                    loss_of, number, logps, entropy
                )
                total += share
                if into_logps is not None or into_entropy is not None:
                    into_logps = torch.zeros_like(logps) if into_logps is None else into_logps
                    into_hidden[rows] = tiles.gradients(
                        into_logps, into_entropy, into_weight, into_bias
                    )
        ctx.found = [
            (found, given.dtype)
            for found, given in ((into_hidden, hidden), (into_weight, weight), (into_bias, bias))
            if found is not None
        ]
        ctx.present = [into_hidden is not None, into_weight is not None, into_bias is not None]
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, *grad_outputs):
        found, ctx.found = ctx.found, None
        found = iter([tensor.mul_(grad_outputs[0]).to(dtype) for tensor, dtype in found])
        return (
            *(next(found) if present else None for present in ctx.present),
            None,
            None,
            None,
            None,
            None,
            None,
        )


def _loss_and_gradients(
    loss_of: LossOfTile, number: int, logps: Tensor, entropy: Tensor
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    with torch.enable_grad():
        scores = (logps.requires_grad_(), entropy.requires_grad_())
        share = loss_of(number, *scores)
        if not share.requires_grad:
            return share, None, None
        into_logps, into_entropy = torch.autograd.grad(share, scores, allow_unused=True)
    return share.detach(), into_logps, into_entropy
