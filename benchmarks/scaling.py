"""The growth of a training step's time: with the group, the prompt and the completion, beside the tokens in it.

    python -m benchmarks.scaling [--model FOLDER] [--rounds 2]

One prompt per step; completions have exactly the length that is asked for.  Distinct tokens are those of the prompt,
once, and of its completions: what a step has to compute.  Writes the table, and a plot beside the file of results.
"""

import argparse
import gc
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, TrainerCallback

from benchmarks import compare
from benchmarks.programs import Parts, clock, make_trainer, watch_parts

BASE = {"group": 8, "prompt": 64, "completion": 32}
VARIED = {
    "group": (4, 8, 16, 32, 64),
    "prompt": (32, 128, 512, 1024, 2048),
    "completion": (8, 32, 64, 128, 256),
}


@dataclass
class Point:
    varied: str  # which of the sizes
    sizes: dict[str, int]
    replies: list[dict[str, Any]]

    @property
    def distinct(self) -> int:
        return self.sizes["prompt"] + self.sizes["group"] * self.sizes["completion"]

    @property
    def padded(self) -> int:
        """Tokens of a rectangle of whole rows."""
        return self.sizes["group"] * (self.sizes["prompt"] + self.sizes["completion"])

    def median(self, part: str) -> float:
        replies = {
            "gmpo": [{**reply["parts"], "seconds": reply["seconds"]} for reply in self.replies]
        }
        return compare.median(replies, "gmpo", part)


def main() -> None:
    args = compare.model_options(__doc__, rounds=2).parse_args()
    model = compare.model_folder(args)
    points = [
        Point(name, sizes, measured(model, sizes, args))
        for name, values in VARIED.items()
        for sizes in ({**BASE, name: value} for value in values)
    ]
    title = (
        f"Seconds of a step with one prompt: {BASE['group']} completions of {BASE['completion']} tokens, a prompt of "
        f"{BASE['prompt']} tokens, and one of these sizes varied."
    )
    picture = Path(args.results, f"{compare.run_name()}-scaling.png")
    picture.parent.mkdir(parents=True, exist_ok=True)
    plot(points, picture)
    text = (
        f"{compare.table(points, COLUMNS)}\n![step time against distinct tokens]({picture.name})\n"
    )
    compare.report("scaling", title, text, args)


def measured(model: str, sizes: dict[str, int], args: argparse.Namespace) -> list[dict[str, Any]]:
    """Return what the steps of one trainer took, the first ones left out."""
    parts = Parts()
    trainer = make_trainer(
        "gmpo",
        model=model,
        prompts=[prompt_of(model, sizes["prompt"])] * 8,
        reward=parts.timed(
            "reward", lambda completions, **_: [float(n) for n in range(len(completions))]
        ),
        options={
            "num_generations": sizes["group"],
            "per_device_train_batch_size": sizes["group"],
            "max_completion_length": sizes["completion"],
            "generation_kwargs": {"min_new_tokens": sizes["completion"]},
            "max_steps": args.warmup + args.rounds,
            "gradient_accumulation_steps": 1,
            "bf16": args.bf16,
            "gradient_checkpointing": args.gradient_checkpointing,
        },
    )
    watch_parts(trainer, "gmpo", parts)
    clocked = Clocked(parts)
    trainer.add_callback(clocked)
    compare.undisturbed(trainer.train, os.getpid(), tries=1)
    del trainer
    gc.collect()
    return clocked.replies[args.warmup :]


def prompt_of(model: str, tokens: int) -> str:
    """Return a text of exactly so many tokens."""
    tokenizer: Any = AutoTokenizer.from_pretrained(model)
    ids = tokenizer(" and then it went on" * tokens)["input_ids"][:tokens]
    text = tokenizer.decode(ids)
    assert len(tokenizer(text)["input_ids"]) == tokens
    return text


class Clocked(TrainerCallback):
    """Writes down what each step took."""

    def __init__(self, parts: Parts):
        self.parts, self.start, self.replies = parts, 0.0, []

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.parts.watch(kwargs["optimizer"], "step", "optimizer")
        self.start = clock()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        taken = clock() - self.start
        self.replies.append({"seconds": taken, "parts": self.parts.drain(taken)})
        self.start = clock()


def plot(points: list[Point], path: Path) -> None:
    """Plot seconds against distinct tokens, one line per varied size."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5))
    for name in VARIED:
        line = sorted(
            (point.distinct, point.median("seconds")) for point in points if point.varied == name
        )
        axes.plot(
            *zip(*line, strict=True),
            marker="o",
            label=f"{name} {VARIED[name][0]}-{VARIED[name][-1]}",
        )
    axes.set(
        xlabel="distinct tokens of a step",
        ylabel="seconds of a step",
        xlim=(0, None),
        ylim=(0, None),
    )
    axes.legend()
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


COLUMNS = {
    "varied": lambda point: point.varied,
    "completions": lambda point: str(point.sizes["group"]),
    "prompt tokens": lambda point: str(point.sizes["prompt"]),
    "tokens of a completion": lambda point: str(point.sizes["completion"]),
    "distinct tokens": lambda point: str(point.distinct),
    "tokens if padded": lambda point: str(point.padded),
    "step, s": lambda point: f"{point.median('seconds'):.3g}",
    "generate, s": lambda point: f"{point.median('generate'):.3g}",
    "learn, s": lambda point: f"{point.median('learn'):.3g}",
    "learn, ms per distinct token": lambda point: (
        f"{1e3 * point.median('learn') / point.distinct:.2f}"
    ),
}

if __name__ == "__main__":
    main()
