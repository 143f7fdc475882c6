"""The best that this machine can do, measured: matrix products, and the weights of a model through few rows.

    python -m benchmarks.limits [--model FOLDER]

The least time of a training step follows: forward and backward of every distinct token at the rate of large matrix
products, and for each decoding step all weights of the model through as many rows as are written.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from benchmarks import compare
from benchmarks.programs import clock
from gmpo.policy.head.onednn import product

SIZE = 2048  # of the square matrices
ROWS = (1, 8, 16, 64)
WAYS = (lambda left, right: left @ right.T, lambda left, right: product(left, right.T))


@dataclass(eq=False)
class Limits:
    """Of a machine and a model.  Rates in operations (multiplications and additions) per second."""

    float32: float
    bfloat16: float
    linears: list[Tensor]  # weights of the model's matrix products, the head's last
    dtype: torch.dtype

    @cache  # noqa: B019 (there is one of these objects)
    def decoding(self, rows: int) -> float:
        """Return the seconds of a pass of `rows` tokens through all weights, which no cache holds."""
        inputs = {
            w.shape[1]: torch.randn(rows, w.shape[1], dtype=w.dtype, device=w.device)
            for w in self.linears
        }

        def work(how: Callable[[Tensor, Tensor], Tensor]) -> None:
            for weight in self.linears:
                how(inputs[weight.shape[1]], weight)

        return min(fastest(partial(work, how)) for how in WAYS)

    def weight_bytes(self) -> int:
        return sum(weight.nbytes for weight in self.linears)

    def learning(self, tokens: float, scored: float) -> float:
        """Return the seconds of forward and backward of `tokens`, `scored` of which go through the head."""
        *inner, head = self.linears
        return 6 * (tokens * sum(w.numel() for w in inner) + scored * head.numel()) / self.rate

    def reading(self, tokens: float) -> float:
        """Return the seconds of a forward pass of prompts."""
        return 2 * tokens * sum(weight.numel() for weight in self.linears[:-1]) / self.rate

    @property
    def rate(self) -> float:
        return self.bfloat16 if self.dtype == torch.bfloat16 else self.float32


def measured(model: str, dtype: torch.dtype = torch.float32) -> Limits:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    causal: Any = (
        AutoModelForCausalLM.from_pretrained(model, dtype=dtype).to(device).requires_grad_(False)
    )
    head = causal.get_output_embeddings()
    linears = [
        module.weight
        for module in causal.modules()
        if isinstance(module, nn.Linear) and module is not head
    ]
    return Limits(
        products(torch.float32, device),
        products(torch.bfloat16, device),
        [*linears, head.weight],
        dtype,
    )


def products(dtype: torch.dtype, device: torch.device) -> float:
    """Return the operations per second in a product of two square matrices, by the faster one of torch's own way and oneDNN."""
    left, right = (torch.randn(SIZE, SIZE, dtype=dtype, device=device) for _ in range(2))
    return 2 * SIZE**3 / min(fastest(partial(how, left, right)) for how in WAYS)


def fastest(work: Callable[[], Any], *, repeats: int = 10) -> float:
    """Least seconds of `work`, after a first call that is not counted."""
    taken = []
    for _ in range(repeats + 1):
        start = clock()
        work()
        taken.append(clock() - start)
    return min(taken[1:])


def table(limits: Limits) -> str:
    rows = [
        ("large matrix products, float32", f"{limits.float32 / 1e9:.0f} GFLOP/s"),
        ("large matrix products, bfloat16", f"{limits.bfloat16 / 1e9:.0f} GFLOP/s"),
    ]
    for count in ROWS:
        seconds = limits.decoding(count)
        rate = limits.weight_bytes() / seconds / 1e9
        rows.append(
            (
                f"all weights of the model through {count} rows",
                f"{1e3 * seconds:.0f} ms, {rate:.1f} GB/s",
            )
        )
    return compare.table(rows, {"work": lambda row: row[0], "rate": lambda row: row[1]})


def main() -> None:
    parser: argparse.ArgumentParser = compare.model_options(__doc__)
    args = parser.parse_args()
    limits = measured(compare.model_folder(args), torch.bfloat16 if args.bf16 else torch.float32)
    compare.report("limits", "What the machine can do at best.", table(limits), args)


if __name__ == "__main__":
    main()
