"""The arguments of the trainers: unknown ones are refused with what to use."""

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Any

from gmpo.option import advice

RENAMED = {  # what other trainers, or older ones, call an argument -> its name
    "tokenizer": "processing_class",
    "config": "args",
    "training_args": "args",
    "dataset": "train_dataset",
    "reward_func": "reward_funcs",
    "reward_model": "reward_funcs",
    "reward_tokenizer": "reward_processing_classes",
}


def known_arguments_only(init: Callable[..., None]) -> Callable[..., None]:
    """`__init__` of a trainer, with an error for other arguments that says what to use in their place."""
    known = list(inspect.signature(init).parameters)[1:]

    @functools.wraps(init)
    def checked(self: Any, *arguments: Any, **keywords: Any) -> None:
        for name in keywords:
            if name not in known:
                raise TypeError(
                    f"{type(self).__name__} has no argument {name!r}.{instead_of(name, known, type(self))}"
                )
        init(self, *arguments, **keywords)

    return checked


def instead_of(name: str, known: list[str], trainer: Any) -> str:
    options = [field.name for field in dataclasses.fields(trainer.config_class)]
    if name in RENAMED:
        return f" It is called {RENAMED[name]} here."
    if name in options:
        return f" It is an option: args={trainer.config_class.__name__}({name}=...)."
    return advice(name, known)


def refuse_later_arguments(**arguments: Any) -> None:
    """Raise a ValueError for arguments of the documented interface that are not there yet."""
    for name, value in arguments.items():
        if value is not None:
            raise ValueError(f"The argument {name} is not available yet. Leave it out.")


def check_workers(train_dataset: Any, num_workers: int) -> None:
    """Raise a ValueError for workers beside an iterable dataset: each of them would read all of it."""
    if num_workers and train_dataset is not None and not hasattr(train_dataset, "__len__"):
        raise ValueError(
            f"dataloader_num_workers={num_workers} with an iterable train_dataset: each worker would read all of it. "
            "Leave dataloader_num_workers at 0, or give a map-style dataset."
        )
