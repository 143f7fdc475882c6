"""Float32 products: on a CPU through oneDNN, where it is faster than the BLAS that torch calls.

torch calls MKL, which keeps AVX-512 to Intel's processors.  oneDNN, which torch has too and uses
for bfloat16, is twice as fast on others: for the sizes of a training step and for the few rows of a
decoding step.  Both round in float32.
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
WIDE_ROWS = 8192  # of a 16-bit matrix that are in float32 at a time


class OneDnnLinear(nn.Linear):
    """A linear layer that computes through oneDNN where it can, else as `nn.Linear`."""

    def forward(self, input: Tensor) -> Tensor:
        """Return [..., out_features] of [..., in_features]."""
        plain = type(self.weight) in (Tensor, nn.Parameter)
        usual = torch.is_autocast_enabled(input.device.type) or torch.compiler.is_compiling()
        if usual or not plain or not serves(input, self.weight):
            return F.linear(input, self.weight, self.bias)
        if torch.is_grad_enabled():
            return _Linear.apply(input, self.weight, self.bias)
        return _linear(input, self.weight, self.bias)


def use_onednn(model: nn.Module) -> None:
    """Let the linear layers of `model` compute through oneDNN where it is faster."""
    if not is_faster():
        return
    for module in model.modules():
        if type(module) is nn.Linear:
            # Warning: this swaps the class of the user's modules.  Parameters, hooks and names
            # stay, so that checkpoints, optimizers and adapters see no difference.
            module.__class__ = OneDnnLinear


@functools.cache
def is_faster() -> bool:
    """Return whether oneDNN is the faster one on this machine.

    It is told by the kind of processor and not by a measurement, so that runs repeat.
    """
    try:
        foreign = "GenuineIntel" not in Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    has_both = torch.backends.mkldnn.is_available() and torch.backends.mkl.is_available()
    return has_both and foreign and torch.backends.cpu.get_cpu_capability().startswith("AVX512")


def serves(left: Tensor, right: Tensor) -> bool:
    """Return whether oneDNN takes the product of these two."""
    wide = left.dtype == right.dtype == torch.float32
    on_cpu = left.device.type == right.device.type == "cpu"
    dense = right.is_contiguous() or right.t().is_contiguous()
    worthwhile = right.numel() >= SMALLEST and left.numel() > 0
    return wide and on_cpu and dense and worthwhile and bool(torch.backends.mkldnn.enabled)


def product(left: Tensor, right: Tensor) -> Tensor:
    """Return left @ right, [n, m], of [n, k] and [k, m].

    Either may be the transposed view of a contiguous matrix.
    """
    if is_faster() and serves(left, right):
        return _linear(left, right.t(), None)
    return left @ right


def product_into(out: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """Compute left @ right.T, [n, m], of [n, k] and [m, k], into `out`, and return it.

    `out` must be contiguous.
    """
    if not (is_faster() and serves(left, right)):
        return torch.mm(left, right.T, out=out)
    for columns in _blocks(len(right), len(left)):
        out[:, columns] = _linear(left, right[columns], None)
    return out


def wide_product_into(out: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """Compute left @ right.T of 16-bit matrices [n, k] and [m, k] in float32; return it, [n, m].

    Args:
        out: [n, m] float32, contiguous; used where the device has no such product.
    """
    if left.device.type == "cuda":
        # torch before 2.8 and AMD's GPUs have no such product.
        if "dtype" not in torch.ops.aten.mm.overloads() or torch.version.hip is not None:
            return out.copy_(left @ right.T)
        return torch.mm(left, right.T, out_dtype=torch.float32)

    # CPUs round the result of a 16-bit product: some rows of `right` at a time are made float32.
    wide = left.float()
    for start in range(0, len(right), WIDE_ROWS):
        columns = slice(start, start + WIDE_ROWS)
        out[:, columns] = product(wide, right[columns].float().T)
    return out


def add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add left.T @ right, [m, k], of [n, m] and the contiguous [n, k] to `total`."""
    if not (is_faster() and serves(left, total)):
        total.addmm_(left.T, right)
        return
    for columns in _blocks(len(total), max(left.shape[0], right.shape[1])):
        total[columns] += _linear(left[:, columns].t(), right.t(), None)


def _blocks(length: int, width: int) -> list[slice]:
    """Cut `length` so that a matrix of a block and `width` stays in the cache.

    Example:
        length 300, width 4096: 2 MiB hold 128 float32 rows -> 0:128, 128:256, 256:384
    """
    step = max(64, BLOCK_BYTES // (4 * width) // 64 * 64)
    return [slice(start, start + step) for start in range(0, length, step)]


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return input @ weight.T + bias.

    The weight must be contiguous, or the transposed view of a contiguous matrix: other strides are
    a hundred times slower.
    """
    return torch.ops.mkldnn._linear_pointwise(input.contiguous(), weight, bias, "none", [], "")


class _Linear(torch.autograd.Function):
    """`_linear` with its gradients, through oneDNN too."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(input, weight)
        return _linear(input, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride] (torch calls it by position)
        input, weight = ctx.saved_tensors
        grad = grad_outputs[0].flatten(0, -2)

        grad_input = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_input = _linear(grad, weight.t(), None).view(input.shape)
        if ctx.needs_input_grad[1]:
            grad_weight = _linear(grad.t(), input.flatten(0, -2).contiguous().t(), None)
        if ctx.needs_input_grad[2]:
            grad_bias = grad.sum(0)
        return grad_input, grad_weight, grad_bias
