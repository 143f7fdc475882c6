"""Float32 products on a CPU through oneDNN, where it is faster than the BLAS that torch calls.

torch calls MKL, which keeps AVX-512 to Intel's processors.  oneDNN, which torch has too and uses for bfloat16, is twice
as fast on others: for the sizes of a training step and for the few rows of a decoding step.  Both round in float32.
"""

import functools
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

SMALLEST = 2**16  # elements of a matrix below which a call costs more than it saves
BLOCK_BYTES = 2 * 2**20  # of an intermediate result


class OneDnnLinear(nn.Linear):
    """A linear layer that computes through oneDNN where it can, else as ever."""

    def forward(self, input: Tensor) -> Tensor:
        plain = type(self.weight) in (Tensor, nn.Parameter) and not torch.is_autocast_enabled(
            input.device.type
        )
        if not (plain and serves(input, self.weight)) or torch.compiler.is_compiling():
            return F.linear(input, self.weight, self.bias)
        if torch.is_grad_enabled():
            return _Linear.apply(input, self.weight, self.bias)
        return _linear(input, self.weight, self.bias)


def use_onednn(model: nn.Module) -> None:
    """Let the linear layers of `model` compute through oneDNN where it is faster; nothing else about them changes."""
    if is_faster():
        for module in model.modules():
            if type(module) is nn.Linear:
                module.__class__ = OneDnnLinear


@functools.cache
def is_faster() -> bool:
    """Whether oneDNN is the faster one on this machine.  By its kind and not by a measurement: runs must repeat."""
    try:
        foreign = "GenuineIntel" not in Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    has_both = torch.backends.mkldnn.is_available() and torch.backends.mkl.is_available()
    return has_both and foreign and torch.backends.cpu.get_cpu_capability().startswith("AVX512")


def serves(left: Tensor, right: Tensor) -> bool:
    """Whether oneDNN takes the product of these two."""
    alike = (
        left.dtype == right.dtype == torch.float32
        and left.device.type == right.device.type == "cpu"
    )
    dense = right.is_contiguous() or right.t().is_contiguous()
    worthwhile = right.numel() >= SMALLEST and left.numel() > 0
    return alike and dense and worthwhile and bool(torch.backends.mkldnn.enabled)


def product(left: Tensor, right: Tensor) -> Tensor:
    """left @ right, [n, m], of [n, k] and [k, m]; either may be the transposed view of a contiguous matrix."""
    return _linear(left, right.t(), None) if is_faster() and serves(left, right) else left @ right


def product_into(out: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """left @ right.T, [n, m], of [n, k] and [m, k], into the contiguous matrix `out`, which is given back."""
    if not (is_faster() and serves(left, right)):
        return torch.mm(left, right.T, out=out)
    for columns in _blocks(len(right), len(left)):
        out[:, columns] = _linear(left, right[columns], None)
    return out


def add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add left.T @ right, [m, k], of [n, m] and the contiguous [n, k] to `total`."""
    if not (is_faster() and serves(left, total)):
        total.addmm_(left.T, right)
        return
    for columns in _blocks(len(total), max(left.shape[0], right.shape[1])):
        total[columns] += _linear(left[:, columns].t(), right.t(), None)


def _blocks(length: int, width: int) -> list[slice]:
    """`length` in pieces, so that a matrix of a piece and `width` stays in the cache."""
    step = max(64, BLOCK_BYTES // (4 * width) // 64 * 64)
    return [slice(start, start + step) for start in range(0, length, step)]


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The weight must be contiguous, or the transposed view of something that is: others are a hundred times slower."""
    return torch.ops.mkldnn._linear_pointwise(input.contiguous(), weight, bias, "none", [], "")


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(input, weight)
        return _linear(input, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        input, weight = ctx.saved_tensors
        grad = grad_outputs[0].flatten(0, -2)
        into_input = into_weight = into_bias = None
        if ctx.needs_input_grad[0]:
            into_input = _linear(grad, weight.t(), None).view(input.shape)
        if ctx.needs_input_grad[1]:
            into_weight = _linear(grad.t(), input.flatten(0, -2).contiguous().t(), None)
        if ctx.needs_input_grad[2]:
            into_bias = grad.sum(0)
        return into_input, into_weight, into_bias
