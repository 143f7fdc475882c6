"""The vocabulary head alone: log-probs and entropies of N tokens, forward and backward, in three ways.

    python -m benchmarks.head [--rows 4096] [--hidden 1024] [--vocabulary 151936] [--completion 200] [--rounds 5]

`fused` computes logits once; `two passes` computes the logits of a tile again in the backward pass; `checkpoint` is
the same with torch's own operations: chunks of 256 rows under torch.utils.checkpoint.  Memory is what a pass needs
above its inputs, the weights and their gradients.
"""

import argparse
import statistics
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from benchmarks import compare
from benchmarks.peer import ROOT
from gmpo.policy.fused import fused_loss
from gmpo.policy.head import Head
from gmpo.policy.tiles import tile_rows, token_scores


def main() -> None:
    args = options()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    head = nn.Linear(args.hidden, args.vocabulary, bias=False, device=device)
    hidden = torch.randn(args.rows, args.hidden, device=device, requires_grad=True)
    targets = torch.randint(0, args.vocabulary, (args.rows,), device=device)
    weights = torch.randn(args.rows, device=device)
    ways: dict[str, Callable[[], Tensor]] = {
        "fused": lambda: fused(hidden, head, targets, weights, args.completion),
        "two passes": lambda: token_scores(hidden, Head(head), targets, want_entropy_grad=False)[0] @ weights,
        "checkpoint": lambda: checkpointed(hidden, head, targets) @ weights,
    }
    taken: dict[str, list[tuple[float, float, float]]] = {name: [] for name in ways}
    for round in range(-args.warmup, args.rounds):
        for name, way in ways.items():
            hidden.grad = head.weight.grad = None
            reply = measured(way, hidden, head)
            if round >= 0:
                taken[name].append(reply)
    columns = {
        "way": lambda name: name,
        "seconds": lambda name: "{:.3g} ({:.3g}-{:.3g})".format(*spread([reply[0] for reply in taken[name]])),
        "times `fused`": lambda name: f"{median(taken[name], 0) / median(taken['fused'], 0):.2f}",
        "memory, MB": lambda name: f"{max(reply[1] for reply in taken[name]) / 1e6:.0f}",
        "norm of the weight's gradient": lambda name: f"{median(taken[name], 2):.6g}",
    }
    title = f"{args.rows} tokens, hidden states of {args.hidden}, a vocabulary of {args.vocabulary}"
    compare.report("head", title, compare.table(list(ways), columns), results=args.results)


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--vocabulary", type=int, default=151_936)
    parser.add_argument("--completion", type=int, default=200, help="tokens of a completion, for the fused loss")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--warmup", type=int, default=1)
    parser.add_argument("--results", default=str(ROOT / "benchmarks" / "results"))
    return parser.parse_args()


def fused(hidden: Tensor, head: nn.Linear, targets: Tensor, weights: Tensor, completion: int) -> Tensor:
    """Tiles of as many whole completions as fit."""
    rows = max(1, tile_rows(len(head.weight), 4, hidden.device) // completion) * completion
    parts = weights.split(rows)
    return fused_loss(hidden, head, targets, [len(part) for part in parts], lambda tile, logps, _: logps @ parts[tile])


def checkpointed(hidden: Tensor, head: nn.Linear, targets: Tensor) -> Tensor:
    def scores(part: Tensor, target: Tensor) -> Tensor:
        every = head(part).log_softmax(-1)
        with torch.no_grad():
            (every.exp() * every).sum(-1)
        return every.gather(-1, target[:, None]).squeeze(-1)

    pairs = zip(hidden.split(256), targets.split(256), strict=True)
    return torch.cat([checkpoint(scores, *pair, use_reentrant=False) for pair in pairs])  # pyright: ignore


def measured(way: Callable[[], Tensor], hidden: Tensor, head: nn.Linear) -> tuple[float, float, float]:
    """Seconds, bytes above what has to be there, and a number to compare."""
    before = memory()
    peak, stop = [before], threading.Event()
    watcher = threading.Thread(target=watch, args=(peak, stop))
    watcher.start()
    start = time.perf_counter()
    way().backward()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    stop.set()
    watcher.join()
    assert head.weight.grad is not None
    gradients = head.weight.grad.nbytes + hidden.nbytes
    return seconds, max(peak) - before - gradients, head.weight.grad.norm().item()


def watch(peak: list[float], stop: threading.Event) -> None:
    while not stop.wait(0.002):
        peak.append(memory())


def memory() -> float:
    if torch.cuda.is_available():
        return float(torch.cuda.memory_allocated())
    return float(Path("/proc/self/statm").read_text().split()[1]) * 4096


def median(replies: list[tuple[float, float, float]], item: int) -> float:
    return statistics.median(reply[item] for reply in replies)


def spread(values: list[float]) -> tuple[float, float, float]:
    return statistics.median(values), min(values), max(values)


if __name__ == "__main__":
    main()
