"""From the figures of micro-batches and collections to one logged number each, exact over all since the last log.

Nothing is reduced while training goes on: figures pile up as sums, counts, minima and maxima on the rank that saw them,
and `Metrics.reduce` puts the ranks together once per log.
"""

import math
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import psutil
import torch
from torch import Tensor

from gmpo.distributed import all_gather_objects, all_reduce, collective_device, world_size
from gmpo.types import Rollout, Statistics

Mode = Literal["train", "eval"]
KINDS = ("means", "minima", "maxima")


class Metrics:
    """What has been counted since the last log, for training and for evaluation apart."""

    def __init__(self):
        self._pending: dict[str, Statistics] = {}

    def add(self, statistics: Statistics, *, mode: Mode = "train") -> None:
        """Count `statistics`.  Values may be numbers or scalar tensors on any device; none is read before the log."""
        self._pending.setdefault(mode, Statistics()).update(widened(statistics))

    def reduce(self, *, mode: Mode = "train", prefix: str | None = None) -> dict[str, float]:
        """All figures since the last call, over all ranks, by name; then nothing is pending.  Every rank must call.

        A mean is sum / count, so micro-batches and ranks weigh by what they counted.  Means of nothing (count 0) and
        extremes of nothing (a minimum of +inf, a maximum of -inf) are left out.

        Args:
            prefix: Put before each name, with an underscore (the Trainer's `metric_key_prefix`); None: no prefix in
                training, "eval" in evaluation.
        """
        local = plain(self._pending.pop(mode, Statistics()))
        names = (
            {kind: sorted_union(local[kind]) for kind in KINDS}
            if world_size() == 1
            else self._shared_names(local)
        )
        figures = self._reduced(local, names)
        prefix = prefix or ("" if mode == "train" else "eval")
        return {
            f"{prefix}_{name}" if prefix else name: value for name, value in sorted(figures.items())
        }

    def state_dict(self) -> dict[str, Any]:
        """Return what is pending on this rank: {mode: {"means": {name: [sum, count]}, ...}}.

        The figures are scalar tensors, so nothing waits for the device.
        """
        return {
            mode: {
                "means": {name: list(sums) for name, sums in statistics.means.items()},
                "minima": dict(statistics.minima),
                "maxima": dict(statistics.maxima),
            }
            for mode, statistics in self._pending.items()
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` returned."""
        self._pending = {
            mode: Statistics(
                means={name: (total, count) for name, (total, count) in kinds["means"].items()},
                minima=dict(kinds["minima"]),
                maxima=dict(kinds["maxima"]),
            )
            for mode, kinds in state.items()
        }

    @staticmethod
    def _shared_names(local: dict[str, dict[str, Any]]) -> dict[str, list[str]]:
        """A rank may lack names that another one has (no row of a source, no counted token): agree on the union."""
        everywhere = all_gather_objects({kind: list(local[kind]) for kind in KINDS})
        return {kind: sorted_union(*(names[kind] for names in everywhere)) for kind in KINDS}

    @staticmethod
    def _reduced(local: dict[str, dict[str, Any]], names: dict[str, list[str]]) -> dict[str, float]:
        sums = packed(
            [part for name in names["means"] for part in local["means"].get(name, (0.0, 0.0))]
        )
        lowest = packed([local["minima"].get(name, math.inf) for name in names["minima"]])
        highest = packed([local["maxima"].get(name, -math.inf) for name in names["maxima"]])
        totals = all_reduce(sums).view(-1, 2).tolist() if names["means"] else []
        lowest = all_reduce(lowest, "min").tolist() if names["minima"] else []
        highest = all_reduce(highest, "max").tolist() if names["maxima"] else []
        means = zip(names["means"], totals, strict=True)
        return {
            **{name: total / count for name, (total, count) in means if count != 0},
            **{
                name: value
                for name, value in zip(names["minima"], lowest, strict=True)
                if value != math.inf
            },
            **{
                name: value
                for name, value in zip(names["maxima"], highest, strict=True)
                if value != -math.inf
            },
        }


def packed(values: list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64, device=collective_device())


def widened(statistics: Statistics) -> Statistics:
    """`statistics` without gradients and in float64 (where the device has it), so that a long sum stays exact."""

    def wide(value: Any) -> Any:
        value = (
            value.detach()
            if isinstance(value, Tensor)
            else torch.tensor(value, dtype=torch.float64)
        )
        return value if value.device.type == "mps" else value.double()

    return Statistics(
        means={
            name: (wide(total), wide(count)) for name, (total, count) in statistics.means.items()
        },
        minima={name: wide(value) for name, value in statistics.minima.items()},
        maxima={name: wide(value) for name, value in statistics.maxima.items()},
    )


def plain(statistics: Statistics) -> dict[str, dict[str, Any]]:
    """`statistics` as numbers; waits for the device."""
    return {
        "means": {
            name: [float(total), float(count)] for name, (total, count) in statistics.means.items()
        },
        "minima": {name: float(value) for name, value in statistics.minima.items()},
        "maxima": {name: float(value) for name, value in statistics.maxima.items()},
    }


def sorted_union(*names: Any) -> list[str]:
    return sorted(set().union(*names))


class Stopwatch:
    """Where the seconds of an optimizer step go, and how many tokens each part handles.

    `timed` blocks may be nested: a part's seconds are those that no inner block claims, so that the parts and "other"
    add up to the wall time.
    """

    def __init__(self):
        self._seconds: dict[str, float] = {}
        self._tokens: dict[str, float] = {}
        self._inner = [0.0]  # seconds claimed by finished blocks, one entry per open block
        self._since = time.perf_counter()

    @contextmanager
    def timed(self, name: str, *, tokens: float = 0) -> Iterator[None]:
        """Count the block's time as `name`.  On CUDA it waits for the block's kernels, or they would count elsewhere.

        Args:
            name: "generate", "reward", "old_logps", "learn", "publish" or another.
            tokens: What the block handles, if it is known before; `count_tokens` adds to it later.
        """
        start = time.perf_counter()
        self._inner.append(0.0)
        try:
            yield
        finally:
            if torch.cuda.is_initialized():
                torch.cuda.synchronize()
            elapsed = time.perf_counter() - start
            own = elapsed - self._inner.pop()
            self._inner[-1] += elapsed
            self._seconds[name] = self._seconds.get(name, 0.0) + own
            self.count_tokens(name, tokens)

    def count_tokens(self, name: str, tokens: float) -> None:
        """Say that the part `name` has handled `tokens` more of this rank's tokens."""
        self._tokens[name] = self._tokens.get(name, 0.0) + tokens

    def restart(self) -> None:
        """Forget what was counted; time starts to run now (at the start of training)."""
        self._seconds, self._tokens, self._inner = {}, {}, [0.0] * len(self._inner)
        self._since = time.perf_counter()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Count nothing of the block, not even what is timed inside: an evaluation is no part of a training step."""
        kept, start = (self._seconds, self._tokens, self._inner), time.perf_counter()
        self._seconds, self._tokens, self._inner = {}, {}, [0.0]
        try:
            yield
        finally:
            elapsed = time.perf_counter() - start
            self._seconds, self._tokens, self._inner = kept
            self._inner[-1] += elapsed
            self._since += elapsed

    def drain(self, *, steps: int) -> Statistics:
        """What was counted since the last call; counting starts anew.  Not to be called inside a `timed` block.

        Gives `step_time`, and how it divides into `time/{part}` and `time/other` (seconds per optimizer step, mean over
        ranks), `tokens_per_second/{part}` (tokens of all ranks over the seconds of one) and `memory/peak_gib` (the
        fullest rank so far).

        Args:
            steps: Optimizer steps since the last call.
        """
        wall = time.perf_counter() - self._since
        seconds = {**self._seconds, "other": wall - sum(self._seconds.values())}
        tokens = {name: count for name, count in self._tokens.items() if count}
        self.restart()
        return Statistics(
            means={
                "step_time": (wall, steps),
                **{f"time/{name}": (spent, steps) for name, spent in seconds.items()},
                **{
                    f"tokens_per_second/{name}": (n * world_size(), seconds[name])
                    for name, n in tokens.items()
                },
            },
            maxima={"memory/peak_gib": peak_memory() / 2**30},
        )


def peak_memory() -> int:
    """Return the most bytes held at once so far.

    They are those allocated on the GPU where there is one, else those resident in main memory.
    """
    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    if sys.platform == "win32":
        return psutil.Process().memory_info().peak_wset  # pyright: ignore[reportAttributeAccessIssue] (Windows only)

    import resource  # POSIX only

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # bytes on macOS, KiB elsewhere


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
