"""Runs that are killed and resumed, and everything of them that can be compared."""

import json
from pathlib import Path

import pyarrow.parquet
import torch
from transformers import TrainerCallback

TIMES = ("time", "runtime", "per_second", "memory/")


class Killed(BaseException):
    """Ends a training as SIGKILL would: nothing of the run answers to it."""


class KillAt(TrainerCallback):
    """Kills the run when `event` comes at `step`."""

    def __init__(self, event, step, error=Killed):
        self.event, self.step, self.error = event, step, error

        def handler(args, state, control, **kwargs):
            if state.global_step == step:
                raise error

        setattr(self, event, handler)


def without_times(record):
    return {name: value for name, value in record.items() if not any(t in name for t in TIMES)}


def outcome(trainer):
    """Return the weights, optimizer, schedule, log and completions of a finished run."""
    folder = Path(trainer.args.output_dir)
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    tables = sorted((folder / "completions").glob("*.parquet"))
    return {
        "weights": dict(trainer.model.named_parameters()),
        "optimizer": trainer.optimizer.state_dict()["state"],
        "schedule": trainer.lr_scheduler.state_dict(),
        "tokens": trainer.state.num_input_tokens_seen,
        "metrics": [without_times(json.loads(line)) for line in lines],
        "history": [without_times(record) for record in trainer.state.log_history],
        "completions": {t.name: pyarrow.parquet.read_table(t).to_pylist() for t in tables},
        "reference": reference_of(trainer),
        "entropy_bonus": trainer.stages.entropy_bonus.state_dict(),
    }


def reference_of(trainer):
    state = trainer.stages.reference_state
    return None if state is None else state.state_dict()


def same(left, right):
    """Return whether two nested values are equal to the bit; NaN equals NaN."""
    if isinstance(left, torch.Tensor):
        return torch.equal(left, right)
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same(left[key], right[key]) for key in left)
    if isinstance(left, list | tuple):
        return len(left) == len(right) and all(map(same, left, right))
    return left == right or (left != left and right != right)


def differences(left, right):
    """Name the parts of two outcomes that differ."""
    return [name for name in left if not same(left[name], right[name])]
