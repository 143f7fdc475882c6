"""Rows to train on, from the hub, a file or a generator of tasks, in the form that the trainer takes."""

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError

from gmpo.reward.reasoning_gym import PREFIX, task_rows

READERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}


def load_rows(
    spec: str,
    *,
    split: str = "train",
    kwargs: Mapping[str, Any] | None = None,
    prompt_column: str = "prompt",
    system_prompt: str | None = None,
    as_messages: bool = False,
) -> Any:
    """The rows that `spec` names, with a column `prompt`; other columns stay and go to the rewards.

    Args:
        spec: "reasoning_gym:TASK", a .jsonl, .json, .parquet or .csv file, or a dataset on the hub.
        split: Of a hub dataset; may be a slice ("train[:100]"), also of a file.
        kwargs: Further keywords of `datasets.load_dataset`, or the settings of the task.
        prompt_column: Becomes `prompt`.
        system_prompt: Put before each prompt: a message, or text and an empty line.
        as_messages: Text prompts become a user's message.

    Raises:
        FileNotFoundError: If the file is not there.
        ValueError: If there is no such task, column or split, or the dataset can't be loaded.
        ImportError: If reasoning_gym is needed and not installed.
    """
    rows = load_raw(spec, split=split, kwargs=dict(kwargs or {}))
    rows = with_prompt_column(rows, prompt_column, spec)
    if not as_messages and system_prompt is None:
        return rows
    settings = {"system_prompt": system_prompt, "as_messages": as_messages}
    return rows.map(shaped_prompt, fn_kwargs=settings)


def load_raw(spec: str, *, split: str, kwargs: dict[str, Any]) -> Any:
    """The rows as they are."""
    if spec.startswith(PREFIX):
        return datasets.Dataset.from_list(task_rows(spec.removeprefix(PREFIX), kwargs))
    if Path(spec).suffix.lower() in READERS:
        return load_file(spec, split=split, kwargs=kwargs)
    try:
        return datasets.load_dataset(spec, split=split, **kwargs)
    except (DatasetNotFoundError, ConnectionError, FileNotFoundError) as error:
        raise ValueError(
            f"There is no dataset {spec!r} on the hub or in a folder here ({error}). A file must end in "
            f"{', '.join(READERS)}; a task is {PREFIX}NAME."
        ) from None


def load_file(path: str, *, split: str, kwargs: dict[str, Any]) -> Any:
    """The rows of one file, whatever the split is called; a slice of it ("train[:100]") is taken."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"There is no file {path!r}.")
    if not Path(path).stat().st_size:
        raise ValueError(f"{path} is empty: there is nothing to train on.")
    reader, files = READERS[Path(path).suffix.lower()], {split.partition("[")[0]: path}
    try:
        return datasets.load_dataset(reader, data_files=files, split=split, **kwargs)
    except DatasetGenerationError as error:
        raise ValueError(f"{path} can't be read as {reader}: {error.__cause__ or error}") from None


def with_prompt_column(rows: Any, column: str, spec: str) -> Any:
    """`rows` with `column` under the name `prompt`."""
    names: Sequence[str] = rows.column_names or list(next(iter(rows)))
    if column not in names:
        close = difflib.get_close_matches(column, names, n=1) or [
            name for name in ("question", "problem") if name in names
        ]
        hint = f" Did you mean --prompt_column {close[0]}?" if close else ""
        raise ValueError(f"{spec!r} has no column {column!r}, but {', '.join(names)}.{hint}")
    if column == "prompt":
        return rows
    return (rows.remove_columns("prompt") if "prompt" in names else rows).rename_column(
        column, "prompt"
    )


def shaped_prompt(
    row: dict[str, Any], *, system_prompt: str | None, as_messages: bool
) -> dict[str, Any]:
    """The prompt of `row` with its system prompt, as messages if asked for.  A system message of its own is kept."""
    prompt = row["prompt"]
    if isinstance(prompt, str) and not as_messages:
        return {"prompt": prompt if system_prompt is None else f"{system_prompt}\n\n{prompt}"}
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
    if system_prompt is not None and (not messages or messages[0]["role"] != "system"):
        messages = [{"role": "system", "content": system_prompt}, *messages]
    return {"prompt": messages}


def count_shared_prompts(rows: Any, others: Any) -> int:
    """How many prompts of `rows` are in `others` too."""
    known = {repr(prompt) for prompt in others["prompt"]}
    return sum(repr(prompt) in known for prompt in rows["prompt"])
