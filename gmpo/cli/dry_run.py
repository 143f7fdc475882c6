"""Print what a run would do, in numbers: `gmpo train --dry-run`."""

import math
from collections.abc import Iterator

from gmpo.cli.options import ScriptOptions
from gmpo.cli.yaml_text import dump_yaml
from gmpo.config import GRPOConfig, changed_options
from gmpo.data.settings import Resolved
from gmpo.objective.check import unread_options

# What a config file may not say beside the rest: secrets, and the config's notes to itself.
NOT_TO_REPEAT = {"hub_token", "_n_gpu"}


def plan(script: ScriptOptions, config: GRPOConfig, num_prompts: int | None) -> str:
    """Return the options as YAML, those that differ from the defaults first, and the arithmetic.

    As a config file it asks for the same run.  Options of other objectives and sizes that follow
    from others are left out.

    Args:
        num_prompts: Rows of the training set; None for a stream.
    """
    left_out = NOT_TO_REPEAT | unread_options(config, algorithm=config.algorithm)
    left_out |= {name for name, value in vars(config).items() if isinstance(value, Resolved)}
    values = {name: value for name, value in config.to_dict().items() if name not in left_out}
    changed = changed_options(config).keys() | {"output_dir"}
    own = {
        name: value
        for name, value in vars(script).items()
        if value is not None and name != "dry_run"
    }
    first = {name: value for name, value in values.items() if name in changed}
    rest = {name: value for name, value in values.items() if name not in changed}
    return "\n".join(
        [
            "# what to train, and what differs from the defaults",
            dump_yaml(own | first),
            "# everything else; options of other objectives are left out",
            dump_yaml(rest),
            "# the arithmetic",
            *arithmetic(config, num_prompts),
        ]
    )


def arithmetic(config: GRPOConfig, num_prompts: int | None) -> Iterator[str]:
    """Yield how prompts become completions, collections and optimizer steps, a line each."""
    completions, prompts = config.generation_batch_size, config.prompts_per_collection
    micro_steps = config.micro_steps_per_collection
    rows = (
        config.per_device_train_batch_size * config.gradient_accumulation_steps * config.world_size
    )
    updates = micro_steps / config.gradient_accumulation_steps
    group = config.num_generations
    yield f"# a collection: {prompts} prompts x {group} = {completions} completions"
    yield (
        f"# an optimizer step: {rows} completions of {config.world_size} process(es); {updates:g} "
        "per collection"
    )
    if config.clip_window_is_inert:
        yield (
            "#   one step per collection: no ratio differs from 1, so no clipping "
            "(raise steps_per_generation)"
        )
    if num_prompts is not None:
        yield f"# an epoch: {num_prompts // prompts} collections of the {num_prompts} prompts"
    steps = total_steps(config, num_prompts)
    yield f"# optimizer steps: {'unknown' if steps is None else steps}"


def total_steps(config: GRPOConfig, num_prompts: int | None) -> int | None:
    """Return the optimizer steps of the training, as the Trainer counts them; None for a stream.

    Raises:
        ValueError: If the prompts do not fill one collection.
    """
    if num_prompts is not None and num_prompts < config.prompts_per_collection:
        raise ValueError(
            f"The training set has {num_prompts} prompt(s), but one collection needs "
            f"{config.prompts_per_collection}. Add prompts, or lower generation_batch_size "
            "(steps_per_generation)."
        )
    if config.max_steps > 0:
        return config.max_steps
    if num_prompts is None:
        return None
    collections = num_prompts // config.prompts_per_collection
    micro_steps = collections * config.micro_steps_per_collection
    per_epoch = math.ceil(micro_steps / config.gradient_accumulation_steps)
    return math.ceil(config.num_train_epochs * per_epoch)
