"""The learner with completions as long as users have, of gmpo and of the peer in turn.

    python -m benchmarks.long [--model FOLDER] [--layers 4] [--rounds 3]

The model has few layers of its size, so that the peer's memory suffices.  Both sides learn the same
rows.  Pairs are those of queries and keys that an attention layer computes for one head: gmpo's
those of its segments, the peer's those of its rectangle.

Second table: gmpo only, time per distinct token while completions grow.  Third table: attention of
one layer only, a prompt of 1,024 tokens and completions of 4,096, forward and backward.
"""

import argparse
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from benchmarks import compare
from benchmarks.loss import apart, options, random_rows
from benchmarks.programs import clock, peak_bytes, reset_peak
from gmpo.attention.attend import attend
from gmpo.attention.kernels import AttentionParams
from gmpo.attention.segments import Call, Reach, Segments, Tree

CASES = {
    "4 x 512": (64, (512,) * 4),  # nothing to pad, little to share
    "8 x 128-384": (256, (128, 156, 200, 230, 264, 312, 358, 384)),
    "8 x 256-1024": (256, (256, 380, 480, 620, 700, 810, 930, 1024)),
    "8 x 512-1024": (1024, (512, 590, 640, 720, 800, 870, 960, 1024)),
}
GROWTH = (64, 128, 256, 512, 960)  # tokens of 8 completions of a prompt of 256
LONGEST = (1024, (4096,) * 8)


@dataclass
class Case:
    prompt: int  # tokens
    lengths: tuple[int, ...]  # tokens of each completion
    replies: compare.Replies

    @property
    def tree(self) -> Tree:
        """Return the sizes of the group in one line."""
        return Tree(self.prompt, self.lengths)

    @property
    def padded_pairs(self) -> int:
        """Return the pairs of a rectangle of whole rows."""
        return len(self.lengths) * (self.prompt + max(self.lengths)) ** 2


def main() -> None:
    """Run the cases and write the report."""
    parser = compare.model_options(__doc__, rounds=3)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--only-gmpo", action="store_true", help="leave the peer out")
    args = parser.parse_args()

    with shallow(compare.model_folder(args), args.layers) as model:
        rows = [Case(*CASES[name], measured(model, *CASES[name], args)) for name in args.cases]
        growth = [
            Case(256, (size,) * 8, measured(model, 256, (size,) * 8, args, alone=True))
            for size in GROWTH
        ]

    text = "\n".join(
        [
            compare.table(rows, COLUMNS),
            "Time per distinct token, prompt of 256 tokens and 8 completions:\n",
            compare.table(growth, GROWTH_COLUMNS),
            "Attention of one layer only, 9 heads of 64 and 3 of keys:\n",
            compare.table([attention_alone(*LONGEST)], ALONE_COLUMNS),
        ]
    )
    title = f"Forward and backward of a group, {args.layers} layers of the model's size."
    compare.report("long", title, text, args)


@contextmanager
def shallow(model: str, layers: int) -> Iterator[str]:
    """Make a model of fewer layers with random weights; yield its folder."""
    config = AutoConfig.from_pretrained(model)
    config.num_hidden_layers = layers
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:layers]
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
        AutoTokenizer.from_pretrained(model).save_pretrained(folder)
        yield folder


def measured(
    model: str,
    prompt: int,
    lengths: tuple[int, ...],
    args: argparse.Namespace,
    *,
    alone: bool = False,
) -> compare.Replies:
    """Return what both sides, or gmpo alone, take for one group of random tokens."""
    with tempfile.TemporaryDirectory() as folder:
        batch = str(Path(folder, "batch.safetensors"))
        save_file(random_rows(model, 1, prompt, lengths), batch)
        sides = compare.both(model=model, batch=batch, options=options(args, lengths))
        if alone or args.only_gmpo:
            sides = {"gmpo": sides["gmpo"]}
        return compare.alternate(
            "benchmarks.programs:learner", sides, rounds=args.rounds, warmup=args.warmup
        )


def pairs(tree: Tree) -> int:
    """Return the pairs of queries and keys that gmpo's kernels compute.

    Example:
        a prompt of 2 tokens with completions of 1 and 1: 3 of the prompt, 1 + 1, and 2 * 2 -> 9
    """

    def of_call(call: Call) -> int:
        met = call.queries.length * call.keys.length
        if call.causal:
            met = call.queries.length * (call.queries.length + 1) // 2
        return call.queries.count * met

    return sum(of_call(call) for call in Segments((tree,), torch.device("cpu")).calls(Reach()))


def attention_alone(prompt: int, lengths: tuple[int, ...]) -> dict[str, float]:
    """Return seconds and peak memory of attention over one line, forward and backward."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    tree = Tree(prompt, lengths)
    shapes = [(tree.tokens, heads, 64) for heads in (9, 3, 3)]
    inputs = [torch.randn(shape, device=device, dtype=dtype).requires_grad_() for shape in shapes]
    gradient = torch.randn(shapes[0], device=device, dtype=dtype)
    given = sum(tensor.nbytes for tensor in inputs)

    before, start = reset_peak(), clock()
    attend(*inputs, Segments((tree,), device), Reach(), AttentionParams(0.125)).backward(gradient)
    seconds = clock() - start
    # Less the output and the gradients of query, key and value.
    extra = peak_bytes() - before - gradient.nbytes - given
    return {
        "tokens": tree.tokens,
        "pairs": pairs(tree),
        "dense": tree.tokens**2,
        "seconds": seconds,
        "extra": extra,
    }


COLUMNS = {
    "prompt tokens": lambda case: str(case.prompt),
    "completion tokens": lambda case: f"{min(case.lengths)}-{max(case.lengths)}",
    "completions": lambda case: str(len(case.lengths)),
    "gmpo, s": lambda case: compare.seconds(case.replies, "gmpo"),
    "peer, s": lambda case: compare.seconds(case.replies, "peer"),
    "peer / gmpo": lambda case: compare.ratio(case.replies),
    "peak memory: gmpo, GB": lambda case: compare.gigabytes(case.replies, "gmpo"),
    "peer, GB": lambda case: compare.gigabytes(case.replies, "peer"),
    "gmpo / peer": lambda case: compare.peak_share(case.replies),
    "pairs, millions: gmpo": lambda case: f"{pairs(case.tree) / 1e6:.2f}",
    "rectangle": lambda case: f"{case.padded_pairs / 1e6:.2f}",
    "gradient norms apart": lambda case: apart(case.replies, "gmpo", "peer"),
}
GROWTH_COLUMNS = {
    "completion tokens": lambda case: str(case.lengths[0]),
    "distinct tokens": lambda case: str(case.tree.tokens),
    "pairs, millions": lambda case: f"{pairs(case.tree) / 1e6:.2f}",
    "s": lambda case: compare.seconds(case.replies, "gmpo"),
    "ms per distinct token": lambda case: (
        f"{1e3 * compare.median(case.replies, 'gmpo', 'seconds') / case.tree.tokens:.3f}"
    ),
}
ALONE_COLUMNS = {
    "tokens": lambda found: f"{found['tokens']:,}",
    "pairs, millions": lambda found: f"{found['pairs'] / 1e6:.0f}",
    "all pairs, millions": lambda found: f"{found['dense'] / 1e6:.0f}",
    "s": lambda found: f"{found['seconds']:.2f}",
    "MB above inputs, output and gradients": lambda found: f"{found['extra'] / 1e6:.0f}",
}

if __name__ == "__main__":
    main()
