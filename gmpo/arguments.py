"""Checks of the trainers' arguments, before any weight is loaded."""

import dataclasses
import functools
import inspect
import os
import warnings
from collections.abc import Callable, Mapping
from typing import Any, TypeVar, cast

from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from gmpo.config import GRPOConfig
from gmpo.data.loaders import kept_columns
from gmpo.data.sampler import CollectionSize
from gmpo.objective.check import questionable_options
from gmpo.option import advice
from gmpo.policy.load import load_tokenizer
from gmpo.reward.functions import FunctionReward
from gmpo.reward.reward_model import RewardModelSettings
from gmpo.reward.types import RewardSource
from gmpo.rollout.prompts.dataset import check_dataset
from gmpo.rollout.prompts.encoder import PromptEncoder
from gmpo.rollout.prompts.lengths import fitting
from gmpo.types import AnyDataset, is_map_style

Init = TypeVar("Init", bound=Callable[..., None])

RENAMED = {  # an argument's name in other trainers, or in older ones -> its name here
    "tokenizer": "processing_class",
    "config": "args",
    "training_args": "args",
    "dataset": "train_dataset",
    "reward_func": "reward_funcs",
    "reward_model": "reward_funcs",
    "reward_tokenizer": "reward_processing_classes",
}


def known_arguments_only(init: Init) -> Init:
    """Wrap `__init__` of a trainer to refuse unknown arguments with what to use instead."""
    known = list(inspect.signature(init).parameters)[1:]

    @functools.wraps(init)
    def checked(self: Any, *arguments: Any, **keywords: Any) -> None:
        for name in keywords:
            if name not in known:
                hint = instead_of(name, known, type(self).config_class)
                raise TypeError(f"{type(self).__name__} has no argument {name!r}.{hint}")
        init(self, *arguments, **keywords)

    return checked  # pyright: ignore[reportReturnType] (functools.wraps loses the signature)


def instead_of(name: str, known: list[str], config_class: type[GRPOConfig]) -> str:
    """Return a sentence about what to use instead of the argument `name`."""
    options = [field.name for field in dataclasses.fields(config_class)]
    if name in RENAMED:
        return f" It is called {RENAMED[name]} here."
    if name in options:
        return f" It is an option: args={config_class.__name__}({name}=...)."
    return advice(name, known)


def refuse_later_arguments(**arguments: object) -> None:
    """Raise a ValueError for arguments of the documented interface that are not there yet."""
    for name, value in arguments.items():
        if value is not None:
            raise ValueError(
                f"The argument {name!r} is not available yet. Leave it out: rewards can be "
                "computed from the completions without it. CHANGELOG.md says when it comes."
            )


def checked_model(model: object) -> str | PreTrainedModel:
    """Return a model's name or path as text, or the model itself; raise a TypeError for others."""
    if isinstance(model, os.PathLike):
        return os.fspath(model)
    if not isinstance(model, str | nn.Module):
        raise TypeError(
            f"model={model!r} ({type(model).__name__}) is neither a name or path nor a model."
        )
    return cast("str | PreTrainedModel", model)  # or what a PeftModel or a test puts around one


def checked_args(
    args: object, config_class: type[GRPOConfig], model: str | nn.Module, *, trainer: str
) -> GRPOConfig:
    """Return the config of a trainer.

    Args:
        args: None takes the defaults, and the folder "{model}-{algorithm}".
        config_class: What the trainer needs.
        trainer: Its name, for messages.

    Raises:
        TypeError: If `args` is a config of another trainer.
    """
    if args is None:
        name = model if isinstance(model, str) else name_of(model) or "model"
        return config_class(f"{name.rstrip('/').split('/')[-1]}-{config_class.algorithm.upper()}")

    if not isinstance(args, config_class):
        why = " Their clip windows don't mean the same." if isinstance(args, GRPOConfig) else ""
        raise TypeError(
            f"{trainer} needs a {config_class.__name__}, got a {type(args).__name__}.{why}"
        )

    if args.clip_window_is_inert and args.algorithm == "gmpo":
        warnings.warn(
            "Each collection makes a single optimizer step (steps_per_generation="
            f"{args.steps_per_generation}, num_iterations={args.num_iterations}, "
            f"gradient_accumulation_steps={args.gradient_accumulation_steps}): the policy is still "
            "the one that sampled, every log-ratio is 0, and GMPO equals GRPO. For GMPO's clip "
            "window to act, set steps_per_generation to several times gradient_accumulation_steps.",
            stacklevel=4,  # past the check of the arguments
        )
    for question in questionable_options(args, algorithm=args.algorithm):
        warnings.warn(question, stacklevel=4)
    return args


def name_of(model: nn.Module) -> str:
    """Return the name or path that a model was loaded from, or ""."""
    return getattr(getattr(model, "config", None), "_name_or_path", "") or ""


def tokenizer_of(
    processing_class: object, model: str | nn.Module, args: GRPOConfig
) -> PreTrainedTokenizerBase:
    """Return the tokenizer: the given one, a given processor's, or the model's own.

    Raises:
        TypeError: If `processing_class` is neither.
    """
    tokenizer = getattr(processing_class, "tokenizer", None) or processing_class
    if tokenizer is not None:
        if not isinstance(tokenizer, PreTrainedTokenizerBase):
            raise TypeError(
                f"processing_class={processing_class!r} ({type(processing_class).__name__}) is not "
                "a tokenizer and holds none. Pass AutoTokenizer.from_pretrained(...)."
            )
        return tokenizer

    name = model if isinstance(model, str) else name_of(model)
    if not name:
        raise ValueError(
            "The model does not say where its tokenizer is. "
            "Pass processing_class=AutoTokenizer.from_pretrained(...)."
        )
    revision = (args.model_init_kwargs or {}).get("revision")  # pyright: ignore[reportAttributeAccessIssue] (the config has read JSON text)
    return load_tokenizer(name, trust_remote_code=args.trust_remote_code, revision=revision)


def usable_prompts(
    train_dataset: AnyDataset | None,
    eval_dataset: AnyDataset | Mapping[str, AnyDataset] | None,
    encoder: PromptEncoder,
) -> tuple[Any, Any]:
    """Check presence, form and length of the prompts, and return the datasets to use.

    Raises:
        ValueError: Names the dataset and the row.
    """
    named = named_datasets(eval_dataset)
    for name, rows in {"train_dataset": train_dataset, **named}.items():
        check_kind(rows, name)
        check_dataset(rows, encoder.form, name=name)

    train_dataset = fitting(train_dataset, encoder, name="train_dataset")
    named = {name: fitting(rows, encoder, name=name) for name, rows in named.items()}
    if isinstance(eval_dataset, dict):
        return train_dataset, dict(zip(eval_dataset, named.values(), strict=True))
    return train_dataset, next(iter(named.values()), None)


def check_kind(dataset: object, name: str) -> None:
    """Raise a TypeError for what is no dataset, with how to make one of it.

    A dataset has a length and rows by number, or can be iterated over again and again.  A dict of
    datasets is `check_dataset`'s to refuse.
    """
    if dataset is None:
        return

    if isinstance(dataset, str | os.PathLike):
        remedy = "Load it: datasets.load_dataset('json', data_files=...)"
    elif hasattr(dataset, "iloc"):
        remedy = "Use datasets.Dataset.from_pandas(...)"
    elif hasattr(dataset, "__next__"):
        remedy = (
            "It can be read only once: use datasets.IterableDataset.from_generator(function), or "
            "a list"
        )
    elif isinstance(dataset, Mapping):
        if any(hasattr(rows, "column_names") for rows in dataset.values()):
            return
        remedy = "Of columns, use datasets.Dataset.from_dict(...)"
    elif isinstance(dataset, list | tuple) and not all(isinstance(r, Mapping) for r in dataset):
        remedy = (
            "Its items must be rows, {'prompt': ...}. Several datasets for evaluation are a dict "
            "{name: dataset}"
        )
    elif hasattr(dataset, "__getitem__") or hasattr(dataset, "__iter__"):
        return
    else:
        remedy = "Use a datasets.Dataset, or a list of rows {'prompt': ...}"
    kind = type(dataset).__name__
    raise TypeError(f"{name} is a {kind}, which is not a dataset of rows. {remedy}.")


def check_datasets(train_dataset: AnyDataset | None, args: GRPOConfig) -> CollectionSize:
    """Check the number of the prompts, and return the sizes of a collection.

    Raises:
        ValueError: If they are too few, or a stream can't be used as the options say.
    """
    collection = CollectionSize(
        args.num_generations, args.rows_per_collection, args.micro_steps_per_collection
    )
    if train_dataset is None:
        return collection
    if is_map_style(train_dataset):
        collection.require(len(train_dataset))
        return collection

    if args.max_steps <= 0:
        raise ValueError(
            f"max_steps={args.max_steps} with an iterable train_dataset: nobody knows how long an "
            "epoch is. Set max_steps to a positive number."
        )
    if args.shuffle_dataset and not hasattr(train_dataset, "shuffle"):
        raise ValueError(
            f"shuffle_dataset=True needs a train_dataset that can be shuffled, and "
            f"{type(train_dataset).__name__} has no shuffle(). Set shuffle_dataset=False for its "
            "own order, or use a datasets.IterableDataset."
        )
    if args.dataloader_num_workers:
        raise ValueError(
            f"dataloader_num_workers={args.dataloader_num_workers} with an iterable train_dataset: "
            "each worker would read all of it. Leave dataloader_num_workers at 0, or give a "
            "map-style dataset."
        )
    if args.zero_signal_groups == "resample":
        raise ValueError(
            "zero_signal_groups='resample' draws other prompts, which an iterable train_dataset "
            "can't give. Use a map-style dataset, or zero_signal_groups='skip'."
        )
    return collection


def check_tokens(encoder: PromptEncoder) -> None:
    """Raise a ValueError if the tokenizer pads or ends with tokens that the model does not know."""
    size = encoder.num_model_tokens
    for name, token in (("pad", encoder.pad), *(("end", token) for token in encoder.eos)):
        if size is not None and token >= size:
            raise ValueError(
                f"The tokenizer's {name} token has the number {token}, but the model knows only "
                f"{size} tokens. Call model.resize_token_embeddings(len(tokenizer)) and pass the "
                "model, or use a token that it knows."
            )


def check_reward_columns(
    sources: list[RewardSource], train_dataset: AnyDataset | None, args: GRPOConfig
) -> None:
    """Raise a ValueError if a reward function needs a column that is not in the training set."""
    rows = kept_columns(train_dataset, remove_unused=bool(args.remove_unused_columns))
    columns = getattr(rows, "column_names", None)
    for source in sources:
        if columns is not None and isinstance(source, FunctionReward):
            source.check_columns(columns)


def named_datasets(eval_dataset: AnyDataset | Mapping[str, AnyDataset] | None) -> dict[str, Any]:
    """Return the evaluation sets by the names that messages give them."""
    if eval_dataset is None:
        return {}
    if isinstance(eval_dataset, dict):
        return {f"eval_dataset[{name!r}]": rows for name, rows in eval_dataset.items()}
    return {"eval_dataset": eval_dataset}


def warn_if_nothing_is_sharded(args: GRPOConfig, *, is_sharded: bool) -> None:
    """Warn of `fsdp` where accelerate does not shard."""
    if args.fsdp and not is_sharded:
        warnings.warn(
            f"fsdp={args.fsdp!r} does nothing here: accelerate shards among several processes with "
            f"accelerators, and this is {args.world_size} on {args.device.type}. Each process "
            "holds the whole model.",
            stacklevel=4,  # past the check of the arguments
        )


def reward_model_settings(args: GRPOConfig) -> RewardModelSettings:
    """Return the options that reward models are loaded and run with."""
    return RewardModelSettings(
        init_kwargs=cast(dict[str, Any], args.model_init_kwargs),
        trust_remote_code=args.trust_remote_code,
        chat_template_kwargs=cast(dict[str, Any], args.chat_template_kwargs),
        device=args.device,
    )
