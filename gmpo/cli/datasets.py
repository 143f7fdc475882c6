"""Rows to train on, as the trainer takes them: from the hub, files, folders or tasks."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError

from gmpo.option import advice
from gmpo.reward.reasoning_gym import PREFIX, task_rows

READERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}
COMPRESSIONS = (".gz", ".zst", ".xz", ".bz2")
_SLICE = re.compile(r"([\w.-]+)(?:\[(-?\d+)?(%)?:(-?\d+)?(%)?\])?")


def load_rows(
    spec: str | Sequence[str],
    *,
    split: str = "train",
    kwargs: Mapping[str, Any] | None = None,
    prompt_column: str = "prompt",
    system_prompt: str | None = None,
    as_messages: bool = False,
) -> Any:
    """Return the rows that `spec` names, with a column `prompt`; others stay and go to the rewards.

    Args:
        spec: "reasoning_gym:TASK", one or more .jsonl, .json, .parquet or .csv files, a folder that
            save_to_disk wrote, or a dataset on the hub.
        split: Of a dataset with splits; may be a slice ("train[:100]"), also of a file.
        kwargs: Further keywords of `datasets.load_dataset`, or the settings of the task.
        prompt_column: Becomes `prompt`.
        system_prompt: Put before each prompt: a message, or text and an empty line.
        as_messages: Text prompts become a user's message.

    Raises:
        FileNotFoundError: If a file is not there.
        ValueError: If there is no such task, column or split, or the dataset can't be loaded.
        ImportError: If reasoning_gym is needed and not installed.
    """
    rows = load_raw(spec, split=split, kwargs=dict(kwargs or {}))
    rows = with_prompt_column(rows, prompt_column, spec)
    check_prompts(rows, spec)
    if not as_messages and system_prompt is None:
        return rows
    settings = {"system_prompt": system_prompt, "as_messages": as_messages}
    return rows.map(shaped_prompt, fn_kwargs=settings)


def load_raw(spec: str | Sequence[str], *, split: str, kwargs: dict[str, Any]) -> Any:
    """Return the rows as they are."""
    if not isinstance(spec, str):
        return load_files(spec, split=split, kwargs=kwargs)
    if spec.startswith(PREFIX):
        return datasets.Dataset.from_list(task_rows(spec.removeprefix(PREFIX), kwargs))
    if reader_of(spec) is not None:
        return load_files([spec], split=split, kwargs=kwargs)
    if was_saved_to_disk(Path(spec)):
        return load_saved(spec, split=split)

    try:
        return datasets.load_dataset(spec, split=split, **kwargs)
    except (DatasetNotFoundError, ConnectionError, FileNotFoundError) as error:
        raise ValueError(
            f"There is no dataset {spec!r} on the hub or in a folder here ({error}). A file must "
            f"end in {', '.join(READERS)}; a task is {PREFIX}NAME."
        ) from None


def reader_of(path: str) -> str | None:
    """Return the reader of a file, by its name's ending; None if there is none."""
    suffixes = [suffix.lower() for suffix in Path(path).suffixes]
    if suffixes and suffixes[-1] in COMPRESSIONS:
        suffixes.pop()
    return READERS.get(suffixes[-1]) if suffixes else None


def load_files(paths: Sequence[str], *, split: str, kwargs: dict[str, Any]) -> Any:
    """Return the rows of files, whatever the split is called; a slice ("train[:100]") is taken."""
    for path in paths:
        if not Path(path).is_file():
            raise FileNotFoundError(f"There is no file {path!r}.")
        if not Path(path).stat().st_size:
            raise ValueError(f"{path} is empty: there is nothing to train on.")

    readers = {reader_of(path) for path in paths}
    if len(readers) != 1 or None in readers:
        raise ValueError(
            f"The files {', '.join(paths)} are not of one kind. Give files that all end in one of "
            f"{', '.join(READERS)}."
        )
    (reader,) = readers
    assert reader is not None
    files = {split.partition("[")[0]: list(paths)}
    try:
        return datasets.load_dataset(reader, data_files=files, split=split, **kwargs)
    except DatasetGenerationError as error:
        raise ValueError(
            f"{', '.join(paths)} can't be read as {reader}: {error.__cause__ or error}"
        ) from None


def was_saved_to_disk(folder: Path) -> bool:
    """Return True for a folder that `save_to_disk` wrote."""
    dataset = (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file()
    return dataset or (folder / "dataset_dict.json").is_file()


def load_saved(folder: str, *, split: str) -> Any:
    """Return the rows of a folder that `save_to_disk` wrote, or a slice of them."""
    match = _SLICE.fullmatch(split)
    if match is None:
        raise ValueError(f"The split {split!r} is not a name, or a name with a slice: train[:100].")

    rows: Any = datasets.load_from_disk(folder)
    if isinstance(rows, datasets.DatasetDict):
        if match[1] not in rows:
            raise ValueError(
                f"{folder!r} has no split {match[1]!r}; its splits are: "
                f"{', '.join(map(str, rows))}."
            )
        rows = rows[match[1]]

    start, stop = (
        None if bound is None else int(bound) * (len(rows) if percent else 100) // 100
        for bound, percent in ((match[2], match[3]), (match[4], match[5]))
    )
    return rows.select(range(*slice(start, stop).indices(len(rows))))


def with_prompt_column(rows: Any, column: str, spec: str | Sequence[str]) -> Any:
    """Return `rows` with `column` under the name `prompt`."""
    names: Sequence[str] = rows.column_names or list(next(iter(rows)))
    if column not in names:
        usual = [name for name in ("question", "problem") if name in names]
        hint = advice(column, names, prefix="--prompt_column ")
        if not hint and usual:
            hint = f" Did you mean '--prompt_column {usual[0]}'?"
        raise ValueError(
            f"{spec!r} has no column {column!r}; its columns are: {', '.join(names)}.{hint}"
        )
    if column == "prompt":
        return rows
    others = rows.remove_columns("prompt") if "prompt" in names else rows
    return others.rename_column(column, "prompt")


def check_prompts(rows: Any, spec: str | Sequence[str]) -> None:
    """Raise a ValueError for the first prompt that is neither text nor messages."""
    if not hasattr(rows, "__len__"):
        return  # a stream is checked as it is read
    try:
        prompts = list(rows["prompt"])
    except UnicodeDecodeError as error:
        raise ValueError(f"{spec!r} is not text in UTF-8: {error}. Convert the file.") from None
    for number, prompt in enumerate(prompts):
        if not isinstance(prompt, str | list):
            raise ValueError(
                f"Row {number} of {spec!r} has the prompt {prompt!r} ({type(prompt).__name__}). A "
                "prompt is text, or a list of messages. Leave such rows out."
            )


def shaped_prompt(
    row: dict[str, Any], *, system_prompt: str | None, as_messages: bool
) -> dict[str, Any]:
    """Return the prompt of `row` with its system prompt, as messages if asked for.

    A system message that the prompt has is kept.
    """
    prompt = row["prompt"]
    if isinstance(prompt, str) and not as_messages:
        return {"prompt": prompt if system_prompt is None else f"{system_prompt}\n\n{prompt}"}

    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
    if system_prompt is not None and (not messages or messages[0]["role"] != "system"):
        messages = [{"role": "system", "content": system_prompt}, *messages]
    return {"prompt": messages}


def count_shared_prompts(rows: Any, others: Any) -> int:
    """Return how many prompts of `rows` are in `others` too."""
    known = {repr(prompt) for prompt in others["prompt"]}
    return sum(repr(prompt) in known for prompt in rows["prompt"])
