"""The completions and their scores: parquet files, a table on the console, tables for the trackers.

A report that can't be written is a warning, never the end of a run.
"""

import random
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import TrainerCallback
from transformers.utils import logging

from gmpo.distributed import all_gather_objects, rank
from gmpo.report.parquet import as_column, as_text, write_parquet
from gmpo.report.settings import ReportSettings
from gmpo.report.tables import TRACKERS, print_table
from gmpo.types import Messages

logger = logging.get_logger(__name__)

FOLDER = "completions"
OWN_COLUMNS = ("step", "mode", "prompt", "completion", "advantage")


@dataclass(slots=True)
class CompletionRecords:
    """Completions of one collection with their scores, in plain values: N of each."""

    prompts: list[str | Messages]
    completions: list[str | Messages]
    rewards: dict[str, list[float | None]]  # by source; NaN or None: not scored
    advantages: list[float]
    extras: dict[str, list[Any]] = field(default_factory=dict)  # further columns, of any type

    def records(self) -> list[dict[str, Any]]:
        """Return one dict of plain values per completion.

        A source or extra that is named like one of our columns gets a prefix.
        """
        columns = {
            "prompt": [as_text(prompt) for prompt in self.prompts],
            "completion": [as_text(completion) for completion in self.completions],
            **{
                own_name(name, "reward"): [as_score(v) for v in values]
                for name, values in self.rewards.items()
            },
            **{
                own_name(name, "extra", taken=self.rewards): as_column(values)
                for name, values in self.extras.items()
            },
            "advantage": [as_score(value) for value in self.advantages],
        }
        return [
            dict(zip(columns, values, strict=True))
            for values in zip(*columns.values(), strict=True)
        ]


class CompletionLog:
    """Keeps the completions since the last log, then writes and shows them.

    Args:
        output_dir: Gets `completions/{mode}_{step:06d}.parquet`: one row per completion, of all
            ranks, with `step` (optimizer steps done when it was sampled), `mode`, `prompt` and
            `completion` (text, or messages as JSON), one column per reward source, one per extra,
            and `advantage`.
        trackers: Names of the trackers that are on (`report_to`).
        callbacks: Gives the Trainer's callbacks, among which tensorboard's holds the open writer.
        seed: Of the draw of completions to print.
    """

    def __init__(
        self,
        settings: ReportSettings,
        output_dir: str,
        *,
        trackers: Sequence[str] = (),
        callbacks: Callable[[], Sequence[TrainerCallback]] = list,
        seed: int = 0,
    ):
        self.settings, self.trackers, self.callbacks = settings, trackers, callbacks
        self.folder = Path(output_dir, FOLDER)
        self._draw = random.Random(seed)
        self._pending: dict[str, list[dict[str, Any]]] = {}
        self._uploads: Any = None

    def begin(self, step: int) -> None:
        """Make way for a run that goes on from `step`: it writes the files of later steps again."""
        if rank() == 0 and self.folder.exists() and self.settings.log_completions:
            with warn_on_error(f"tidy up {self.folder}"):
                for file in self.folder.glob("*_*.parquet"):
                    if step_of(file) > step:
                        file.unlink()

    def reset(self) -> None:
        """Forget completions that were not written."""
        self._pending = {}

    def add(self, scored: CompletionRecords, *, step: int, mode: str = "train") -> None:
        """Keep completions of this rank, sampled after `step` optimizer steps, for `write`."""
        if self.settings.log_completions:
            with warn_on_error("keep the completions for the log"):
                rows = [{"step": step, "mode": mode, **record} for record in scored.records()]
                self._pending.setdefault(mode, []).extend(rows)

    def write(self, *, step: int, mode: str = "train", label: str | None = None) -> None:
        """Write and show what was added for `mode` since the last call.  Every rank must call.

        Args:
            label: Names the file and the tables where there are several evaluation sets
                ("eval_math"); None takes `mode`.
        """
        if not self.settings.log_completions:
            return
        rows = [row for part in all_gather_objects(self._pending.pop(mode, [])) for row in part]
        if rank() != 0 or not rows:
            return
        label = label or mode
        with warn_on_error("write the completions"), self._hub_lock():
            write_parquet(rows, self.folder / f"{label}_{step:06d}.parquet")
        with warn_on_error("print the completions"):
            self._print(rows, title=f"{label}, step {step}")
        shown = first_of_each_prompt(rows) if self.settings.log_unique_prompts else rows
        for name in TRACKERS.keys() & set(self.trackers):
            with warn_on_error(f"send the completions to {name}"):
                TRACKERS[name](shown, step, label, self.callbacks())

    def close(self) -> None:
        """Send what the hub has not got yet."""
        if self._uploads is not None:
            with warn_on_error(
                f"upload the completions to {self.settings.log_completions_hub_repo}"
            ):
                self._uploads.trigger().result()
                self._uploads.stop()
            self._uploads = None

    def state_dict(self) -> dict[str, Any]:
        """Return the rows of this rank that are not written yet, and the draw of those to print."""
        return {
            "pending": {mode: list(rows) for mode, rows in self._pending.items()},
            "draw": self._draw.getstate(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` returned."""
        self._pending = {mode: list(rows) for mode, rows in state["pending"].items()}
        version, numbers, rest = state["draw"]
        self._draw.setstate((version, tuple(numbers), rest))

    def _hub_lock(self) -> AbstractContextManager[Any]:
        """Return a lock to hold while a file is written, so that the hub never gets half of one."""
        repo = self.settings.log_completions_hub_repo
        if repo is not None and self._uploads is None:
            with warn_on_error(f"upload the completions to {repo}"):
                from huggingface_hub import CommitScheduler

                self._uploads = CommitScheduler(
                    repo_id=repo,
                    repo_type="dataset",
                    folder_path=self.folder,
                    every=2,
                    allow_patterns=["*.parquet"],
                )
        return nullcontext() if self._uploads is None else self._uploads.lock

    def _print(self, rows: list[dict[str, Any]], *, title: str) -> None:
        count = self.settings.num_completions_to_print
        if count is not None:
            drawn = self._draw.sample(range(len(rows)), min(max(count, 0), len(rows)))
            rows = [rows[index] for index in sorted(drawn)]
        if rows:
            print_table(rows, title=title)


@contextmanager
def warn_on_error(what: str) -> Iterator[None]:
    """Turn a failure within the block into a warning."""
    try:
        yield
    except Exception as error:
        logger.warning(f"Could not {what}: {type(error).__name__}: {error}. The training goes on.")


def as_score(value: float | None) -> float | None:
    """Return a number, or None where nothing was scored."""
    return None if value is None or value != value else float(value)


def own_name(name: str, kind: str, *, taken: Collection[str] = ()) -> str:
    """Return a column's name, with its kind before it if the name is `taken` or one of ours."""
    return f"{kind}/{name}" if name in OWN_COLUMNS or name in taken else name


def step_of(file: Path) -> int:
    return int(file.stem.rpartition("_")[2])


def first_of_each_prompt(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return list({row["prompt"]: row for row in reversed(rows)}.values())[::-1]
