"""What the completions of a collection look like, for the log."""

from collections.abc import Sequence

from gmpo.types import Rollout, Statistics


def rollout_statistics(rollouts: Sequence[Rollout]) -> Statistics:
    """Lengths in tokens that the policy wrote, and the share that the token budget cut off.

    "Terminated" completions are those that ended by themselves, by an end token or a stop string.
    """
    lengths = [len(r.ids) if r.trained is None else sum(r.trained) for r in rollouts]
    terminated = [length for length, r in zip(lengths, rollouts, strict=True) if not r.truncated]
    statistics = Statistics(
        means={"completions/clipped_ratio": (len(lengths) - len(terminated), len(lengths))}
    )
    for kind, values in (("length", lengths), ("terminated_length", terminated)):
        statistics.means[f"completions/mean_{kind}"] = (sum(values), len(values))
        statistics.minima[f"completions/min_{kind}"] = float(min(values, default=float("inf")))
        statistics.maxima[f"completions/max_{kind}"] = float(max(values, default=float("-inf")))
    return statistics
