"""Options that changed between a checkpoint and its resume: they act, or are refused by name."""

import importlib.metadata
from collections.abc import Mapping
from enum import Enum
from typing import Any

import torch
from torch import nn

from gmpo.config import GRPOConfig
from gmpo.data.loaders import PROMPT_COLUMNS
from gmpo.run.checkpoint import DamagedCheckpoint, State, digest_of, read_manifest
from gmpo.sharding import WRAPPERS
from gmpo.types import is_map_style

FIXED = {  # what the place in the data, or the optimizer's state, depends on
    "per_device_train_batch_size": "sizes of a checkpoint's collection",
    "gradient_accumulation_steps": "sizes of a checkpoint's collection",
    "generation_batch_size": "sizes of a checkpoint's collection",
    "steps_per_generation": "sizes of a checkpoint's collection",
    "num_generations": "sizes of a checkpoint's collection",
    "num_iterations": "sizes of a checkpoint's collection",
    "seed": "the order of the prompts and all random numbers",
    "data_seed": "the order of the prompts",
    "shuffle_dataset": "the order of the prompts",
    "optim": "the optimizer's state",
}
OF_GROUPS = {  # option -> where the optimizer's parameter groups keep it
    "weight_decay": ("weight_decay",),
    "adam_beta1": ("betas",),
    "adam_beta2": ("betas",),
    "adam_epsilon": ("eps",),
}
PACKAGES = ("gmpo", "torch", "transformers", "accelerate", "peft")


def facts_of(args: GRPOConfig, policy: nn.Module, dataset: object) -> State:
    """Return what a manifest tells of a run: its options, model, data, ranks and versions."""
    shapes = {}
    for name, parameter in policy.named_parameters():
        plain_name = ".".join(part for part in name.split(".") if part not in WRAPPERS)
        shapes[plain_name] = list(getattr(parameter, "ds_shape", parameter.shape))
    return {
        "options": {name: plain(value) for name, value in args.to_dict().items()},
        "ranks": args.world_size,
        "model": digest_of(shapes),
        "dataset": fingerprint(dataset),
        "versions": {name: version(name) for name in PACKAGES},
    }


def check_resumed(manifest: Mapping[str, Any], facts: Mapping[str, Any], folder: str) -> None:
    """Raise a ValueError that names what differs from the checkpoint's run and can't."""
    saved, given = manifest["options"], facts["options"]
    for name, what in FIXED.items():
        if name in saved and saved[name] != given[name]:
            raise ValueError(
                f"{name} is {given[name]!r}, and was {saved[name]!r} in the run of {folder!r}: it "
                f"sets {what}, and can't change on a resume. Set {name}={saved[name]!r}, or begin "
                "a new run from the checkpoint (model=...)."
            )
    if manifest["ranks"] != facts["ranks"]:
        raise ValueError(
            f"{folder!r} was saved by {manifest['ranks']} process(es), and {facts['ranks']} run "
            "now. Resume with as many."
        )
    if manifest["model"] != facts["model"]:
        raise ValueError(
            f"{folder!r} is a checkpoint of another model: parameters differ in name or shape. "
            "Give the model (and peft_config) that the run began with."
        )
    if manifest["dataset"] != facts["dataset"]:
        raise ValueError(
            f"train_dataset has other prompts than in the run of {folder!r}. Give the one that it "
            "began with, or begin a new run from the checkpoint (model=...)."
        )


def hyperparameters(optimizer: object, scheduler: object) -> State:
    """Return what the config has set in the optimizer's groups and the schedule."""
    groups = getattr(optimizer, "param_groups", [])
    return {
        "groups": [{k: v for k, v in group.items() if k != "params"} for group in groups],
        "base_lrs": list(getattr(scheduler, "base_lrs", [])),
    }


def apply_to_optimizer(
    optimizer: object,
    scheduler: Any,
    configured: State,
    *,
    folder: str,
    options: Mapping[str, Any],
) -> None:
    """Let options act that changed since the checkpoint, whose optimizer holds the old ones.

    Args:
        configured: The `hyperparameters` before the checkpoint was loaded.
        folder: The checkpoint's.
        options: Of the config as it is now.
    """
    try:
        saved = read_manifest(folder)["options"]
    except DamagedCheckpoint:
        return
    changed = {name for name, value in saved.items() if options.get(name) != value}
    groups = getattr(optimizer, "param_groups", [])

    for group, wanted in zip(groups, configured["groups"], strict=False):
        for option, keys in OF_GROUPS.items():
            for key in keys:
                if option in changed and key in wanted:
                    group[key] = wanted[key]
        if "learning_rate" in changed:
            first = wanted.get("initial_lr", wanted["lr"])
            former = group.get("initial_lr", group["lr"])
            group["lr"] = first * (group["lr"] / former if former else 1.0)
            if "initial_lr" in group:
                group["initial_lr"] = first

    if "learning_rate" in changed and configured["base_lrs"]:
        scheduler.base_lrs = configured["base_lrs"]
        scheduler._last_lr = [group["lr"] for group in groups]


def fingerprint(dataset: object) -> str:
    """Return a digest of up to 64 prompts, spread over a map-style dataset, and of its length."""
    if not is_map_style(dataset):
        return "stream"
    size = len(dataset)
    places = sorted({round(i * (size - 1) / 63) for i in range(64)}) if size else []
    prompts = [dict(dataset[place]).get(PROMPT_COLUMNS[0]) for place in places]
    return digest_of([size, prompts])


def plain(value: object) -> Any:
    """Return an option as JSON can hold it."""
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, torch.dtype):
        return str(value)
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value if isinstance(value, str | int | float | bool | None) else repr(value)


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
