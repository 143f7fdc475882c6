"""A token out of a distribution, by inverting its cumulative distribution at a given number."""

import torch
from torch import Tensor

BLOCK_WIDTHS = (256, 128, 64)  # of blocks of the vocabulary, the first that divides it


def invert(probabilities: Tensor, numbers: Tensor) -> Tensor:
    """Return the first token whose cumulative probability exceeds `numbers` times the whole, [R].

    Two levels, blocks of the vocabulary and tokens of one block, so that only the short sums need
    float64: a float32 cumulative sum over a whole vocabulary would lose the tokens of its tail.

    Args:
        probabilities: [R, V]; need not add up to 1.
        numbers: [R] float64 in [0, 1), on the CPU.

    Example:
        probabilities [0.25, 0, 0.5, 0.25]: numbers below 0.25 -> 0, below 0.75 -> 2, others -> 3
    """
    rows, size = probabilities.shape
    width = next((w for w in BLOCK_WIDTHS if size % w == 0), 0)
    if not width:
        width = BLOCK_WIDTHS[-1]
        probabilities = torch.nn.functional.pad(probabilities, (0, -size % width))

    blocks = probabilities.view(rows, -1, width)
    cumulative = wide(blocks.sum(-1)).cumsum(-1)  # [R, V / width]
    target = below(numbers.to(cumulative.device) * cumulative[:, -1], cumulative[:, -1])
    block = (cumulative <= target[:, None]).sum(-1)  # [R]

    last = (block - 1).clamp_min(0)
    before = torch.where(block > 0, cumulative.gather(-1, last[:, None])[:, 0], 0.0)
    places = torch.arange(rows, device=blocks.device)
    inner = wide(blocks[places, block.to(blocks.device)]).cumsum(-1)  # [R, width]
    rest = below(target - before, inner[:, -1])

    tokens = block * width + (inner <= rest[:, None]).sum(-1)
    return tokens.to(probabilities.device)


def wide(values: Tensor) -> Tensor:
    """Return `values` in float64; on the CPU where the device has no float64."""
    return (values.cpu() if values.device.type == "mps" else values).double()


def below(value: Tensor, bound: Tensor) -> Tensor:
    """Return `value`, or the greatest number under `bound` where rounding has pushed it beyond."""
    return torch.minimum(value, torch.nextafter(bound, torch.zeros_like(bound)))
