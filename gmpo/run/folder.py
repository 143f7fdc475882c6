"""The folder of a run: who it belongs to, which checkpoint a resume takes, what moves aside.

out/
  gmpo_run.json     the run's id
  checkpoint-4/     whole checkpoints of this run
  metrics.jsonl, completions/
  _earlier_1/       the files of an earlier run, and of steps that a rewound run left behind
  _unfinished/      a checkpoint that is being written
  _lock             held while a process trains in the folder
"""

import contextlib
import json
import os
import platform
import re
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

from transformers.utils import logging

from gmpo.run.checkpoint import (
    DamagedCheckpoint,
    State,
    check_whole,
    delete_checkpoint,
    move_into_place,
    read_manifest,
)

logger = logging.get_logger(__name__)

RUN = "gmpo_run.json"
UNFINISHED = "_unfinished"
LOGS = ("metrics.jsonl", "completions")
MODEL_FILES = (  # what a finished run saves beside its checkpoints
    "model*.safetensors*",
    "pytorch_model*.bin*",
    "adapter_*",
    "*config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "chat_template.*",
    "training_args.bin",
    "trainer_state.json",
    "*_results.json",
    "README.md",
    "training_curves.png",
)


class FolderInUse(RuntimeError):
    """Another process trains in the folder."""

    tells_what_to_do = True  # the command line shows it without a traceback


class RunFolder:
    """The output folder of a training."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).absolute()

    @property
    def run(self) -> str | None:
        """The id of the run that the folder belongs to; None if it belongs to none yet."""
        try:
            return json.loads((self.path / RUN).read_text(encoding="utf-8"))["id"]
        except (OSError, ValueError, KeyError, TypeError):
            return None

    @property
    def unfinished(self) -> Path:
        """Where checkpoints are written before they are whole."""
        return self.path / UNFINISHED

    def checkpoint(self, step: int) -> Path:
        return self.path / f"checkpoint-{step}"

    def steps(self) -> list[int]:
        """Return the steps of all folders that are named like a checkpoint, in rising order."""
        matches = [re.fullmatch(r"checkpoint-(\d+)", path.name) for path in self.path.glob("*/")]
        return sorted(int(match[1]) for match in matches if match)

    def has_whole(self, step: int) -> bool:
        """Return whether this run's checkpoint of `step` is there, written to its end."""
        try:
            return read_manifest(self.checkpoint(step))["run"] == self.run
        except DamagedCheckpoint:
            return False

    # -- beginning and resuming ------------------------------------------------------------------

    def begin(self) -> str:
        """Make room for a new run and return its id; the files of an earlier one move aside."""
        self.recover()
        belongs_to_a_run = (self.path / RUN).exists()
        traces = [self.checkpoint(step) for step in self.steps()]
        if belongs_to_a_run or traces or self._has_logged_steps():
            traces += [self.path / name for name in (*LOGS, RUN)]
            if belongs_to_a_run:
                for pattern in MODEL_FILES:
                    traces += self.path.glob(pattern)
            self._move_aside(traces, "the files of an earlier run")
        return self._own(uuid.uuid4().hex)

    def resume(self, checkpoint: str | os.PathLike[str], manifest: State) -> str:
        """Make room for a run that goes on from `checkpoint`, and return its id.

        A checkpoint of another folder begins a new run here.  Later checkpoints move aside: they
        belong to steps that are made again.
        """
        checkpoint = Path(checkpoint).absolute()
        if checkpoint.parent != self.path:
            return self.begin()
        step = manifest["step"]
        later = [self.checkpoint(other) for other in self.steps() if other > step]
        if later:
            folder = self._move_aside(later, f"checkpoints after step {step}")
            if (self.path / LOGS[0]).exists():
                shutil.copy2(self.path / LOGS[0], folder / LOGS[0])
        return self._own(manifest["run"])

    def newest_whole(self) -> tuple[str, State]:
        """Return the newest checkpoint of this run that is whole, and its manifest.

        Raises:
            ValueError: If there is none.
        """
        self.recover()
        run, passed_over = self.run, []
        for step in reversed(self.steps()):
            folder = self.checkpoint(step)
            try:
                manifest = check_whole(folder)
            except DamagedCheckpoint as error:
                passed_over.append(str(error))
                continue
            if run is not None and manifest["run"] != run:
                passed_over.append(f"{str(folder)!r} belongs to another run.")
                continue
            if passed_over:
                logger.warning(f"{' '.join(passed_over)} The training goes on from {folder}.")
            return str(folder), manifest

        why = f" {' '.join(passed_over)}" if passed_over else ""
        raise ValueError(
            f"resume_from_checkpoint=True, but {str(self.path)!r} holds no whole checkpoint.{why} "
            "Train without it, or name a folder."
        )

    def named(self, checkpoint: str | os.PathLike[str]) -> tuple[str, State]:
        """Return a checkpoint that was asked for by name, and its manifest.

        Raises:
            ValueError: If it is no whole checkpoint; the message names another one that is.
        """
        if not Path(checkpoint).is_dir():
            raise ValueError(
                f"resume_from_checkpoint={str(checkpoint)!r} is not a folder. Give a checkpoint's "
                "folder, or True for the newest whole one in output_dir."
            )
        try:
            return str(checkpoint), check_whole(Path(checkpoint))
        except DamagedCheckpoint as error:
            other = RunFolder(Path(checkpoint).absolute().parent).last_word()
            if other:
                error.add_note(other)
            raise

    def last_word(self) -> str | None:
        """Return a sentence that names the newest whole checkpoint of this run, if there is one."""
        for step in reversed(self.steps()):
            with contextlib.suppress(DamagedCheckpoint):
                manifest = check_whole(self.checkpoint(step))
                if self.run in (None, manifest["run"]):
                    return (
                        f"What was learned in {step} steps is in {self.checkpoint(step)}; "
                        "train(resume_from_checkpoint=True) goes on."
                    )
        return None

    # -- saving ----------------------------------------------------------------------------------

    def keep_newest(self, limit: int | None, *, best: str | None) -> None:
        """Delete the oldest whole checkpoints until `limit` are left, never `best` nor the newest.

        Folders that are not whole don't count: they would push out the ones that are.
        """
        if limit is None or limit <= 0:
            return
        whole = [step for step in self.steps() if self.has_whole(step)]
        kept = {self.checkpoint(step) for step in whole[-1:]}
        if best is not None:
            kept.add(Path(best).absolute())

        surplus = len(whole) - max(limit, len(kept))
        for step in whole:
            if surplus > 0 and self.checkpoint(step) not in kept:
                delete_checkpoint(self.checkpoint(step))
                surplus -= 1

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other processes from training in this folder; the lock ends with this process.

        Raises:
            RuntimeError: If another process holds it.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        handle = os.open(self.path / "_lock", os.O_RDWR | os.O_CREAT, 0o644)
        try:
            _lock(handle, self.path)
            yield
        finally:
            os.close(handle)

    def _has_logged_steps(self) -> bool:
        """Return whether an earlier training wrote logs here; an evaluation does not count."""
        completions = self.path / "completions"
        if any(not path.stem.endswith("_000000") for path in completions.glob("*.parquet")):
            return True
        try:
            lines = (self.path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        except OSError:
            return False
        return any(not line.startswith('{"step": 0,') for line in lines)

    def _own(self, run: str) -> str:
        self.path.mkdir(parents=True, exist_ok=True)
        fresh = self.path / (RUN + ".tmp")
        fresh.write_text(json.dumps({"id": run}) + "\n", encoding="utf-8")
        os.replace(fresh, self.path / RUN)
        return run

    def _move_aside(self, paths: list[Path], what: str) -> Path:
        number = 1
        while (self.path / f"_earlier_{number}").exists():
            number += 1
        folder = self.path / f"_earlier_{number}"
        folder.mkdir()
        for path in paths:
            if path.exists():
                path.rename(folder / path.name)
        logger.warning(f"Moved {what} to {folder}.")
        return folder

    def recover(self) -> None:
        """Delete what a crash left unfinished; a checkpoint that lacks only its name gets it."""
        for folder in self.unfinished.glob("checkpoint-*"):
            with contextlib.suppress(DamagedCheckpoint, OSError):
                check_whole(folder)
                if not (self.path / folder.name).exists():
                    move_into_place(folder, self.path / folder.name)
        shutil.rmtree(self.unfinished, ignore_errors=True)


def refuse_folder_of_model(model: object, output_dir: str) -> None:
    """Raise a ValueError if a run in `output_dir` would overwrite or move its own model."""
    if not isinstance(model, str) or not os.path.isdir(model):
        return
    model_folder, folder = Path(model).resolve(), Path(output_dir).resolve()
    if model_folder == folder or folder in model_folder.parents:
        raise ValueError(
            f"output_dir={output_dir!r} holds the model {model!r}, which the new run would "
            "overwrite or move aside. Choose another output_dir."
        )


def _lock(handle: int, folder: Path) -> None:
    try:
        import fcntl
    except ImportError:  # Windows
        return
    try:
        # Unlike flock's, this lock does not pass to forked children, which may outlive the run.
        fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        holder = os.pread(handle, 200, 0).decode(errors="replace").split()
        who = f" (process {holder[1]} on {holder[0]})" if len(holder) == 2 else ""
        raise FolderInUse(
            f"Another process{who} trains in {str(folder)!r}. Choose another output_dir, or wait "
            "for its end."
        ) from None
    os.truncate(handle, 0)
    os.pwrite(handle, f"{platform.node()} {os.getpid()}\n".encode(), 0)
