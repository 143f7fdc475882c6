"""The vocabulary head alone: log-probs and entropies of N tokens, forward and backward, of gmpo and the peer in turn.

    python -m benchmarks.head [--rows 4096] [--hidden 1024] [--vocabulary 151936] [--completion 200] [--rounds 3]

`gmpo` computes logits once, in tiles of whole completions; `two passes` is what gmpo does for rows that are too long
for a tile: it computes the logits of a tile again in the backward pass.  `peer` is its own chunked head, called as its
trainer calls it.  Memory is what a pass needs above its inputs, the weights and their gradients.
"""

from benchmarks import compare
from benchmarks.compare import Side

WAYS = ("gmpo", "two passes")


def main() -> None:
    options = compare.options(__doc__, rounds=3)
    options.add_argument("--rows", type=int, default=4096)
    options.add_argument("--hidden", type=int, default=1024)
    options.add_argument("--vocabulary", type=int, default=151_936)
    options.add_argument("--completion", type=int, default=200, help="tokens of a completion")
    args = options.parse_args()
    sizes = {name: getattr(args, name) for name in ("rows", "hidden", "vocabulary", "completion")}
    sides = compare.both(**sizes)
    sides = {
        "gmpo": sides["gmpo"],
        "two passes": Side(sides["gmpo"].python, {"side": "two passes", **sizes}),
    } | sides
    replies = compare.alternate(
        "benchmarks.programs:head", sides, rounds=args.rounds, warmup=args.warmup
    )
    columns = {
        "way": lambda side: side,
        "seconds": lambda side: compare.seconds(replies, side),
        "times gmpo": lambda side: compare.ratio(replies, over=side),
        "memory above, MB": lambda side: (
            f"{max(reply['extra_bytes'] for reply in replies[side]) / 1e6:.0f}"
        ),
        "norm of the weight's gradient": lambda side: (
            f"{compare.median(replies, side, 'gradient_norm'):.6g}"
        ),
    }
    title = f"{args.rows} tokens, hidden states of {args.hidden}, a vocabulary of {args.vocabulary}, float32."
    compare.report("head", title, compare.table(list(replies), columns), args)


if __name__ == "__main__":
    main()
