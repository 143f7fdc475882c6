"""One whole training step, generate + reward + learn, of gmpo and of the peer in turn.

    python -m benchmarks.step [--model FOLDER] [--rounds 5]

Both sides get the same prompts, options and sampling settings; each samples with random numbers of its own, so the
completions' lengths differ, and the table says how many tokens each side wrote.  Rewards are never all equal: no group
is skipped.
"""

from dataclasses import dataclass
from typing import Any

from transformers import AutoTokenizer

from benchmarks import compare

GROUP = 8
QUESTION = "A farmer has {a} apples and buys {b} more. How many apples are there now?"
FILLER = "The weather on the farm was {word} on day {day}, and nobody went to the market."
WORDS = ("sunny", "cold", "windy", "rainy", "mild")


@dataclass
class Row:
    prompt_tokens: int
    replies: compare.Replies


def main() -> None:
    options = compare.parser(__doc__)
    options.add_argument("--prompt-tokens", type=int, nargs="+", default=[50, 330])
    options.add_argument("--completion-tokens", type=int, default=48)
    args = options.parse_args()
    model = compare.model_folder(args)
    rows = []
    for size in args.prompt_tokens:
        replies = compare.alternate(
            "benchmarks.programs:steps",
            rounds=args.rounds,
            warmup=args.warmup,
            model=model,
            prompts=prompts_of(model, size, count=64),
            options={
                "num_generations": GROUP,
                "per_device_train_batch_size": GROUP,
                "max_completion_length": args.completion_tokens,
                "temperature": 1.0,
                "top_p": 1.0,
                "top_k": 0,
                "bf16": args.bf16,
                "gradient_checkpointing": args.gradient_checkpointing,
            },
        )
        rows.append(Row(size, replies))
    title = f"A training step: {GROUP} completions of one prompt, at most {args.completion_tokens} new tokens"
    compare.report("step", title, compare.table(rows, COLUMNS), results=args.results)


def prompts_of(model: str, size: int, *, count: int) -> list[list[dict[str, str]]]:
    """`count` questions of about `size` tokens each in the model's chat template, none longer."""
    tokenizer: Any = AutoTokenizer.from_pretrained(model)

    def messages(number: int, sentences: int) -> list[dict[str, str]]:
        filler = [FILLER.format(word=WORDS[(number + day) % len(WORDS)], day=day + 1) for day in range(sentences)]
        return [{"role": "user", "content": " ".join([*filler, QUESTION.format(a=10 + number, b=90 - number)])}]

    def length(message: list[dict[str, str]]) -> int:
        return len(tokenizer.apply_chat_template(message, add_generation_prompt=True)["input_ids"])

    sentences = 0
    while length(messages(0, sentences + 1)) <= size:
        sentences += 1
    return [messages(number, sentences) for number in range(count)]


def tokens(row: Row, side: str) -> str:
    return f"{compare.median(row.replies, side, 'tokens') / GROUP:.0f}" if side in row.replies else "-"


def generating(row: Row, side: str) -> str:
    return f"{compare.median(row.replies, side, 'generate'):.3g}" if side in row.replies else "-"


COLUMNS = {
    "prompt tokens": lambda row: f"about {row.prompt_tokens}",
    "gmpo, s": lambda row: compare.seconds(row.replies, "gmpo"),
    "peer, s": lambda row: compare.seconds(row.replies, "peer"),
    "peer / gmpo": lambda row: compare.ratio(row.replies),
    "of it generating: gmpo, s": lambda row: generating(row, "gmpo"),
    "peer, s ": lambda row: generating(row, "peer"),
    "tokens per completion: gmpo": lambda row: tokens(row, "gmpo"),
    "peer": lambda row: tokens(row, "peer"),
    "peak memory: gmpo, GB": lambda row: compare.gigabytes(row.replies, "gmpo"),
    "peer, GB": lambda row: compare.gigabytes(row.replies, "peer"),
}

if __name__ == "__main__":
    main()
