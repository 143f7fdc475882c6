"""Sampled completions as a table: on the console, and in each tracker that is on."""

import json
import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

if TYPE_CHECKING:
    from rich.console import Console

Rows = Sequence[dict[str, Any]]
SHORT_COLUMNS = ("step", "mode")  # in the title of a printed table


def print_table(rows: Rows, *, title: str, console: "Console | None" = None) -> None:
    """Print `rows` for people: messages as a dialogue, numbers with two decimals."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    names = dict.fromkeys(name for row in rows for name in row)
    columns = [name for name in names if name not in SHORT_COLUMNS]

    table = Table(title=title, show_lines=True, expand=True, title_justify="left")
    for name in columns:
        number = any(isinstance(row.get(name), float) for row in rows)
        table.add_column(
            name, justify="right" if number else "left", no_wrap=number, ratio=None if number else 1
        )
    for row in rows:
        # As Text: completions are no markup.
        table.add_row(*(Text(readable(row.get(name))) for name in columns))
    (console or Console()).print(table)


def readable(value: object) -> str:
    """Return a cell for people."""
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.2f}"
    text = str(value)
    return dialogue(text) if text.startswith('[{"') else text


def dialogue(text: str) -> str:
    """Return messages in JSON as `role: content` lines, any other text as it is."""
    try:
        messages = json.loads(text)
        return "\n".join(message_text(message) for message in messages)
    except (ValueError, KeyError, AttributeError):
        return text


def message_text(message: dict[str, Any]) -> str:
    """Return a message as one line: who, what, and which tools are called."""
    content = message.get("content") or ""
    content = content if isinstance(content, str) else json.dumps(content, ensure_ascii=False)
    calls = "".join(
        f" -> {json.dumps(call, ensure_ascii=False)}" for call in message.get("tool_calls") or ()
    )
    return f"{message['role']}: {content}{calls}"


def to_wandb(rows: Rows, step: int, label: str, callbacks: Sequence[TrainerCallback]) -> None:
    import wandb  # pyright: ignore[reportMissingImports] (optional; the user's choice)

    if wandb.run is not None:
        columns = list(rows[0])
        table = wandb.Table(
            columns=columns, data=[[row.get(name) for name in columns] for row in rows]
        )
        wandb.log({table_name(label): table, "train/global_step": step})


def to_trackio(rows: Rows, step: int, label: str, callbacks: Sequence[TrainerCallback]) -> None:
    import pandas
    import trackio

    trackio.log({table_name(label): trackio.Table(dataframe=pandas.DataFrame(list(rows)))})


def to_tensorboard(rows: Rows, step: int, label: str, callbacks: Sequence[TrainerCallback]) -> None:
    for callback in callbacks:
        writer = getattr(callback, "tb_writer", None)
        if writer is not None:
            writer.add_text(table_name(label), markdown(rows), step)


def set_tensorboard_folder(callbacks: Sequence[TrainerCallback], folder: str | None) -> None:
    """Set the folder that tensorboard's callback writes to; None leaves it to the callback."""
    for callback in callbacks:
        if folder is not None and type(callback).__name__ == "TensorBoardCallback":
            callback.__dict__["logging_dir"] = os.path.expanduser(folder)


def markdown(rows: Rows) -> str:
    """Return `rows` as a markdown table."""
    columns = list(rows[0])
    cells = [
        [readable(row.get(name)).replace("|", "\\|").replace("\n", "<br>") for name in columns]
        for row in rows
    ]
    lines = [columns, ["---"] * len(columns), *cells]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def table_name(label: str) -> str:
    return "completions" if label == "train" else f"{label}_completions"


TRACKERS: dict[str, Callable[[Rows, int, str, Sequence[TrainerCallback]], None]] = {
    "wandb": to_wandb,
    "trackio": to_trackio,
    "tensorboard": to_tensorboard,
}
