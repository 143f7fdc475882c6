"""Attention and the learner on one CUDA GPU: one script of at most five minutes.

    python -m benchmarks.gpu [--small]

1. Correctness: each kernel of the GPU beside the same attention in float64, values and gradients.
2. Kernels: seconds of one layer, forward and backward, by kernel.
3. Learner: a 0.6B model's shapes, a prompt of 1,024 tokens and 8 completions of 4,096, bfloat16.

A part that fails says so, and the next one runs; no part begins after the time is over.  `--small`
takes sizes that run anywhere, also without a GPU, to try the script itself.
"""

import argparse
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, Qwen3Config

from gmpo.attention import flex, varlen
from gmpo.attention.attend import attend
from gmpo.attention.kernels import AttentionParams
from gmpo.attention.segments import Reach, Segments, Tree
from gmpo.policy.logprobs import LogProbs
from gmpo.policy.settings import PolicySettings
from gmpo.types import Batch

SECONDS = 270  # after which no part begins
ROW = (Tree(300, (200, 129, 57, 1)), Tree(128, (128, 256)), Tree(40, (60,)))
REACHES = {"all": Reach(), "window of 100": Reach(window=100)}
HOW: dict[str, dict[str, float | bool]] = {"plain": {}, "soft cap": {"softcap": 5.0}, "sinks": {}}
TOLERANCE = {torch.float32: 2e-3, torch.bfloat16: 2e-2}


@dataclass(frozen=True)
class Sizes:
    """The sizes that are measured."""

    prompt: int
    completions: int
    tokens: int  # of a completion
    layers: int
    hidden: int
    vocabulary: int


FULL = Sizes(1024, 8, 4096, layers=28, hidden=1024, vocabulary=151_936)
SMALL = Sizes(16, 4, 24, layers=2, hidden=64, vocabulary=256)


def main() -> None:
    """Run the parts."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--small", action="store_true", help="sizes that run anywhere")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and not args.small:
        print("No CUDA GPU here; --small tries the script itself.")
        return

    sizes = SMALL if args.small else FULL
    name = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    print(f"{name}, torch {torch.__version__}", flush=True)
    start = time.perf_counter()
    parts: tuple[Callable[[torch.device, Sizes], None], ...] = (correctness, kernels, learner)
    for part in parts:
        if time.perf_counter() - start > SECONDS:
            print(f"{part.__name__}: no time left")
            continue
        try:
            part(device, sizes)
        except Exception:  # the next part may run all the same
            print(f"{part.__name__} failed:\n{traceback.format_exc()}", flush=True)


# -- correctness -----------------------------------------------------------------------------------


def correctness(device: torch.device, sizes: Sizes) -> None:
    """Print the largest errors of values and gradients, in units of the largest value."""
    print("\n| dtype | reach | scores | kernel | output | d query | d key | d value | d sinks | |")
    print("| --- " * 10 + "|")
    for dtype in (torch.bfloat16, torch.float32):
        for reach_name, reach in REACHES.items():
            for how in HOW:
                try:
                    line = compared(device, dtype, reach, how)
                except Exception as error:
                    line = f"failed: {type(error).__name__}: {str(error)[:200]}"
                print(f"| {dtype} | {reach_name} | {how} | {line}", flush=True)


def compared(device: torch.device, dtype: torch.dtype, reach: Reach, how: str) -> str:
    """Return the cells of one comparison with float64 on the CPU."""
    tokens = sum(tree.tokens for tree in ROW)
    generator = torch.Generator().manual_seed(0)
    shapes = [(tokens, heads, 64) for heads in (8, 2, 2, 8)]
    *inputs, gradient = (torch.randn(shape, generator=generator).to(dtype) for shape in shapes)
    sinks = torch.randn(8, generator=generator).to(dtype) if how == "sinks" else None

    def run(to_device: torch.device, to_dtype: torch.dtype) -> list[Tensor]:
        moved = [tensor.to(to_device, to_dtype).requires_grad_() for tensor in inputs]
        there = None if sinks is None else sinks.to(to_device, to_dtype).requires_grad_()
        cap = HOW[how].get("softcap")
        params = AttentionParams(0.125, None if cap is None else float(cap), there)
        output = attend(*moved, Segments(ROW, to_device), reach, params)
        leaves = moved if there is None else [*moved, there]
        gradients = torch.autograd.grad(output, leaves, gradient.to(to_device, to_dtype))
        return [output.detach(), *gradients]

    expected = run(torch.device("cpu"), torch.float64)
    found = run(device, dtype)
    errors = [
        float((one.cpu().double() - other).abs().max() / other.abs().max())
        for one, other in zip(found, expected, strict=True)
    ]
    cells = " | ".join(f"{error:.1e}" for error in errors) + (" | -" if sinks is None else "")
    verdict = "ok" if max(errors) <= TOLERANCE[dtype] else "WRONG"
    return f"{kernel_of(device, dtype, reach, how)} | {cells} | {verdict} |"


def kernel_of(device: torch.device, dtype: torch.dtype, reach: Reach, how: str) -> str:
    """Return the name of the kernel that serves."""
    query = torch.empty(1, 8, 64, device=device, dtype=dtype)
    sinks = torch.zeros(8, device=device) if how == "sinks" else None
    params = AttentionParams(0.125, 5.0 if how == "soft cap" else None, sinks)
    if varlen.serves(query, query, reach, params):
        return "varlen"
    return "flex" if flex.serves(query, query) else "tiles"


# -- seconds ---------------------------------------------------------------------------------------


def kernels(device: torch.device, sizes: Sizes) -> None:
    """Print seconds of one layer by kernel."""
    row = Segments((Tree(sizes.prompt, (sizes.tokens,) * sizes.completions),), device)
    params = AttentionParams(0.125)
    dtype = torch.bfloat16
    shapes = [(row.tokens, heads, 64) for heads in (16, 8, 8)]
    inputs = [torch.randn(shape, device=device, dtype=dtype).requires_grad_() for shape in shapes]
    gradient = torch.randn(shapes[0], device=device, dtype=dtype)
    ways = {"varlen": varlen.varlen_attention, "flex": flex.flex_attention_of}
    serving = {
        "varlen": varlen.serves(inputs[0], inputs[0], Reach(), params),
        "flex": flex.serves(inputs[0], inputs[0]),
    }

    print(f"\nOne layer, {row.tokens} tokens, forward and backward:", flush=True)
    for name, way in ways.items():
        if serving[name]:
            seconds = timed(lambda way=way: way(*inputs, row, Reach(), params).backward(gradient))
            print(f"- {name}: {1e3 * seconds:.2f} ms", flush=True)


def learner(device: torch.device, sizes: Sizes) -> None:
    """Print seconds and memory of forward and backward of a group, and the share of the peak."""
    config = Qwen3Config(
        vocab_size=sizes.vocabulary,
        hidden_size=sizes.hidden,
        intermediate_size=3 * sizes.hidden,
        num_hidden_layers=sizes.layers,
        num_attention_heads=max(sizes.hidden // 64, 2),
        num_key_value_heads=max(sizes.hidden // 128, 1),
        head_dim=128 if sizes is FULL else 32,
        tie_word_embeddings=True,
        max_position_embeddings=40_960,
    )
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    batch = random_batch(sizes, device)
    logprobs = LogProbs(PolicySettings(batch_layout="shared_prefix", router_aux_loss_coef=0.0))

    def step() -> None:
        model.zero_grad()
        logprobs.loss(
            model, batch, lambda rows, logps, _: logps.mean(), want_entropy_grad=False
        ).backward()

    step()  # compiles, and checks the layout
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    seconds = timed(step)
    tokens = logprobs.tokens(batch)
    print(f"\nLearner: {tokens} distinct tokens, {seconds:.2f} s, {tokens / seconds:.0f} tokens/s")

    # Forward, recomputed forward, backward of all products with weights: 8 operations each.
    weights = sum(parameter.numel() for parameter in model.parameters())
    share = 8 * weights * tokens / seconds / matmul_rate(device, sizes)
    print(f"- weights' products at {share:.0%} of the rate of a large bfloat16 product")
    if device.type == "cuda":
        print(f"- peak memory {torch.cuda.max_memory_allocated() / 1e9:.1f} GB", flush=True)


def random_batch(sizes: Sizes, device: torch.device) -> Batch:
    """Return one group of random tokens."""
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(1, sizes.vocabulary, (sizes.prompt,), generator=generator).to(device)
    shape = (sizes.completions, sizes.tokens)
    lengths = torch.full((sizes.completions,), sizes.tokens, device=device)
    return Batch(
        prompt_ids=[prompt] * sizes.completions,
        completion_ids=torch.randint(1, sizes.vocabulary, shape, generator=generator).to(device),
        lengths=lengths,
        mask=torch.ones(shape, dtype=torch.bool, device=device),
        num_completion_tokens=lengths,
        advantages=torch.zeros(sizes.completions, device=device),
        group=torch.zeros(sizes.completions, dtype=torch.int64, device=device),
    )


def matmul_rate(device: torch.device, sizes: Sizes) -> float:
    """Return the operations per second of a large product in bfloat16."""
    side = 8192 if sizes is FULL else 256
    left = torch.randn(side, side, device=device, dtype=torch.bfloat16)
    return 2 * side**3 / timed(lambda: left @ left)


def timed(work: Callable[[], object], rounds: int = 3) -> float:
    """Return the least seconds of a few rounds, after one to warm up."""
    found = []
    for _ in range(rounds + 1):
        start = clock()
        work()
        found.append(clock() - start)
    return min(found[1:])


def clock() -> float:
    """Return seconds, when everything asked of the device so far is done."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


if __name__ == "__main__":
    main()
