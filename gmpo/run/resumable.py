"""A `transformers.Trainer` whose runs survive crashes, damage and signals, and resume to the bit.

|<------------------- step N+1 ------------------->|
collect, add gradients | optimizer.step, callbacks | log, evaluate, save
^ the state of step N is kept: an error here goes   ^ the state of step N+1
  back to it and saves it     ^ between these two nothing is saved: the weights are of no whole step
"""

import contextlib
import itertools
import os
import random
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy
import torch
from torch import nn
from transformers import (
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_utils import TrainOutput

from gmpo import distributed
from gmpo.config import GRPOConfig
from gmpo.data.sampler import Rows
from gmpo.distributed import raise_on_all_ranks
from gmpo.run.checkpoint import State, finish_checkpoint, load_state, move_into_place, save_state
from gmpo.run.folder import RunFolder
from gmpo.run.resume_options import apply_to_optimizer, check_resumed, facts_of, hyperparameters
from gmpo.run.signals import SignalWatch, StopRequest, say, stopped_by
from gmpo.stages import Stages

SHARED = "gmpo_state"  # the same on all ranks; each rank has its own file beside it


@dataclass(slots=True)
class LastStep:
    """Copies of what later steps change, as it was after a whole optimizer step."""

    step: int
    random: State
    parts: dict[str, State]  # of this rank
    num_input_tokens_seen: int
    current_flos: float


class RunningLoss:
    """The loss that the Trainer has summed up since the last log, and the time of the run."""

    def __init__(self, trainer: "ResumableTrainer") -> None:
        self.trainer = trainer
        self.seconds_before = 0.0  # of earlier processes
        self.since = time.time()

    def state_dict(self) -> State:
        """Return this rank's sums."""
        trainer = self.trainer
        return {
            "loss": trainer._tr_loss.clone(),
            "total": trainer._total_loss_scalar,
            "last_logged": trainer._globalstep_last_logged,
            "seconds": self.seconds_before + time.time() - self.since,
        }

    def load_state_dict(self, state: State) -> None:
        """Go on from these sums, so that the closing figures are the whole run's."""
        trainer = self.trainer
        trainer._tr_loss = torch.as_tensor(
            state["loss"], dtype=torch.float32, device=trainer.args.device
        ).clone()
        trainer._total_loss_scalar = state["total"]
        trainer._globalstep_last_logged = state["last_logged"]
        trainer._initial_global_step = 0
        self.seconds_before, self.since = state["seconds"], time.time()


class ResumableTrainer(Trainer):
    """Carries the life of a run: begin, save, stop, resume.

    `stages` holds what there is to save.
    """

    args: GRPOConfig
    stages: Stages

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.stop_signals = SignalWatch()
        self.running_loss = RunningLoss(self)
        self.folder = RunFolder(str(self.args.output_dir))
        self._last_step: LastStep | None = None
        self._checkpoint: str | None = None  # that this training goes on from
        self._is_random_state_restored = False
        self._is_saving_to: Path | None = None
        self._has_failed_to_save = False
        self._facts: State = {}

    # -- a run's life ----------------------------------------------------------------------------

    def train(
        self,
        resume_from_checkpoint: str | os.PathLike[str] | bool | None = None,
        trial: object = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> TrainOutput:
        """Train.  Whatever ends it on the way, the last whole step is left as a checkpoint.

        Args:
            resume_from_checkpoint: A checkpoint's folder, or True for the newest whole one of the
                run in `output_dir`.
            trial: A hyper-parameter search's trial, or its parameters.
            ignore_keys_for_eval: As in `transformers.Trainer.train`.

        Raises:
            ValueError: If the checkpoint is damaged, or options were changed that can't be.
            SystemExit: After SIGTERM, SIGINT and SIGHUP; for SIGINT it is a KeyboardInterrupt too.
        """
        if resume_from_checkpoint is None:
            resume_from_checkpoint = self.args.resume_from_checkpoint
        self.folder = RunFolder(self._get_output_dir(trial))
        self._last_step, self._has_failed_to_save = None, False
        self.stages.reset()

        with self.stop_signals.watching(), contextlib.ExitStack() as stack:
            with raise_on_all_ranks("lock output_dir"):
                if self.args.should_save:
                    stack.enter_context(self.folder.locked())
            self._begin(resume_from_checkpoint)
            try:
                output = super().train(self._checkpoint, trial, ignore_keys_for_eval)
                if self.stop_signals.noted is not None:  # while the run was closed
                    raise stopped_by(self.stop_signals.noted)
                return output
            except (Exception, KeyboardInterrupt, SystemExit, StopRequest) as error:
                ending = error if self.stop_signals.noted is None else self._as_stop(error)
                self._save_last_step(ending)
                if ending is error:
                    raise
                raise ending from error

    def _as_stop(self, error: BaseException) -> SystemExit:
        """Return the exception of the signal that was noted, in the place of what it led to."""
        if isinstance(error, SystemExit):
            return error
        if isinstance(error, Exception):  # a worker process may have got the signal too
            say(distributed.repr_of(error))
        stop = stopped_by(cast(int, self.stop_signals.noted))
        if distributed.is_raised_on_all_ranks(error):
            stop.raised_on_all_ranks = True  # pyright: ignore[reportAttributeAccessIssue] (a mark)
        return stop

    def _begin(self, resume: str | os.PathLike[str] | bool | None) -> None:
        """Choose the checkpoint to go on from, and make room.  Every rank must call."""
        self._facts = facts_of(self.args, self.stages.policy(), self.train_dataset)
        self._checkpoint, run = None, ""
        with raise_on_all_ranks("choose a checkpoint"):
            if distributed.rank() == 0 and resume:
                found = self.folder.newest_whole() if resume is True else self.folder.named(resume)
                self._checkpoint, manifest = found
                check_resumed(manifest, self._facts, self._checkpoint)
                run = self.folder.resume(self._checkpoint, manifest)
            elif distributed.rank() == 0:
                run = self.folder.begin()
        self._checkpoint, run = distributed.all_gather_objects((self._checkpoint, run))[0]
        self._facts["run"] = run
        self._is_random_state_restored = self._checkpoint is None

    def keep_state(self) -> None:
        """Keep what later steps change, after a whole optimizer step."""
        self._last_step = LastStep(
            step=self.state.global_step,
            random=random_state(),
            parts={name: part.state_dict() for name, part in self._parts_of_rank().items()},
            num_input_tokens_seen=self.state.num_input_tokens_seen,
            current_flos=self.current_flos,
        )

    def forget_state(self) -> None:
        """Mark the weights as those of no whole step, from the optimizer's update on."""
        self._last_step = None

    def _go_back_to(self, last: LastStep) -> None:
        restore_random_state(last.random)
        for name, part in self._parts_of_rank().items():
            part.load_state_dict(last.parts[name])
        self.state.num_input_tokens_seen = last.num_input_tokens_seen
        self.current_flos = last.current_flos

    def _save_last_step(self, error: BaseException) -> None:
        """Save the last whole step after an error, and tell in its notes where that is."""
        if self.stop_signals.leaving or not distributed.is_raised_on_all_ranks(error):
            return
        last = self._last_step
        if last is not None and last.step > 0 and not self._has_failed_to_save:
            try:
                if not distributed.any_rank(self.folder.has_whole(last.step)):
                    self._go_back_to(last)
                    self._save_checkpoint(cast(nn.Module, self.model_wrapped), trial=None)
            except Exception as second:
                error.add_note(
                    f"The {last.step} steps that were learned could not be saved in "
                    f"{self.folder.path}: {distributed.repr_of(second)}. Make room there."
                )
        self._tell_where(error)

    def _tell_where(self, error: BaseException) -> None:
        with contextlib.suppress(OSError):
            word = self.folder.last_word() if self.state.global_step > 0 else None
            if word is None:
                return
            if isinstance(error, SystemExit):  # which shows no notes
                say(word)
            else:
                error.add_note(word)

    # -- between steps ---------------------------------------------------------------------------

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        super()._maybe_log_save_evaluate(*args, **kwargs)
        self.keep_state()
        noted = torch.tensor(self.stop_signals.noted or 0)
        if number := int(distributed.all_reduce(noted, "max")):
            error = stopped_by(number)
            error.raised_on_all_ranks = True  # pyright: ignore[reportAttributeAccessIssue] (a mark)
            raise error

    @property
    def is_finished(self) -> bool:
        """True if a resumed run had made all its steps before."""
        return self._checkpoint is not None and self.state.global_step >= self.state.max_steps

    def _evaluate(
        self, trial: object, ignore_keys_for_eval: list[str] | None, skip_scheduler: bool = False
    ) -> dict[str, float]:
        # A run that goes on has made the evaluation of its start (eval_on_start) already.
        if skip_scheduler and self._checkpoint is not None:
            return {}
        return super()._evaluate(trial, ignore_keys_for_eval, skip_scheduler)

    def _finalize_training(
        self, trial: object, num_train_samples: int, start_time: float
    ) -> TrainOutput:
        """Close the run; its figures are those of all processes that trained it."""
        start_time -= self.running_loss.seconds_before
        return super()._finalize_training(trial, num_train_samples, start_time)

    # -- saving ----------------------------------------------------------------------------------

    def _parts_of_rank(self) -> Mapping[str, Any]:
        return {**self.stages.stateful_parts_of_rank, "running_loss": self.running_loss}

    def _get_output_dir(self, trial: object) -> str:
        """Return the run's folder; while a checkpoint is written, the folder of unfinished ones."""
        if self._is_saving_to is not None:
            return str(self._is_saving_to)
        return super()._get_output_dir(trial)

    def _save_checkpoint(self, model: nn.Module, trial: object) -> None:
        """Write a checkpoint under another name, and rename it once it is whole."""
        step = self.state.global_step
        self._has_failed_to_save = True  # until the end
        self._is_saving_to = self.folder.unfinished
        try:
            super()._save_checkpoint(model, trial)
            distributed.any_rank(False)  # until then, other ranks may be writing
            with raise_on_all_ranks("finish the checkpoint"):
                if self.args.should_save:
                    self._finish(step)
        except BaseException:
            if self.args.should_save:
                self.folder.recover()  # gives back the room on the disk
            raise
        finally:
            self._is_saving_to = None

        self._has_failed_to_save = False
        if self.args.push_to_hub:
            super()._push_from_checkpoint(str(self.folder.checkpoint(step)))

    def _finish(self, step: int) -> None:
        """Add the manifest, rename the checkpoint, and delete what is too much."""
        written = self.folder.unfinished / f"checkpoint-{step}"
        self._note_best(written)
        facts = {**self._facts, "step": step, "resumable": not self.args.save_only_model}
        finish_checkpoint(written, facts)
        move_into_place(written, self.folder.checkpoint(step))
        best = self.state.best_model_checkpoint
        self.folder.keep_newest(self.args.save_total_limit, best=best)

    def _note_best(self, written: Path) -> None:
        """Name the best checkpoint in the state by the place where it will be."""
        best = self.state.best_global_step
        if not best or self.args.save_strategy == "no":
            return
        place = self.folder.checkpoint(best)
        if place.exists() or best == self.state.global_step:
            self.state.best_model_checkpoint = str(place)
            self.state.save_to_json(str(written / "trainer_state.json"))

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Do nothing while a checkpoint is written: it is pushed once it is in its place."""

    def _save_rng_state(self, output_dir: str) -> None:
        """Save our state beside the random states."""
        super()._save_rng_state(output_dir)
        parts = self.stages.stateful_parts
        shared = {name: part.state_dict() for name, part in parts.items()}
        of_rank = {name: part.state_dict() for name, part in self._parts_of_rank().items()}
        os.makedirs(output_dir, exist_ok=True)
        if self.args.should_save:
            save_state(shared, output_dir, SHARED)
        save_state(of_rank, output_dir, f"gmpo_rank_{distributed.rank()}")

    # -- resuming --------------------------------------------------------------------------------

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        configured = hyperparameters(self.optimizer, self.lr_scheduler)
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        apply_to_optimizer(
            self.optimizer,
            self.lr_scheduler,
            configured,
            folder=checkpoint,
            options=self._facts["options"],
        )
        shared = load_state(checkpoint, SHARED)
        for name, part in self.stages.stateful_parts.items():
            if name in shared:
                part.load_state_dict(shared[name])

    def load_rank_state(self) -> None:
        """Restore this rank's parts, once the Trainer has set its sums to 0."""
        if self._checkpoint is not None:
            of_rank = load_state(self._checkpoint, f"gmpo_rank_{distributed.rank()}")
            for name, part in self._parts_of_rank().items():
                part.load_state_dict(of_rank[name])
        else:
            self.running_loss.seconds_before, self.running_loss.since = 0.0, time.time()
        self.keep_state()

    def with_random_state(self, rows: Iterator[Rows]) -> Iterator[Rows]:
        """Return `rows`, with the checkpoint's random states restored before they are used.

        The first item is fetched before: with it the data loader begins, which draws a number that
        the uninterrupted run drew at the start of the epoch.
        """
        if self._is_random_state_restored:
            return rows
        with raise_on_all_ranks("read the next rows"):
            first = list(itertools.islice(rows, 1))
        self._load_rng_state(self._checkpoint)
        return itertools.chain(first, rows)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Restore the random states, once: the Trainer asks again after the first collection."""
        if not self._is_random_state_restored:
            self._is_random_state_restored = True
            super()._load_rng_state(checkpoint)
            if self._last_step is not None:
                self._last_step.random = random_state()

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: nn.Module | None = None
    ) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        self.stages.policy_version.moved()

    def _load_best_model(self) -> None:
        super()._load_best_model()
        self.stages.policy_version.moved()


class WholeSteps(TrainerCallback):
    """Tells a trainer when its weights belong to a whole step; comes after `BetweenSteps`."""

    def __init__(self, trainer: ResumableTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Go on from the checkpoint; a finished run has nothing to do."""
        self.trainer.load_rank_state()
        if self.trainer.is_finished:
            say(f"the run in {self.trainer.folder.path} is finished: {state.global_step} steps.")
            control.should_training_stop = True

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Keep the former state until the update begins, and none from there."""
        self.trainer.forget_state()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Keep the state of the step, before it is logged."""
        self.trainer.keep_state()


def random_state() -> State:
    """Return the states of the process's random generators."""
    return {
        "python": random.getstate(),
        "numpy": numpy.random.get_state(),
        "torch": torch.random.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None,
    }


def restore_random_state(state: State) -> None:
    """Set the random generators to what `random_state` returned."""
    random.setstate(state["python"])
    numpy.random.set_state(state["numpy"])
    torch.random.set_rng_state(state["torch"])
    if state["cuda"] is not None:
        torch.cuda.set_rng_state(state["cuda"])
