"""Merging of attention over parts by log-sum-exp, and the weight that goes to sinks.

Backward, the parts need no more than the merged output o and log-sum-exp l: with scores s and
values v of a part, and the gradient g of the merged output,

    p = e^(s - l),    ds = p (g v - g o),    dv = p g

so that a kernel's own backward pass, given o and l in the place of its own, returns the gradient
of its part.
"""

import torch
from torch import Tensor


def merge(output: Tensor, lse: Tensor, other: Tensor, other_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Return attention over two parts, and its log-sum-exp.

    Args:
        output, other: [..., D].
        lse, other_lse: [...].

    Example:
        output 1 with e^lse = 3, other 5 with e^other_lse = 1 -> output (3 * 1 + 1 * 5) / 4 = 2 and
        e^lse = 4
    """
    weight = torch.sigmoid(lse - other_lse)[..., None].to(output.dtype)
    return torch.lerp(other, output, weight), torch.logaddexp(lse, other_lse)


def drain(output: Tensor, lse: Tensor, sinks: Tensor) -> tuple[Tensor, Tensor]:
    """Return attention less the weight that goes to sinks, and the log-sum-exp with them.

    Args:
        output: [..., H, D].
        lse: [..., H].
        sinks: [H] the score of a position without a value, which every token sees.
    """
    sinks = sinks.to(lse.dtype)
    weight = torch.sigmoid(lse - sinks)[..., None].to(output.dtype)
    return output * weight, torch.logaddexp(lse, sinks.expand_as(lse))


def sink_gradient(gradient: Tensor, output: Tensor, lse: Tensor, sinks: Tensor) -> Tensor:
    """Return the gradient of sinks, [H].

    Args:
        gradient: [L, H, D] of `output`, the drained one.
        output: [L, H, D].
        lse: [L, H] with the sinks in it.
    """
    weight = (sinks.to(lse.dtype) - lse).exp()  # [L, H]
    through = (gradient.to(lse.dtype) * output.to(lse.dtype)).sum(-1)
    return -(weight * through).sum(0).to(sinks.dtype)
