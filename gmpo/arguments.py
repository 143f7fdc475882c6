"""What becomes of the options of `transformers.TrainingArguments` that mean something else, or nothing, under gmpo.

All others act as they do for every Trainer.
"""

from typing import Any

# option -> (the values that change nothing, why any other is refused)
REFUSED: dict[str, tuple[tuple[Any, ...], str]] = {
    "label_smoothing_factor": ((0.0,), "there are no labels to smooth: completions are weighed by their advantage"),
    "label_names": ((None,), "there are no labels: completions are weighed by their advantage"),
    "average_tokens_across_devices": (
        (True,),
        "denominators are those of the whole optimizer batch over all ranks, so that ranks don't change the update",
    ),
    "train_sampling_strategy": (
        ("random",),
        "a collection is drawn prompt by prompt. Use shuffle_dataset=False for the dataset's own order",
    ),
    "length_column_name": (("length",), "only sampling by length reads it, and a collection is drawn prompt by prompt"),
    "auto_find_batch_size": (
        (False,),
        "another batch size would change groups and update. Set max_tokens_per_chunk to bound the memory instead",
    ),
    "batch_eval_metrics": (
        (False,),
        "compute_metrics gets token ids and rewards, which are small, of the whole evaluation set at once",
    ),
}


def check_arguments(config: Any) -> None:
    """Raise a ValueError for the first option that could not act.

    Args:
        config: With the values as the user gave them, before `TrainingArguments` has converted any.
    """
    for name, (harmless, reason) in REFUSED.items():
        value = getattr(config, name)
        if value not in harmless:
            raise ValueError(f"{name}={value!r} can't act: {reason}. Leave it at {harmless[0]!r}.")
    check_parallelism(config.parallelism_config)


def check_parallelism(parallelism: Any) -> None:
    for axis in ("cp", "sp"):
        size = getattr(parallelism, f"{axis}_size", 1) or 1
        if size > 1:
            raise ValueError(
                f"parallelism_config with {axis}_size={size} splits sequences over ranks, which gmpo's layouts don't "
                f"support. Use {axis}_size=1, and FSDP or ZeRO-3 for memory."
            )
