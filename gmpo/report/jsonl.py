"""metrics.jsonl: one line per log, readable while the run goes on and after it crashed."""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

FILE_NAME = "metrics.jsonl"
CLOSING = "train_runtime"  # only in the line that closes a run


class JsonlCallback(TrainerCallback):
    """Appends every log to `output_dir/metrics.jsonl`, on the first rank.

    A line is an object with `step` (optimizer steps done) and the logged names; figures that are
    not finite are null.  A run that resumes from step k drops the lines after k, and the closing
    line, so that nothing is there twice.
    """

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Drop the lines of steps that are made again."""
        path = Path(str(args.output_dir), FILE_NAME)
        if state.is_world_process_zero and path.exists():
            drop_lines_after(path, state.global_step)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Add a line."""
        if not state.is_world_process_zero or not logs:
            return
        path = Path(str(args.output_dir), FILE_NAME)
        path.parent.mkdir(parents=True, exist_ok=True)
        line = {"step": state.global_step}
        line |= {name: as_json(value) for name, value in logs.items()}
        append_line(path, json.dumps(line))


def append_line(path: Path, line: str) -> None:
    """Add `line` to `path`; what a crash cut short before it stays a separate line."""
    with path.open("ab+") as file:
        if file.tell() > 0:
            file.seek(-1, os.SEEK_END)
            if file.read() != b"\n":
                file.write(b"\n")
        file.write(line.encode() + b"\n")


def as_json(value: Any) -> str | int | float | bool | None:
    """Return `value` as JSON can hold it.

    Numbers that are not finite become None, tensors of one number a number.
    """
    if hasattr(value, "item"):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if isinstance(value, str | int | float | bool | None) else str(value)


def drop_lines_after(path: Path, step: int) -> None:
    """Keep the lines of `path` up to `step`, without a closing one; the file is replaced whole.

    A line that a crash cut short goes too.
    """
    kept = []
    for record in read_records(path):
        if record["step"] <= step and CLOSING not in record:
            kept.append(json.dumps(record) + "\n")

    fresh = path.with_name(path.name + ".tmp")
    fresh.write_text("".join(kept), encoding="utf-8")
    os.replace(fresh, path)


def read_records(path: str | Path) -> list[dict[str, Any]]:
    """Return the whole lines of a metrics file, in order, without one that a crash cut short.

    Raises:
        FileNotFoundError: If there is no such file.
    """
    records = []
    for line in Path(path).read_text(encoding="utf-8").splitlines():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(record, dict) and "step" in record:
            records.append(record)
    return records
