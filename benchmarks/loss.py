"""The learner alone, forward and backward, of gmpo and of the peer in turn.

    python -m benchmarks.loss [--model FOLDER] [--rounds 5]

First table: one group of 8 completions, the same rows on both sides.  Its last column shows that they compute the same:
how far the norms of their gradients are apart.

Second table: a collection of 8 groups of which every other one has equal rewards, hence no signal, learned by gmpo
without and with these groups.
"""

import argparse
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoConfig

from benchmarks import compare
from benchmarks.compare import Side


@dataclass
class Case:
    prompt: int  # tokens
    lengths: tuple[int, ...]  # tokens of each completion
    replies: compare.Replies


USUAL = (6, 18, 25, 30, 33, 38, 42, 48)
CASES = (
    (50, USUAL),
    (512, (8, 24, 34, 40, 44, 50, 56, 64)),
    (1, (48,) * 8),  # nothing to share, nothing to pad
)
GROUPS = 8  # of the second table
IN_A_MICRO_BATCH = 2


def main() -> None:
    parser = compare.model_options(__doc__)
    parser.add_argument(
        "--prompt-tokens", type=int, nargs="+", choices=[prompt for prompt, _ in CASES]
    )
    args = parser.parse_args()
    model = compare.model_folder(args)
    cases = [case for case in CASES if args.prompt_tokens is None or case[0] in args.prompt_tokens]
    rows = [Case(prompt, lengths, group(model, prompt, lengths, args)) for prompt, lengths in cases]
    skipping = without_signal(model, args)
    text = (
        f"{compare.table(rows, COLUMNS)}\nA collection of {GROUPS} groups, prompts of 50 tokens, completions of "
        f"{USUAL[0]}-{USUAL[-1]}; every other group has no signal:\n\n{compare.table([skipping], SKIPPING)}"
    )
    compare.report("loss", "Forward and backward of a group of 8 completions.", text, args)


def group(
    model: str, prompt: int, lengths: tuple[int, ...], args: argparse.Namespace
) -> compare.Replies:
    """Both sides on one group of random tokens of the given sizes."""
    with tempfile.TemporaryDirectory() as folder:
        batch = str(Path(folder, "batch.safetensors"))
        save_file(random_rows(model, 1, prompt, lengths), batch)
        sides = compare.both(model=model, batch=batch, options=options(args, lengths))
        return compare.alternate(
            "benchmarks.programs:learner", sides, rounds=args.rounds, warmup=args.warmup
        )


def without_signal(model: str, args: argparse.Namespace) -> compare.Replies:
    """Time gmpo's training steps on a collection with half of its advantages 0, for both values of zero_signal_groups."""
    with tempfile.TemporaryDirectory() as folder:
        batch = str(Path(folder, "batch.safetensors"))
        rows = random_rows(model, GROUPS, 50, USUAL)
        rows["advantages"].view(GROUPS, -1)[::2] = 0.0
        save_file(rows, batch)
        common = {"model": model, "batch": batch, "rows": IN_A_MICRO_BATCH * len(USUAL)}
        sides = {
            choice: Side(
                sys.executable,
                {**common, "options": {**options(args, USUAL), "zero_signal_groups": choice}},
            )
            for choice in ("skip", "keep")
        }
        return compare.alternate(
            "benchmarks.programs:collection", sides, rounds=args.rounds, warmup=args.warmup
        )


def options(args: argparse.Namespace, lengths: tuple[int, ...]) -> dict[str, Any]:
    return {
        "num_generations": len(lengths),
        "per_device_train_batch_size": len(lengths),
        "max_completion_length": max(lengths),
        "bf16": args.bf16,
        "gradient_checkpointing": args.gradient_checkpointing,
    }


def random_rows(
    model: str, groups: int, prompt: int, lengths: tuple[int, ...]
) -> dict[str, torch.Tensor]:
    vocabulary = AutoConfig.from_pretrained(model).get_text_config().vocab_size
    generator = torch.Generator().manual_seed(0)
    size = torch.tensor(lengths * groups)
    within = torch.arange(max(lengths)) < size[:, None]
    return {
        "prompts": torch.randint(10, vocabulary, (groups, prompt), generator=generator),
        "completions": torch.randint(10, vocabulary, within.shape, generator=generator).where(
            within, 0
        ),
        "lengths": size,
        "advantages": torch.randn(len(size), generator=generator),
    }


def completions(case: Case) -> str:
    low, high = min(case.lengths), max(case.lengths)
    return (
        str(low)
        if low == high
        else f"{low}-{high}, mean {sum(case.lengths) / len(case.lengths):.0f}"
    )


def apart(replies: compare.Replies, one: str, other: str) -> str:
    """Relative distance of two gradient norms."""
    if one not in replies or other not in replies:
        return "-"
    norms = [compare.median(replies, side, "gradient_norm") for side in (one, other)]
    return f"{abs(norms[0] / norms[1] - 1):.1e}"


COLUMNS = {
    "prompt tokens": lambda case: str(case.prompt),
    "completion tokens": completions,
    "gmpo, s": lambda case: compare.seconds(case.replies, "gmpo"),
    "peer, s": lambda case: compare.seconds(case.replies, "peer"),
    "peer / gmpo": lambda case: compare.ratio(case.replies),
    "peak memory: gmpo, GB": lambda case: compare.gigabytes(case.replies, "gmpo"),
    "peer, GB": lambda case: compare.gigabytes(case.replies, "peer"),
    "gradient norms apart": lambda case: apart(case.replies, "gmpo", "peer"),
}
SKIPPING = {
    "skipped, s": lambda replies: compare.seconds(replies, "skip"),
    "kept, s": lambda replies: compare.seconds(replies, "keep"),
    "kept / skipped": lambda replies: compare.ratio(replies, over="keep", under="skip"),
    "gradient norms apart": lambda replies: apart(replies, "skip", "keep"),
}

if __name__ == "__main__":
    main()
