"""The run on the terminal: one line per log, and on a live terminal a bar with the time left."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

LINES_PER_HEADER = 25


@dataclass(frozen=True, slots=True)
class Column:
    """A column of the log: heading, width in characters, and the cell of logged figures."""

    heading: str
    width: int
    cell: Callable[[Mapping[str, Any]], str]


def number(name: str, form: str) -> Callable[[Mapping[str, Any]], str]:
    """Return a cell that shows the figure `name`, or a dash where it is not logged."""
    return lambda figures: form.format(figures[name]) if name in figures else "-"


def pair(low: str, high: str, form: str, between: str) -> Callable[[Mapping[str, Any]], str]:
    """Return a cell that shows two figures."""
    low_cell, high_cell = number(low, form), number(high, form)
    return lambda figures: f"{low_cell(figures)}{between}{high_cell(figures)}"


COLUMNS = (
    Column("reward", 7, number("reward", "{:.3f}")),
    Column("length", 7, number("completions/mean_length", "{:.1f}")),
    Column("cut off", 7, number("completions/clipped_ratio", "{:.0%}")),
    Column("entropy", 7, number("entropy", "{:.3f}")),
    Column("log-ratio", 15, pair("log_ratio/min", "log_ratio/max", "{:.2f}", " .. ")),
    Column("clipped -/+", 13, pair("clip_ratio/low_mean", "clip_ratio/high_mean", "{:.1%}", " / ")),
    Column("grad", 6, number("grad_norm", "{:.2f}")),
    Column("tok/s", 7, number("tokens/s", "{:,.0f}")),
)
# Left out first where the terminal is narrow.
LESS_NEEDED = ("grad", "cut off", "tok/s", "clipped -/+", "length")


class ProgressLines(TrainerCallback):
    """Prints one line per log, and the header again every 25 lines.

    On a terminal a bar with the time left stays below.  It takes the place of the Trainer's own bar
    and printer, which have to be removed.

    Args:
        bar: Show the bar.
        console: A rich console; None: standard output.
        clock: Seconds that only grow.
    """

    def __init__(
        self,
        *,
        bar: bool = True,
        console: "Console | None" = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        from rich.console import Console

        self.console = console or Console(soft_wrap=True, highlight=False)
        self.clock = clock
        self._shows_bar = bar and self.console.is_terminal
        self._bar: Progress | None = None
        self._columns = fitting(self.console.width) if self.console.is_terminal else COLUMNS
        self._lines = 0
        self._start = (0, 0.0)  # step and time at the start of this run
        self._last_tokens: tuple[float, float] | None = None  # tokens and time at the last log

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        self._start = (state.global_step, self.clock())
        self._last_tokens = None
        if state.is_world_process_zero and self._shows_bar:
            self._bar = progress_bar(self.console)
            self._bar.add_task("training", total=state.max_steps, completed=state.global_step)
            self._bar.start()

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=state.global_step)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if not state.is_world_process_zero or not logs:
            return
        if "loss" in logs:
            figures = {**logs, **self._tokens_per_second(logs)}
            self._print(f"{state.global_step}/{state.max_steps}", figures, self._left(state))
        self._leave_out_evaluation(logs)
        for prefix in evaluations(logs):
            self._print(
                prefix, {name.removeprefix(f"{prefix}_"): value for name, value in logs.items()}, ""
            )

    def on_train_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
        if state.is_world_process_zero:
            self.console.print(
                f"{state.global_step} steps in {duration(self.clock() - self._start[1])}."
            )

    def _print(self, name: str, figures: Mapping[str, Any], left: str) -> None:
        if self._lines % LINES_PER_HEADER == 0:
            headings = "  ".join(column.heading.rjust(column.width) for column in self._columns)
            self.console.print(f"{'step':<12}{headings}  {'left':>8}".rstrip())
        self._lines += 1
        cells = "  ".join(column.cell(figures).rjust(column.width) for column in self._columns)
        self.console.print(f"{name:<12}{cells}  {left:>8}".rstrip(), markup=False)

    def _tokens_per_second(self, logs: Mapping[str, Any]) -> dict[str, float]:
        """Return the tokens of prompts and completions per second since the last log."""
        if "num_tokens" not in logs:
            return {}
        tokens, now = logs["num_tokens"], self.clock()
        before, self._last_tokens = self._last_tokens, (tokens, now)
        if before is None:
            return {}
        return {"tokens/s": (tokens - before[0]) / (now - before[1])}

    def _leave_out_evaluation(self, logs: Mapping[str, Any]) -> None:
        """Take the seconds of an evaluation out of the tokens per second."""
        seconds = sum(
            logs[name] for name in logs if name.startswith("eval") and name.endswith("_runtime")
        )
        if self._last_tokens is not None:
            tokens, moment = self._last_tokens
            self._last_tokens = (tokens, moment + seconds)

    def _left(self, state: TrainerState) -> str:
        done = state.global_step - self._start[0]
        if done <= 0:
            return ""
        return duration(
            (self.clock() - self._start[1]) / done * (state.max_steps - state.global_step)
        )


def fitting(width: int) -> tuple[Column, ...]:
    """Return the columns that fit into `width` characters, without the less needed ones."""
    columns = list(COLUMNS)
    for heading in LESS_NEEDED:
        if 12 + sum(column.width + 2 for column in columns) + 8 <= width:
            break
        columns = [column for column in columns if column.heading != heading]
    return tuple(columns)


def progress_bar(console: "Console") -> "Progress":
    from rich import progress

    return progress.Progress(
        progress.TextColumn("training"),
        progress.BarColumn(),
        progress.MofNCompleteColumn(),
        progress.TextColumn("·"),
        progress.TimeElapsedColumn(),
        progress.TextColumn("· left"),
        progress.TimeRemainingColumn(),
        console=console,
        transient=True,
    )


def evaluations(logs: Mapping[str, Any]) -> list[str]:
    """Return the prefixes of the evaluations in `logs`: "eval", "eval_math"."""
    return [
        name.removesuffix("_reward")
        for name in logs
        if name.startswith("eval") and name.endswith("_reward")
    ]


def duration(seconds: float) -> str:
    """Return seconds as `1:02:03`, or `2:03` below an hour."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
