"""What becomes of the options of `transformers.TrainingArguments` that mean something else, or nothing, under gmpo.

All others act as they do for every Trainer.  Also: which options of any stage do nothing without another one, and what
the trainers answer to arguments that they don't have.
"""

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

from transformers.trainer_pt_utils import AcceleratorConfig

# option -> (the values that change nothing, why any other is refused)
REFUSED: dict[str, tuple[tuple[Any, ...], str]] = {
    "label_smoothing_factor": (
        (0.0,),
        "there are no labels to smooth: completions are weighed by their advantage",
    ),
    "label_names": ((None,), "there are no labels: completions are weighed by their advantage"),
    "average_tokens_across_devices": (
        (True,),
        "denominators are those of the whole optimizer batch over all ranks, so that ranks don't change the update",
    ),
    "train_sampling_strategy": (
        ("random",),
        "a collection is drawn prompt by prompt. Use shuffle_dataset=False for the dataset's own order",
    ),
    "length_column_name": (
        ("length",),
        "only sampling by length reads it, and a collection is drawn prompt by prompt",
    ),
    "auto_find_batch_size": (
        (False,),
        "another batch size would change groups and update. Set max_tokens_per_chunk to bound the memory instead",
    ),
    "batch_eval_metrics": (
        (False,),
        "compute_metrics gets token ids and rewards, which are small, of the whole evaluation set at once",
    ),
    "dataloader_in_order": (
        (True,),
        "the micro-steps of a collection come one after another. Set dataloader_prefetch_factor to read ahead",
    ),
}

# options that act only beside another one -> that one, which is off by default
NEEDS = {
    "ref_model_mixup_alpha": "sync_ref_model",
    "ref_model_sync_steps": "sync_ref_model",
    "num_completions_to_print": "log_completions",
    "log_unique_prompts": "log_completions",
    "log_completions_hub_repo": "log_completions",
    "transformers_continuous_batching_config": "use_transformers_continuous_batching",
    "liger_kernel_config": "use_liger_kernel",
    "fsdp_config": "fsdp",
}
# inherited numbers -> the least that makes sense
LEAST = {
    "per_device_train_batch_size": 1,
    "per_device_eval_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "learning_rate": 0.0,
    "weight_decay": 0.0,
    "max_grad_norm": 0.0,
    "num_train_epochs": 0.0,
    "dataloader_num_workers": 0,
    "seed": 0,
    "data_seed": 0,
}
LOW_RANK_OPTIMIZERS = ("galore", "apollo")  # those that read optim_target_modules
ACCELERATOR_OPTIONS = (
    "gradient_accumulation_kwargs",
    "use_configured_state",
)  # of accelerator_config, that act


def check_arguments(config: Any) -> None:
    """Raise a ValueError for the first option that could not act.

    Args:
        config: With the values as the user gave them, before `TrainingArguments` has converted any.
    """
    for name, (harmless, reason) in REFUSED.items():
        value = getattr(config, name)
        if value not in harmless:
            raise ValueError(f"{name}={value!r} can't act: {reason}. Leave it at {harmless[0]!r}.")
    check_ranges(config)
    for problem in (
        *useless_options(config),
        *useless_accelerator_options(config.accelerator_config),
    ):
        raise ValueError(problem)
    check_parallelism(config.parallelism_config)


def check_ranges(config: Any) -> None:
    for name, least in LEAST.items():
        value = getattr(config, name)
        if isinstance(value, int | float) and not least <= value < math.inf:
            raise ValueError(
                f"{name}={value!r} is out of range: it must be at least {least} and finite."
            )


def useless_options(config: Any) -> Iterator[str]:
    """What is wrong with options that would act only beside another one."""
    defaults = {field.name: field.default for field in dataclasses.fields(config)}
    for name, switch in NEEDS.items():
        value = getattr(config, name)
        if value != defaults[name] and not getattr(config, switch):
            yield f"{name}={value!r} would do nothing without {switch}. Set {switch}, or leave {name} as it is."
    optimizer = str(getattr(config.optim, "value", config.optim))
    if config.optim_target_modules is not None and not optimizer.startswith(LOW_RANK_OPTIMIZERS):
        yield (
            f"optim_target_modules={config.optim_target_modules!r} would do nothing with optim={optimizer!r}: only "
            "GaLore's and APOLLO's optimizers read it. Use one of them, or leave it at None."
        )


def useless_accelerator_options(given: Any) -> Iterator[str]:
    """What is wrong with an accelerator_config: rows are dealt to the ranks by gmpo's own sampler, and no tensors."""
    if not isinstance(given, AcceleratorConfig | dict):
        return
    values = given if isinstance(given, dict) else given.to_dict()
    defaults = AcceleratorConfig().to_dict()
    for name, value in values.items():
        if name not in ACCELERATOR_OPTIONS and value != defaults.get(name, value):
            yield (
                f"accelerator_config with {name}={value!r} would do nothing: collections are dealt to the ranks by "
                f"gmpo's own sampler, as rows and not as tensors. Leave {name} at {defaults[name]!r}."
            )


def check_device(config: Any) -> None:
    """Raise a ValueError for an option that can't act on the device of `config`, which knows it by now."""
    if config.fp16 and config.device.type == "cpu":
        raise ValueError(
            "fp16=True has no effect on a CPU, whose mixed precision is bfloat16's alone. Use bf16=True, or load the "
            "model in half precision: model_init_kwargs={'dtype': 'float16'}."
        )
    if config.vllm_enable_sleep_mode and config.device.type == "cpu":
        raise ValueError(
            "vllm_enable_sleep_mode=True gives away a GPU's memory, and this run has no GPU. Leave it at False."
        )


# -- the trainer's arguments -------------------------------------------------------------------------------------------


def check_parallelism(parallelism: Any) -> None:
    for axis in ("cp", "sp"):
        size = getattr(parallelism, f"{axis}_size", 1) or 1
        if size > 1:
            raise ValueError(
                f"parallelism_config with {axis}_size={size} splits sequences over ranks, which gmpo's layouts don't "
                f"support. Use {axis}_size=1, and FSDP or ZeRO-3 for memory."
            )
