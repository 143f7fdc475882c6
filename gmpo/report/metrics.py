"""The figures of micro-batches and collections, as one number each per log, exact over all of them.

Nothing is reduced while training goes on: figures pile up as sums, counts, minima and maxima on the
rank that saw them, and `Metrics.reduce` puts the ranks together once per log.
"""

import math
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
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
    """Figures since the last log, of training and of evaluation apart."""

    def __init__(self) -> None:
        self._pending: dict[str, Statistics] = {}

    def add(self, statistics: Statistics, *, mode: Mode = "train") -> None:
        """Count `statistics`: numbers or scalar tensors on any device, not read before the log."""
        self._pending.setdefault(mode, Statistics()).update(widened(statistics))

    def reduce(self, *, mode: Mode = "train", prefix: str | None = None) -> dict[str, float]:
        """Return all figures since the last call, over all ranks, by name.  Every rank must call.

        A mean is sum / count, so micro-batches and ranks weigh by what they counted.  Means of
        nothing (count 0) and extremes of nothing (a minimum of +inf, a maximum of -inf) are left
        out.

        Args:
            prefix: Put before each name, with an underscore (the Trainer's `metric_key_prefix`).
                None puts nothing before the names of training, and "eval" before those of
                evaluation.
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
        """Return the names that some rank has.

        A rank may lack one: it had no row of a source, or counted no token.
        """
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

        figures = {name: total / count for name, (total, count) in means if count != 0}
        for kind, values, of_nothing in (
            ("minima", lowest, math.inf),
            ("maxima", highest, -math.inf),
        ):
            for name, value in zip(names[kind], values, strict=True):
                if value != of_nothing:
                    figures[name] = value
        return figures


def packed(values: list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64, device=collective_device())


def widened(statistics: Statistics) -> Statistics:
    """Return `statistics` without gradients and in float64, so that a long sum stays exact."""

    def wide(value: float | Tensor) -> Tensor:
        if not isinstance(value, Tensor):
            return torch.tensor(value, dtype=torch.float64)
        return value.detach() if value.device.type == "mps" else value.detach().double()

    return Statistics(
        means={
            name: (wide(total), wide(count)) for name, (total, count) in statistics.means.items()
        },
        minima={name: wide(value) for name, value in statistics.minima.items()},
        maxima={name: wide(value) for name, value in statistics.maxima.items()},
    )


def plain(statistics: Statistics) -> dict[str, dict[str, Any]]:
    """Return `statistics` as numbers; waits for the device."""
    return {
        "means": {
            name: [float(total), float(count)] for name, (total, count) in statistics.means.items()
        },
        "minima": {name: float(value) for name, value in statistics.minima.items()},
        "maxima": {name: float(value) for name, value in statistics.maxima.items()},
    }


def sorted_union(*names: Iterable[str]) -> list[str]:
    return sorted(set().union(*names))


class Stopwatch:
    """The seconds of an optimizer step by part, and the tokens that each part handles.

    `timed` blocks may be nested: a part's seconds are those that no inner block claims, so that the
    parts and "other" add up to the wall time.
    """

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}
        self._tokens: dict[str, float] = {}
        self._inner = [0.0]  # seconds claimed by finished blocks, one entry per open block
        self._since = time.perf_counter()

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Count the block's time as `name`.

        On CUDA it waits for the block's kernels, which would count elsewhere otherwise.

        Args:
            name: "generate", "reward", "old_logps", "learn", "publish" or another.
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

    def count_tokens(self, name: str, tokens: float) -> None:
        """Count `tokens` of this rank as handled by the part `name`."""
        self._tokens[name] = self._tokens.get(name, 0.0) + tokens

    def restart(self) -> None:
        """Forget what was counted; time runs from here (at the start of training)."""
        self._seconds, self._tokens, self._inner = {}, {}, [0.0] * len(self._inner)
        self._since = time.perf_counter()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Count nothing of the block: an evaluation is no part of a training step."""
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
        """Return what was counted since the last call, and start again at 0.

        These are `step_time` and its parts `time/{part}` and `time/other` (seconds per optimizer
        step, mean over ranks), `tokens_per_second/{part}` (tokens of all ranks over the seconds of
        one) and `memory/peak_gib` (the fullest rank so far).  Not to be called inside a `timed`
        block.

        Args:
            steps: Optimizer steps since the last call.
        """
        wall = time.perf_counter() - self._since
        seconds = {**self._seconds, "other": wall - sum(self._seconds.values())}
        tokens = {name: count for name, count in self._tokens.items() if count}
        self.restart()

        statistics = Statistics(means={"step_time": (wall, steps)})
        for name, spent in seconds.items():
            statistics.means[f"time/{name}"] = (spent, steps)
        for name, count in tokens.items():
            rate = (count * world_size(), seconds[name])
            statistics.means[f"tokens_per_second/{name}"] = rate
        statistics.maxima["memory/peak_gib"] = peak_memory() / 2**30
        return statistics


def peak_memory() -> int:
    """Return the most bytes held at once so far.

    They are those allocated on the GPU where there is one, else those resident in main memory.
    """
    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    if sys.platform == "win32":
        memory = psutil.Process().memory_info()
        return memory.peak_wset  # pyright: ignore[reportAttributeAccessIssue] (Windows only)

    import resource  # POSIX only

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # bytes on macOS, KiB elsewhere


def rollout_statistics(rollouts: Sequence[Rollout]) -> Statistics:
    """Return the lengths in tokens that the policy wrote, and the share that the budget cut off.

    "Terminated" completions ended by themselves, by an end token or a stop string.
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
