"""The program of a worker process of `pool.py`: it calls functions, and writes what they answer.

Questions come as pickles on stdin, from the parent only; answers go out as lines of JSON.  Nothing
heavy is imported here, so that a worker starts in a fraction of a second.
"""

import contextlib
import faulthandler
import importlib
import json
import math
import os
import pickle
import signal
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import IO, TYPE_CHECKING, Any

from gmpo.reward.answers import as_number, as_scores
from gmpo.reward.by_name import module_from_file
from gmpo.reward.pool import BEGUN

if TYPE_CHECKING:
    from transformers import TrainerState

_GRACE_S = 10.0  # after the deadline, for a worker whose parent is gone


@dataclass(frozen=True)
class RowReward:
    """A user's function, asked for one completion at a time."""

    name: str
    function: Callable[..., Any]

    def __call__(
        self, keywords: dict[str, Any], remarks: Sequence[str], state: "TrainerState | None" = None
    ) -> dict[str, Any]:
        """Return the score of one row, and what the function logged.

        Args:
            keywords: Lists of one value each.
            remarks: Which of log_extra, log_metric and trainer_state the function takes.
            state: The Trainer's state.
        """
        notes = Notes()
        offered = {
            "log_extra": notes.log_extra,
            "log_metric": notes.log_metric,
            "trainer_state": state,
        }
        own = {name: offered[name] for name in remarks}

        answer = self.function(**keywords, **own)
        (score,) = as_scores(self.name, answer, 1)
        return {
            "score": None if math.isnan(score) else score,
            "extra": notes.extra,
            "metrics": notes.metrics,
        }


@dataclass(slots=True)
class Notes:
    """Remarks that a function logs beside its score."""

    extra: dict[str, Any] = field(default_factory=dict)
    metrics: list[tuple[str, Any]] = field(default_factory=list)

    def log_extra(self, column: str, values: Sequence[Any]) -> None:
        """Keep the one value of a column for the table of completions."""
        values = list(values)
        if len(values) != 1:
            raise ValueError(
                f"log_extra({column!r}, ...) got {len(values)} values for 1 completion: in worker "
                "processes a reward is asked for one completion at a time."
            )
        self.extra[column] = values[0]

    def log_metric(self, name: str, value: object) -> None:
        """Keep a number for the log."""
        number = as_number(value)
        if number is None or math.isinf(number):
            raise ValueError(f"log_metric({name!r}, {value!r}) is not a finite number.")
        self.metrics.append((name, None if math.isnan(number) else number))


def serve() -> None:
    """Answer questions until stdin ends."""
    questions, answers = private_pipes()
    threading.Thread(target=end_with_parent, args=(os.getppid(),), daemon=True).start()
    nowhere = open(os.devnull, "w")  # noqa: SIM115 (open as long as the process lives)
    home = os.getcwd()
    objects: dict[str, Any] = {}

    while True:
        try:
            question = pickle.load(questions)
        except EOFError:
            return
        answers.write(BEGUN)
        answers.flush()

        if question.get("seconds") is not None:
            # Ends an orphan even within C code that holds the interpreter.
            seconds = question["seconds"] + _GRACE_S
            faulthandler.dump_traceback_later(seconds, exit=True, file=nowhere)
        answer = answer_to(question, objects)
        faulthandler.cancel_dump_traceback_later()

        clean_up(home)
        answers.write(json.dumps(answer, default=repr).encode() + b"\n")
        answers.flush()


def answer_to(question: Mapping[str, Any], objects: dict[str, Any]) -> dict[str, Any]:
    """Return what `Outcome` is made of."""
    try:
        if "unpack" in question:
            unpack(question, objects)
            return {}
        arguments = list(pickle.loads(question["arguments"]))
        if question["shared"] is not None:
            arguments.append(objects[question["shared"]])
        return {"value": objects[question["call"]](*arguments)}
    except BaseException as error:  # SystemExit and KeyboardInterrupt are answers too
        return {"error": described(error)}


def unpack(question: Mapping[str, Any], objects: dict[str, Any]) -> None:
    """Keep the object in `question`, and import what it refers to: by name, else by file."""
    for name, file in question["modules"]:
        try:
            importlib.import_module(name)
        except ModuleNotFoundError:
            module_from_file(name, file)
    loaded = pickle.loads(question["blob"])
    prepare = getattr(loaded, "prepare", None)
    if prepare is not None:
        prepare()
    if question.get("instead_of") is not None:
        objects.pop(question["instead_of"], None)
    objects[question["unpack"]] = loaded


def described(error: BaseException) -> str:
    """Return an exception's traceback as text, whatever its own __str__ does."""
    try:
        return "".join(traceback.format_exception(error, limit=-20))[-4000:]
    except Exception:
        return type(error).__name__


def clean_up(home: str) -> None:
    """Undo what a function may have done to its process."""
    if hasattr(signal, "alarm"):
        signal.alarm(0)
    with contextlib.suppress(OSError):
        os.chdir(home)


def private_pipes() -> tuple[IO[bytes], IO[bytes]]:
    """Return our stdin and stdout, which from here on belong to nobody else.

    What functions print goes to stderr, and what they read is empty.
    """
    questions = os.fdopen(os.dup(0), "rb")
    answers = os.fdopen(os.dup(1), "wb")
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.dup2(2, 1)
    return questions, answers


def end_with_parent(parent: int) -> None:
    """End this process and its group once the parent has ended."""
    while os.getppid() == parent:
        time.sleep(1.0)
    if hasattr(os, "killpg"):
        os.killpg(0, signal.SIGKILL)
    os._exit(1)


if __name__ == "__main__":
    # Unpacking imports this file by its name; only the loop runs here.
    importlib.import_module("gmpo.reward.worker").serve()
