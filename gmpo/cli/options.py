"""Options of `gmpo train` beside the trainer's own, and the refusal of wrong names.

Nothing heavy is imported here, so that help and a typo are answered at once.
"""

import glob
import os
from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Any

from gmpo.option import advice, check_options, declared_type, option

ALGORITHMS = ("gmpo", "grpo")
LORA, QUANTIZATION = "peft", "quantization"
SEVERAL = ("dataset", "eval_dataset", "reward")  # take one value or more
PEER_NAMES = {  # what the same option is called in TRL's scripts
    "model_name_or_path": "model",
    "model_revision": "model_init_kwargs",
    "dataset_name": "dataset",
    "dataset_config": "dataset_kwargs",
    "dataset_train_split": "dataset_split",
    "dataset_test_split": "eval_dataset_split",
    "reward_funcs": "reward",
    "reward_model_name_or_path": "reward",
    "dtype": "model_init_kwargs",
    "attn_implementation": "model_init_kwargs",
}
PEER_KEYS = {  # ... and what is one key of a mapping here: name -> (option, key)
    "use_peft": (LORA, "r"),
    "lora_r": (LORA, "r"),
    "lora_alpha": (LORA, "lora_alpha"),
    "lora_dropout": (LORA, "lora_dropout"),
    "lora_target_modules": (LORA, "target_modules"),
    "lora_target_parameters": (LORA, "target_parameters"),
    "lora_modules_to_save": (LORA, "modules_to_save"),
    "lora_task_type": (LORA, "task_type"),
    "use_rslora": (LORA, "use_rslora"),
    "use_dora": (LORA, "use_dora"),
    "load_in_4bit": (QUANTIZATION, "load_in_4bit"),
    "load_in_8bit": (QUANTIZATION, "load_in_8bit"),
    "bnb_4bit_quant_type": (QUANTIZATION, "bnb_4bit_quant_type"),
    "bnb_4bit_compute_dtype": (QUANTIZATION, "bnb_4bit_compute_dtype"),
    "use_bnb_nested_quant": (QUANTIZATION, "bnb_4bit_use_double_quant"),
}


@dataclass
class ScriptOptions:
    """Options of `gmpo train` beside the trainer's config."""

    model: str | None = option(None, "Name or path of the model to train.")
    dataset: Any = option(  # one text, or a list of files
        None,
        "Rows to train on: a dataset on the hub, a folder of save_to_disk, one or more .jsonl, "
        ".json, .parquet or .csv files (also compressed, also with *), or reasoning_gym:TASK.",
    )
    dataset_split: str = option("train", "Split of the dataset.")
    dataset_kwargs: dict[str, Any] | str | None = option(
        None,
        "Mapping: keywords for load_dataset (`name`, `data_dir`, ...), or the task's own for "
        "reasoning_gym.",
    )
    prompt_column: str = option("prompt", "Column of the dataset that holds the prompt.")
    prompt_format: str = option(
        "auto",
        "Text prompts become 'messages' or stay 'text'; 'auto': messages where the tokenizer has a "
        "chat template.",
        choices=("auto", "messages", "text"),
    )
    system_prompt: str | None = option(None, "Put before every prompt.")
    eval_dataset: Any = option(
        None, "Rows for evaluation (see eval_strategy); as `dataset`, may be the same."
    )
    eval_dataset_split: str = option("test", "Split of the evaluation dataset.")
    eval_dataset_kwargs: dict[str, Any] | str | None = option(
        None,
        "As dataset_kwargs. For the reasoning_gym task of `dataset`: what differs; other entries "
        "are drawn.",
    )
    reward: list[str] | None = option(
        None,
        "One or more: a built-in name (below), file.py:function, or a reward model. None: the "
        "verifier of the reasoning_gym task.",
    )
    algorithm: str = option("gmpo", "gmpo, or the GRPO family (see loss_type).", choices=ALGORITHMS)
    peft: dict[str, Any] | str | None = option(
        None,
        "Mapping: train a LoRA adapter with these options of peft.LoraConfig, for example {r: 16}.",
    )
    quantization: dict[str, Any] | str | None = option(
        None,
        "Mapping: load the model with these options of transformers.BitsAndBytesConfig, for "
        "example {load_in_4bit: true}.",
    )
    resume: str | None = option(
        None, "Go on from this checkpoint folder, or from the 'latest' in output_dir."
    )
    dry_run: bool = option(
        False, "Print the resolved options and the batch arithmetic, without loading weights."
    )

    def __post_init__(self):
        from gmpo.cli.yaml_text import as_mapping

        for field in fields(self):
            value = getattr(self, field.name)
            if declared_type(self, field.name).startswith("dict"):
                setattr(self, field.name, as_mapping(field.name, value))
        self.reward = [self.reward] if isinstance(self.reward, str) else self.reward

        self.model = expanded(self.model)
        self.resume = expanded(self.resume)
        for name in ("dataset", "eval_dataset"):
            setattr(self, name, one_or_more(name, getattr(self, name)))

        check_options(self)
        for name in ("model", "dataset"):
            if not getattr(self, name):
                raise ValueError(
                    f"There is no {name}. Give --{name} NAME, or `{name}: NAME` in the config file."
                )


def expanded(path: object) -> Any:
    """Return `path` with the home folder for a ~ at its beginning."""
    return os.path.expanduser(path) if isinstance(path, str) else path


def one_or_more(name: str, value: object) -> Any:
    """Return one dataset as text and several files as a list, with ~ and * expanded."""
    if value is None:
        return None
    given = value if isinstance(value, list | tuple) else [value]

    found: list[str] = []
    for item in map(expanded, given):
        if not isinstance(item, str):
            raise ValueError(f"{name}={value!r} is not text, or a list of texts.")
        if glob.has_magic(item):
            matches = sorted(glob.glob(item, recursive=True))
            if not matches:
                raise FileNotFoundError(f"There is no file like {item!r}.")
            found += matches
        else:
            found.append(item)
    return found[0] if len(found) == 1 else found


def plain_name(name: str) -> str:
    """Return an option's name as it is declared: dashes are underscores."""
    return name.lstrip("-").partition("=")[0].replace("-", "_")


def unknown_option(name: str, known: Iterable[str], *, source: str = "") -> str:
    """Return what is wrong with `name`, and the closest name that is right."""
    dashes = "--" if name.startswith("-") else ""
    bare = plain_name(name)
    if not dashes and not source:
        return (
            f"{name!r} has no option before it. Options are --name value; "
            "a config file is --config FILE."
        )

    if bare in PEER_KEYS:
        mapping, key = PEER_KEYS[bare]
        flag = f"--{mapping} '{{{key}: ...}}'" if dashes else f"{mapping}: {{{key}: ...}}"
        hint = f" Write it as {flag}."
    elif bare in PEER_NAMES:
        hint = f" Did you mean '{dashes}{PEER_NAMES[bare]}'?"
    else:
        hint = advice(bare, known, prefix=dashes) or " gmpo train --help lists the options."
    return f"There is no option {dashes}{bare}{source}.{hint}"
