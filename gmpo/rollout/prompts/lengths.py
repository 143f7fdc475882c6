"""Prompts that are longer than the model's context allows, found before training."""

import logging
from collections.abc import Iterator
from typing import Any

from datasets import Dataset, IterableDataset
from datasets.fingerprint import Hasher
from torch.utils.data import Subset

from gmpo.rollout.prompts.dataset import made_as_read, prompts_of
from gmpo.rollout.prompts.encoder import PromptEncoder

logger = logging.getLogger(__name__)


def fitting(dataset: Any, encoder: PromptEncoder, *, name: str = "train_dataset") -> Any:
    """Return the dataset without prompts that are too long, as `overlong_prompts` says.

    The prompts of a map-style dataset are all looked at; a dataset that is read from files
    remembers the answer beside them.  A stream is looked at as it comes.

    Raises:
        ValueError: If a prompt is too long and overlong_prompts is "error", if all are, or if the
            chat template refuses a prompt.
    """
    if dataset is None or encoder.room is None or encoder.overlong_prompts == "truncate_left":
        return dataset

    if made_as_read(dataset):
        if encoder.overlong_prompts == "drop":
            return _filtered(dataset, encoder, name)
        return dataset

    overlong = dict(_overlong(dataset, encoder, name))
    if not overlong:
        return dataset
    number, tokens = next(iter(overlong.items()))
    found = (
        f"{name}: {len(overlong)} of {len(dataset)} prompts are too long. The first is the prompt "
        f"of row {number} with {tokens} tokens"
    )
    if encoder.overlong_prompts == "error" or len(overlong) == len(dataset):
        raise ValueError(f"{found}. {encoder.overlong_remedy()}.")

    logger.warning("%s. They are left out.", found)
    kept = [number for number in range(len(dataset)) if number not in overlong]
    return dataset.select(kept) if hasattr(dataset, "select") else Subset(dataset, kept)


def _overlong(dataset: Any, encoder: PromptEncoder, name: str) -> Iterator[tuple[int, int]]:
    """Yield number and tokens of every prompt of a map-style dataset that is too long."""
    try:
        rows = prompts_of(dataset)
        if isinstance(rows, Dataset) and rows.cache_files:
            tokens = _remembered(rows, encoder)
        else:
            tokens = (encoder.overlong_tokens(row, number) for number, row in enumerate(rows))
        yield from ((number, count) for number, count in enumerate(tokens) if count)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


def _remembered(rows: Dataset, encoder: PromptEncoder) -> list[int]:
    """Return `overlong_tokens` of every row, out of the dataset's own cache if it is there."""
    template, tokenizer = encoder.template, encoder.tokenizer
    decides = (
        *(rows._fingerprint, encoder.room, encoder.num_model_tokens, template.keywords),
        *(type(tokenizer).__name__, tokenizer.name_or_path, len(tokenizer)),
        getattr(tokenizer, "chat_template", None),
    )
    counted = rows.map(
        lambda row, number: {"tokens": encoder.overlong_tokens(row, number)},
        with_indices=True,
        remove_columns=rows.column_names,
        new_fingerprint=Hasher.hash(decides),
        desc="Measuring prompts",
    )
    return counted["tokens"][:]


def _filtered(dataset: Any, encoder: PromptEncoder, name: str) -> Any:
    """Return a dataset that is made as it is read, without the prompts that are too long."""
    if not isinstance(dataset, Dataset | IterableDataset):
        raise ValueError(
            f"overlong_prompts='drop' can't leave rows out of {name}, a {type(dataset).__name__}. "
            "Use a datasets.IterableDataset, or set overlong_prompts='truncate_left'."
        )
    if isinstance(dataset, Dataset):
        return dataset  # its rows change as they are read: `encode` names one that is too long
    return dataset.filter(lambda row: not encoder.overlong_tokens(row, 0))
