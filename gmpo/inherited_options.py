"""Options of `transformers.TrainingArguments`: types, ranges, and those that gmpo restricts.

All others act as they do for every Trainer.
"""

import dataclasses
import enum
import importlib.util
import os
import typing
from collections.abc import Iterable, Iterator
from typing import Any

from accelerate.parallelism_config import ParallelismConfig
from transformers import TrainingArguments
from transformers.trainer_pt_utils import AcceleratorConfig
from transformers.utils import is_torch_bf16_gpu_available, is_torch_xla_available

from gmpo.option import (
    Bounds,
    advice,
    annotation_of,
    check_type,
    members_of,
    parsed_dict,
    rules_of,
)
from gmpo.rollout.check import needs_token_sets

# option -> (the values that change nothing, why any other is refused)
REFUSED: dict[str, tuple[tuple[Any, ...], str]] = {
    "label_smoothing_factor": (
        (0.0,),
        "there are no labels to smooth: completions are weighed by their advantage",
    ),
    "label_names": ((None,), "there are no labels: completions are weighed by their advantage"),
    "average_tokens_across_devices": (
        (True,),
        "denominators are those of the whole optimizer batch over all ranks, so that ranks don't "
        "change the update",
    ),
    "train_sampling_strategy": (
        ("random",),
        "a collection is drawn prompt by prompt. Use shuffle_dataset=False for the dataset's own "
        "order",
    ),
    "length_column_name": (
        ("length",),
        "only sampling by length reads it, and a collection is drawn prompt by prompt",
    ),
    "auto_find_batch_size": (
        (False,),
        "another batch size would change groups and update. Set max_tokens_per_chunk to bound the "
        "memory instead",
    ),
    "batch_eval_metrics": (
        (False,),
        "compute_metrics gets token ids and rewards, which are small, of the whole evaluation set "
        "at once",
    ),
    "dataloader_in_order": (
        (True,),
        "the micro-steps of a collection come one after another. Set dataloader_prefetch_factor to "
        "read ahead",
    ),
}

# options that act only with another one -> that one, which is off by default
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

# inherited numbers -> their range; all others must be finite
RANGES = {
    "per_device_train_batch_size": Bounds(1),
    "per_device_eval_batch_size": Bounds(1),
    "gradient_accumulation_steps": Bounds(1),
    "eval_accumulation_steps": Bounds(1),
    "num_train_epochs": Bounds(0.0),
    "learning_rate": Bounds(0.0),
    "warmup_steps": Bounds(0.0),
    "weight_decay": Bounds(0.0),
    "adam_beta1": Bounds(0.0, 1.0, high_open=True),
    "adam_beta2": Bounds(0.0, 1.0, high_open=True),
    "adam_epsilon": Bounds(0.0),
    "max_grad_norm": Bounds(0.0),
    "neftune_noise_alpha": Bounds(0.0),
    "logging_steps": Bounds(0.0, low_open=True),
    "save_steps": Bounds(0.0, low_open=True),
    "eval_steps": Bounds(0.0, low_open=True),
    "eval_delay": Bounds(0.0),
    "save_total_limit": Bounds(0),
    "torch_empty_cache_steps": Bounds(1),
    "seed": Bounds(0, 2**32 - 1),  # what numpy's generator takes
    "data_seed": Bounds(0),
    "dataloader_num_workers": Bounds(0),
    "dataloader_prefetch_factor": Bounds(1),
    "ddp_bucket_cap_mb": Bounds(1),
    "ddp_timeout": Bounds(1),
}

# what transformers takes besides what its annotation says
ALSO_TAKEN: dict[str, Any] = {
    "accelerator_config": AcceleratorConfig,
    "fsdp": bool | list[str],
    "debug": None,
    "resume_from_checkpoint": bool,
}

# options whose text names a file, unless it is JSON
FILES = ("accelerator_config", "fsdp_config")
# backends of torch.distributed; several are written "cpu:gloo,cuda:nccl"
BACKENDS = ("nccl", "gloo", "mpi", "xccl", "ccl", "hccl", "cncl", "mccl")

LOW_RANK_OPTIMIZERS = ("galore", "apollo")  # those that read optim_target_modules

# the options of accelerator_config that act -> the values that do
ACCELERATOR_OPTIONS = ("gradient_accumulation_kwargs", "use_configured_state")
# others that may be set to what holds anyway
ACCELERATOR_FACTS = {"dispatch_batches": (None, False)}


# -- types and ranges --------------------------------------------------------------------------


def check_inherited(config: TrainingArguments) -> None:
    """Raise a ValueError for the first inherited option with a value of another type or range.

    Args:
        config: With the values as the user gave them, before `TrainingArguments` has converted any.
    """
    for field in dataclasses.fields(config):
        if rules_of(field) is None and field.init:
            check_inherited_type(field, getattr(config, field.name), type(config))
    for name, bounds in RANGES.items():
        bounds.check(name, getattr(config, name))
    if config.max_steps == 0 or config.max_steps < -1:
        raise ValueError(
            f"max_steps={config.max_steps} is out of range: it must be a number of optimizer "
            "steps, at least 1, or -1 for num_train_epochs."
        )
    check_trackers(config.report_to)
    check_named_values(config)
    check_needs_of_machine(config)


def check_inherited_type(field: dataclasses.Field, value: object, cls: type) -> None:
    """Raise a ValueError unless `value` is of the type that `TrainingArguments` declares."""
    if value is None and field.default is None:
        return
    annotation = annotation_of(cls, field.name)
    if field.name in ALSO_TAKEN:
        annotation = annotation | ALSO_TAKEN[field.name]
    check_type(field.name, value, annotation)

    members = members_of(annotation)
    if isinstance(value, float):
        Bounds().check(field.name, value)
    if isinstance(value, str):
        for member in members:
            if isinstance(member, type) and issubclass(member, enum.Enum):
                check_choice(field.name, value, [str(choice.value) for choice in member])
        if value.startswith("{") and any(origin_of(member) is dict for member in members):
            parsed_dict(field.name, value)
        elif field.name in FILES and not os.path.isfile(value):
            raise ValueError(f"{field.name}={value!r} is not a file, and not a JSON object.")


def origin_of(member: object) -> Any:
    """Return the class of a type, without its parameters: dict for `dict[str, Any]`."""
    return typing.get_origin(member) or member


def check_choice(name: str, value: str, choices: Iterable[str]) -> None:
    """Raise a ValueError that names the closest choice unless `value` is one of them."""
    value, choices = getattr(value, "value", value), list(choices)
    if value not in choices:
        raise ValueError(
            f"{name}={value!r} is not one of {', '.join(map(repr, choices))}."
            f"{advice(value, choices)}"
        )


def check_trackers(report_to: str | list[str] | None) -> None:
    """Raise a ValueError for a tracker that transformers does not know or that is not installed."""
    from transformers.integrations.integration_utils import (
        INTEGRATION_TO_CALLBACK,
        get_available_reporting_integrations,
    )

    names = [report_to] if isinstance(report_to, str) else report_to or []
    for name in names:
        if name in ("all", "none"):
            continue
        check_choice("report_to", name, [*INTEGRATION_TO_CALLBACK, "all", "none"])
        if name not in get_available_reporting_integrations():
            raise ValueError(
                f"report_to={name!r} needs a package that is not installed. Install {name}, or "
                "use report_to='none'."
            )


def check_named_values(config: TrainingArguments) -> None:
    """Raise a ValueError for a text that is not among those that transformers knows."""
    from transformers.trainer_utils import FSDPOption
    from transformers.training_args import trainer_log_levels

    check_choice("log_level", config.log_level, trainer_log_levels)
    check_choice("log_level_replica", config.log_level_replica, trainer_log_levels)
    if config.ddp_backend is not None and ":" not in config.ddp_backend:
        check_choice("ddp_backend", config.ddp_backend, BACKENDS)

    fsdp: Any = config.fsdp
    options = [str(option.value) for option in FSDPOption]
    names = fsdp.split() if isinstance(fsdp, str) else fsdp
    for name in names if isinstance(names, list) else []:
        check_choice("fsdp", name, options)


def check_needs_of_machine(config: TrainingArguments) -> None:
    """Raise a ValueError for an option that needs a package or a device that is not there."""
    if config.deepspeed is not None and importlib.util.find_spec("deepspeed") is None:
        raise ValueError(
            "deepspeed is set, but the package is not installed: pip install 'gmpo[deepspeed]'."
        )
    has_bf16 = config.use_cpu or is_torch_bf16_gpu_available() or is_torch_xla_available()
    for name in ("bf16", "bf16_full_eval"):
        if getattr(config, name) and not has_bf16:
            raise ValueError(
                f"{name}=True needs an accelerator with bfloat16, and this machine has none. Leave "
                "it out, or set use_cpu=True to compute on the CPU, which has it."
            )


# -- options that can't act --------------------------------------------------------------------


def check_useless_options(config: TrainingArguments) -> None:
    """Raise a ValueError for the first option that could not act.

    Args:
        config: With the values as the user gave them, before `TrainingArguments` has converted any.
    """
    for name, (harmless, reason) in REFUSED.items():
        value = getattr(config, name)
        if value not in harmless:
            raise ValueError(
                f"{name}={value!r} has no effect: {reason}. Leave it at {harmless[0]!r}."
            )
    for problem in useless_options(config):
        raise ValueError(problem)
    for problem in useless_accelerator_options(config.accelerator_config):
        raise ValueError(problem)
    check_parallelism(config.parallelism_config)


def useless_options(config: TrainingArguments) -> Iterator[str]:
    """Yield a message for each option that would act only with another one."""
    defaults = {field.name: field.default for field in dataclasses.fields(config)}
    for name, switch in NEEDS.items():
        value = getattr(config, name)
        if value != defaults[name] and not getattr(config, switch):
            yield (
                f"{name}={value!r} would do nothing without {switch}. Set {switch}, or leave "
                f"{name} as it is."
            )

    optimizer = str(getattr(config.optim, "value", config.optim))
    if config.optim_target_modules is not None and not optimizer.startswith(LOW_RANK_OPTIMIZERS):
        yield (
            f"optim_target_modules={config.optim_target_modules!r} would do nothing with "
            f"optim={optimizer!r}: only GaLore's and APOLLO's optimizers read it. Use one of them, "
            "or leave it at None."
        )


def useless_accelerator_options(given: AcceleratorConfig | dict | str | None) -> Iterator[str]:
    """Yield a message for each option of accelerator_config that would do nothing.

    Rows are dealt to the ranks by gmpo's own sampler, as rows and not as tensors.
    """
    if not isinstance(given, AcceleratorConfig | dict):
        return
    values = given if isinstance(given, dict) else given.to_dict()
    defaults = AcceleratorConfig().to_dict()

    for name, value in values.items():
        if name not in defaults:
            yield f"accelerator_config has no option {name!r}.{advice(name, defaults)}"
            continue

        harmless = ACCELERATOR_FACTS.get(name, (defaults[name],))
        if name not in ACCELERATOR_OPTIONS and value not in harmless:
            yield (
                f"accelerator_config with {name}={value!r} would do nothing: collections are dealt "
                f"to the ranks by gmpo's own sampler, as rows and not as tensors. Leave {name} at "
                f"{defaults[name]!r}."
            )


def check_parallelism(parallelism: ParallelismConfig | None) -> None:
    """Raise a ValueError for axes of parallelism that split sequences."""
    for axis in ("cp", "sp"):
        size = getattr(parallelism, f"{axis}_size", 1) or 1
        if size > 1:
            raise ValueError(
                f"parallelism_config with {axis}_size={size} splits sequences over ranks, which "
                f"gmpo's layouts don't support. Use {axis}_size=1, and FSDP or ZeRO-3 for memory."
            )


def check_device(config: Any) -> None:
    """Raise a ValueError for an option that can't act on the device that `config` has found."""
    if config.fp16 and config.device.type == "cpu":
        raise ValueError(
            "fp16=True has no effect on a CPU, which computes mixed precision only in bfloat16. "
            "Use bf16=True, or load the model in half precision: "
            "model_init_kwargs={'dtype': 'float16'}."
        )

    if config.vllm_enable_sleep_mode and config.device.type == "cpu":
        raise ValueError(
            "vllm_enable_sleep_mode=True gives away a GPU's memory, and this run has no GPU. "
            "Leave it at False."
        )
    colocated = config.vllm_mode == "colocate"
    if needs_token_sets(config) and colocated and config.device.type == "cpu":
        raise ValueError(
            "logps_support='sampled' with top_p, top_k or min_p needs vLLM on a GPU, where it "
            "reports which tokens it drew from, and this run has no GPU. Set logps_support='full', "
            "or leave use_vllm out."
        )
