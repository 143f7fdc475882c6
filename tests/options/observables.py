"""What an option may change: each function looks at one thing of a run and gives it in plain values."""

import hashlib
from typing import Any

import torch

from tests.options.runs import Run


def weights(run: Run) -> Any:
    """Every weight at the end."""
    return fingerprints(run.trainer.unwrapped_policy())


def reference(run: Run) -> Any:
    """Every weight of the reference at the end."""
    return fingerprints(run.trainer.reference.model)


def fingerprints(model: Any) -> dict[str, str]:
    """A few characters for each weight, which every bit of it decides."""
    raw = {
        name: value.contiguous().view(torch.uint8).numpy().tobytes()
        for name, value in model.state_dict().items()
    }
    return {name: hashlib.sha256(value).hexdigest()[:8] for name, value in raw.items()}


def logs(run: Run) -> Any:
    return run.logs


def losses(run: Run) -> Any:
    return [entry["loss"] for entry in run.logs]


def rates(run: Run) -> Any:
    """Learning rate of every optimizer step."""
    return [entry["learning_rate"] for entry in run.logs]


def steps(run: Run) -> Any:
    return run.trainer.state.global_step


def logged_steps(run: Run) -> Any:
    return [entry["step"] for entry in run.logs]


def evaluated_steps(run: Run) -> Any:
    return [entry["step"] for entry in run.evaluations]


def completions(run: Run) -> Any:
    """Token ids of the first collection."""
    return [rollout.ids for rollout in run.collections[0].rollouts]


def longest(run: Run) -> Any:
    return max(len(ids) for ids in completions(run))


def prompts(run: Run) -> Any:
    """Token ids of the prompts of the first collection, one for each group."""
    return prompts_of(run.collections[0])


def other_prompts(run: Run) -> Any:
    """Those of the second collection."""
    return prompts_of(run.collections[1])


def prompts_of(collection: Any) -> Any:
    pairs = zip(collection.batch.group.tolist(), collection.rollouts, strict=True)
    return list({group: rollout.prompt.ids for group, rollout in pairs}.values())


def collected(run: Run) -> Any:
    """Completions of every collection, evaluations too."""
    return [len(collection.rollouts) for collection in run.collections]


def advantages(run: Run) -> Any:
    """Of the first collection."""
    return run.collections[0].batch.advantages.tolist()


def columns(run: Run) -> Any:
    """What the reward function gets besides what every one does."""
    return sorted(
        set(run.calls[0])
        - {"prompts", "completions", "completion_ids", "trainer_state", "log_extra"}
    )


def files(run: Run) -> Any:
    """Every file of the run, without those whose names hold the time."""
    return sorted(
        str(path.relative_to(run.folder))
        for path in run.folder.rglob("*")
        if path.is_file() and "tfevents" not in path.name
    )


def checkpoints(run: Run) -> Any:
    return sorted(path.name for path in run.folder.glob("out/checkpoint-*"))


def training_shapes(run: Run) -> Any:
    """Shapes of what goes through the model with a gradient."""
    return [
        call["input_ids"] for call in run.forwards if call["training"] and call.get("input_ids")
    ]


def layer_passes(run: Run) -> Any:
    """How often the first layer computed while the policy was trained."""
    return run.layer_passes


def twice_the_layer_passes(run: Run) -> Any:
    """Twice as often as the model was called for training."""
    return 2 * len(training_shapes(run))


def caches(run: Run) -> Any:
    """Kinds of the caches that the model is called with."""
    return sorted(
        {
            type(call["past_key_values"]).__name__
            for call in run.forwards
            if call.get("past_key_values")
        }
    )


def callbacks(run: Run) -> Any:
    return [type(callback).__name__ for callback in run.trainer.callback_handler.callbacks]


def optimizer(run: Run) -> Any:
    return type(run.trainer.optimizer.optimizer).__name__


def engine(run: Run) -> Any:
    """Name of the engine that wrote."""
    built = run.trainer.stages.engine
    return type(getattr(built, "chosen", built)).__name__


def loader(name: str) -> Any:
    """An attribute of the training data's loader."""
    return lambda run: getattr(run.trainer.get_train_dataloader(), name)


def accelerator(path: str) -> Any:
    """What accelerate was told: an attribute of the Accelerator, by its path."""

    def look(run: Run) -> Any:
        value = run.trainer.accelerator
        for name in path.split("."):
            value = getattr(value, name)
        return value

    return look


def has(name: str) -> Any:
    """Whether the first log holds a figure."""
    return lambda run: name in run.logs[0]


def last(name: str) -> Any:
    """A figure of the last log."""
    return lambda run: run.logs[-1][name]


def printed(run: Run) -> Any:
    """Lines on the console."""
    return len(run.printed.splitlines())
