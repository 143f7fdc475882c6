"""The learner alone, forward and backward of one batch, of gmpo and of the peer in turn.

    python -m benchmarks.loss [--model FOLDER] [--rounds 5]

Both sides get the same rows: a group of 8 completions of one prompt.  The table's last column shows that they compute
the same: how far the norms of their gradients are apart.
"""

import argparse
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoConfig

from benchmarks import compare


@dataclass
class Case:
    prompt: int  # tokens
    lengths: tuple[int, ...]  # tokens of each completion
    replies: compare.Replies


CASES = (
    (50, (6, 18, 25, 30, 33, 38, 42, 48)),
    (512, (8, 24, 34, 40, 44, 50, 56, 64)),
    (1, (48,) * 8),  # nothing to share, nothing to pad
)


def main() -> None:
    args = compare.parser(__doc__).parse_args()
    model = compare.model_folder(args)
    rows = [Case(prompt, lengths, measured(model, prompt, lengths, args)) for prompt, lengths in CASES]
    title = "Forward and backward of a group of 8 completions"
    compare.report("loss", title, compare.table(rows, COLUMNS), results=args.results)


def measured(model: str, prompt: int, lengths: tuple[int, ...], args: argparse.Namespace) -> compare.Replies:
    """Both sides on random tokens of the given sizes."""
    vocabulary = AutoConfig.from_pretrained(model).get_text_config().vocab_size
    generator = torch.Generator().manual_seed(0)
    size = torch.tensor(lengths)
    within = torch.arange(max(lengths)) < size[:, None]
    with tempfile.TemporaryDirectory() as folder:
        batch = str(Path(folder, "batch.safetensors"))
        rows = {
            "prompt": torch.randint(10, vocabulary, (prompt,), generator=generator),
            "completions": torch.randint(10, vocabulary, within.shape, generator=generator).where(within, 0),
            "lengths": size,
            "advantages": torch.randn(len(lengths), generator=generator),
        }
        save_file(rows, batch)
        return compare.alternate(
            "benchmarks.programs:learner",
            rounds=args.rounds,
            warmup=args.warmup,
            model=model,
            batch=batch,
            options={
                "num_generations": len(lengths),
                "per_device_train_batch_size": len(lengths),
                "max_completion_length": max(lengths),
                "bf16": args.bf16,
                "gradient_checkpointing": args.gradient_checkpointing,
            },
        )


def completions(case: Case) -> str:
    low, high = min(case.lengths), max(case.lengths)
    return str(low) if low == high else f"{low}-{high}, mean {sum(case.lengths) / len(case.lengths):.0f}"


def apart(case: Case) -> str:
    """Relative distance of the two gradient norms."""
    if "peer" not in case.replies:
        return "-"
    ours, theirs = (compare.median(case.replies, side, "gradient_norm") for side in ("gmpo", "peer"))
    return f"{abs(ours / theirs - 1):.1e}"


COLUMNS = {
    "prompt tokens": lambda case: str(case.prompt),
    "completion tokens": completions,
    "gmpo, s": lambda case: compare.seconds(case.replies, "gmpo"),
    "peer, s": lambda case: compare.seconds(case.replies, "peer"),
    "peer / gmpo": lambda case: compare.ratio(case.replies),
    "peak memory: gmpo, GB": lambda case: compare.gigabytes(case.replies, "gmpo"),
    "peer, GB": lambda case: compare.gigabytes(case.replies, "peer"),
    "gradient norms apart": apart,
}

if __name__ == "__main__":
    main()
