"""A whole training step, generate + reward + learn, of gmpo and of the peer in turn.

    python -m benchmarks.step [--model FOLDER] [--rounds 5] [--prompt-tokens 50 330] [--updates 1]

Both sides get the same prompts in the same order, the same options and sampling settings; each samples with its own
random numbers, so the completions' lengths differ, and the table says how many tokens each side wrote.  Rewards are
never all equal: no group is skipped.

The second table tells where the seconds go, and the least that this machine could need for it, see `limits.py`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoTokenizer

from benchmarks import compare, limits
from benchmarks.limits import Limits

GROUP = 8
QUESTION = "A farmer has {a} apples and buys {b} more. How many apples are there now?"
FILLER = "The weather on the farm was {word} on day {day}, and nobody went to the market."
WORDS = ("sunny", "cold", "windy", "rainy", "mild")
PARTS = ("generate", "reward", "old log-probs", "learn", "optimizer", "other")


@dataclass
class Row:
    prompt_tokens: int
    prompts: int  # of a collection
    replies: compare.Replies


def main() -> None:
    options = compare.model_options(__doc__)
    options.add_argument("--prompt-tokens", type=int, nargs="+", default=[50, 330])
    options.add_argument("--completion-tokens", type=int, default=48)
    options.add_argument(
        "--prompts", type=int, default=2, help="of a collection, with 8 completions each"
    )
    options.add_argument("--updates", type=int, default=1, help="optimizer steps of a collection")
    args = options.parse_args()
    model = compare.model_folder(args)
    machine = limits.measured(model, torch.bfloat16 if args.bf16 else torch.float32)
    rows = [Row(size, args.prompts, measured(model, size, args)) for size in args.prompt_tokens]
    updates = "one optimizer step" if args.updates == 1 else f"{args.updates} optimizer steps"
    title = (
        f"A collection of {args.prompts} prompts with {GROUP} completions each of at most {args.completion_tokens} new "
        f"tokens, and {updates}; {'bfloat16 autocast' if args.bf16 else 'float32'}, gradient checkpointing "
        f"{'on' if args.gradient_checkpointing else 'off'}."
    )
    shares = [(row, part) for row in rows for part in PARTS]
    text = (
        f"{compare.table(rows, COLUMNS)}\nWhere the seconds go, and what this machine needs at least:\n\n"
        f"{compare.table(shares, breakdown(machine))}\n{limits.table(machine)}"
    )
    compare.report("step", title, text, args)


def measured(model: str, size: int, args: Any) -> compare.Replies:
    sides = compare.both(
        model=model,
        prompts=prompts_of(model, size, count=64),
        updates=args.updates,
        options={
            "num_generations": GROUP,
            "per_device_train_batch_size": GROUP * args.prompts // args.updates,
            "gradient_accumulation_steps": 1,
            "steps_per_generation": args.updates,
            "max_completion_length": args.completion_tokens,
            "temperature": 1.0,
            "top_p": 1.0,
            "top_k": 0,
            "bf16": args.bf16,
            "gradient_checkpointing": args.gradient_checkpointing,
        },
    )
    return compare.alternate(
        "benchmarks.programs:steps", sides, rounds=args.rounds, warmup=args.warmup
    )


def prompts_of(model: str, size: int, *, count: int) -> list[list[dict[str, str]]]:
    """Return `count` questions of about `size` tokens each in the model's chat template, none longer."""
    tokenizer: Any = AutoTokenizer.from_pretrained(model)

    def messages(number: int, sentences: int) -> list[dict[str, str]]:
        filler = [
            FILLER.format(word=WORDS[(number + day) % len(WORDS)], day=day + 1)
            for day in range(sentences)
        ]
        return [
            {
                "role": "user",
                "content": " ".join([*filler, QUESTION.format(a=10 + number, b=90 - number)]),
            }
        ]

    def length(message: list[dict[str, str]]) -> int:
        return len(tokenizer.apply_chat_template(message, add_generation_prompt=True)["input_ids"])

    sentences = 0
    while length(messages(0, sentences + 1)) <= size:
        sentences += 1
    return [messages(number, sentences) for number in range(count)]


def tokens(row: Row, side: str) -> str:
    return compare.number(row.replies, side, "tokens", per=GROUP * row.prompts)


def part_of(row: Row, side: str, part: str) -> float:
    """Median seconds of a part of a step; NaN for a side that did not run."""
    replies = {side: [{part: reply["parts"].get(part, 0.0)} for reply in row.replies.get(side, [])]}
    return compare.median(replies, side, part) if replies[side] else float("nan")


def least(machine: Limits, row: Row, part: str) -> float | None:
    """Return the seconds that a part needs at least, for the tokens that gmpo wrote."""
    rows = row.prompts * GROUP
    written = compare.median(row.replies, "gmpo", "tokens")
    prompts = row.prompts * row.prompt_tokens
    if part == "generate":
        full = machine.decoding(
            rows
        )  # rows that have finished cost little less: the weights are what is read
        return machine.reading(prompts) + compare.median(row.replies, "gmpo", "longest") * full
    if part == "learn":
        return machine.learning(prompts + written, written)
    return None


def breakdown(machine: Limits) -> dict[str, Callable[[tuple[Row, str]], str]]:
    def cell(row: Row, part: str, side: str) -> str:
        return f"{part_of(row, side, part):.3g}" if side in row.replies else "-"

    def needed(row: Row, part: str) -> str:
        seconds = least(machine, row, part)
        return "-" if seconds is None else f"{seconds:.3g}"

    return {
        "prompt tokens": lambda pair: f"about {pair[0].prompt_tokens}",
        "part": lambda pair: pair[1],
        "gmpo, s": lambda pair: cell(*pair, "gmpo"),
        "peer, s": lambda pair: cell(*pair, "peer"),
        "at least, s": lambda pair: needed(*pair),
    }


COLUMNS = {
    "prompt tokens": lambda row: f"about {row.prompt_tokens}",
    "gmpo, s": lambda row: compare.seconds(row.replies, "gmpo"),
    "peer, s": lambda row: compare.seconds(row.replies, "peer"),
    "peer / gmpo": lambda row: compare.ratio(row.replies),
    "tokens per completion: gmpo": lambda row: tokens(row, "gmpo"),
    "peer": lambda row: tokens(row, "peer"),
    "peak memory: gmpo, GB": lambda row: compare.gigabytes(row.replies, "gmpo"),
    "peer, GB": lambda row: compare.gigabytes(row.replies, "peer"),
    "gmpo / peer": lambda row: compare.peak_share(row.replies),
}

if __name__ == "__main__":
    main()
