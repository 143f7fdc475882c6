"""Options of the data stage: how rows become groups, collections and micro-batches."""

from dataclasses import dataclass

from gmpo.option import option


@dataclass
class DataSettings:
    """Options of the data stage."""

    num_generations: int = option(
        8, "Completions per prompt: the group that an advantage is relative to.", low=2
    )
    num_generations_eval: int | None = option(
        None, "Completions per prompt in evaluation; None takes num_generations.", low=1
    )
    generation_batch_size: int | None = option(
        None,
        "Completions of one collection over all ranks. Give this or steps_per_generation, not "
        "both.",
        low=1,
    )
    steps_per_generation: int | None = option(
        None,
        "Micro-batches that one collection is cut into; None takes gradient_accumulation_steps. "
        "More of them than gradient_accumulation_steps give several optimizer steps per "
        "collection, which is where clipping acts.",
        low=1,
    )
    num_iterations: int = option(1, "Passes over each collection.", low=1)
    shuffle_dataset: bool | None = option(
        True, "Visit the prompts in a seeded order, a fresh one each epoch."
    )
    zero_signal_groups: str = option(
        "skip",
        "What to do with groups whose rewards are all equal: 'skip' their forward and backward "
        "when that is exact (no KL, entropy bonus or auxiliary loss), denominators unchanged; "
        "'keep' them; 'resample': draw other prompts in their place, and skip the groups that "
        "are left.",
        choices=("skip", "keep", "resample"),
    )
    max_resamples: int = option(
        3, "With zero_signal_groups='resample': further draws per collection, at most.", low=1
    )


class Resolved(int):
    """A size that was derived from other options, since the user set none."""


def given_size(size: int | None, other: int | None) -> int | None:
    """Return the size that the user set, or None if it was derived.

    `dataclasses.replace` passes on derived sizes too, which are marked `Resolved`.  One without the
    `other` can only have been set by the user.
    """
    if size is None or (isinstance(size, Resolved) and other is not None):
        return None
    return int(size)
