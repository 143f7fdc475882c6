"""Data loaders that deal the rows of collections to the ranks, for training and for evaluation."""

from typing import Any, Protocol

from torch.utils.data import DataLoader, Dataset
from transformers import TrainingArguments

from gmpo.data.sampler import (
    CollectionSampler,
    CollectionSize,
    EvalSampler,
    KeyedRows,
    StreamedRows,
    as_rows,
)
from gmpo.types import AnyDataset, MapStyleDataset, is_map_style

PROMPT_COLUMNS = ("prompt", "chat_template_kwargs")  # that gmpo itself reads


class EpochListener(Protocol):
    """A sampler or dataset that orders the rows of an epoch."""

    def set_epoch(self, epoch: int) -> None:
        """Take the order of `epoch`, from 0."""
        ...


class PromptRows(Dataset):
    """A map-style dataset without the columns that gmpo itself does not read."""

    def __init__(self, dataset: MapStyleDataset):
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = self.dataset[index]
        return {name: row[name] for name in PROMPT_COLUMNS if name in row}


def kept_columns(dataset: Any, *, remove_unused: bool) -> Any:
    """Return `dataset` without the columns that gmpo does not read, if those are unwanted."""
    if dataset is None or not remove_unused:
        return dataset
    columns = getattr(dataset, "column_names", None)
    if columns is not None and hasattr(dataset, "select_columns"):
        return dataset.select_columns([name for name in PROMPT_COLUMNS if name in columns])
    if is_map_style(dataset):
        return PromptRows(dataset)
    raise ValueError(
        f"remove_unused_columns=True can't take columns from a {type(dataset).__name__}, whose "
        "columns are not known. Leave it at False, or use a datasets.IterableDataset with features."
    )


def training_loader(
    dataset: Any,
    collection: CollectionSize,
    args: TrainingArguments,
    *,
    shuffle: bool,
) -> tuple[DataLoader, EpochListener]:
    """Return a loader of collections, each served once per micro-step, and what orders its epochs.

    Of a map-style dataset it gives the shares of all ranks in turn, for `accelerate` to deal; of an
    iterable one likewise, row by row.

    Args:
        dataset: Map-style or iterable.
        collection: Sizes of a collection.
        args: For ranks, seeds and workers.
        shuffle: Visit the prompts in a seeded order.
    """
    seed = args.seed if args.data_seed is None else args.data_seed
    ranks = args.world_size

    if hasattr(dataset, "__len__"):
        sampler = CollectionSampler(
            len(dataset), collection, ranks=ranks, seed=seed, shuffle=shuffle
        )
        loader = DataLoader(KeyedRows(dataset), batch_sampler=sampler, **_worker_options(args))
        return loader, sampler

    if shuffle:
        dataset = dataset.shuffle(seed=seed)
    stream = StreamedRows(dataset, collection, ranks=ranks)
    loader = DataLoader(
        stream,
        batch_size=collection.rows // ranks,
        drop_last=True,
        **_worker_options(args),
    )
    return loader, stream


def evaluation_dataset(given: Any, datasets: Any) -> Any:
    """Return the dataset to evaluate on: the one given, by itself or by its name, or the trainer's.

    Raises:
        ValueError: If there is none.
    """
    dataset = datasets if given is None else given
    if isinstance(dataset, str):
        dataset = datasets[dataset]
    if dataset is None:
        raise ValueError(
            "Evaluation needs an eval_dataset. Pass one to the trainer or to evaluate()."
        )
    return dataset


def evaluation_loader(
    dataset: AnyDataset, *, group_size: int, rows_per_rank: int, args: TrainingArguments
) -> DataLoader:
    """Return a loader of every prompt of the dataset, `group_size` times in a row, for this rank.

    Args:
        dataset: Map-style, or iterable (then it is read into memory).
        group_size: Completions per prompt.
        rows_per_rank: Completions of a batch on each rank; a batch over all ranks holds whole
            groups.
        args: For ranks and workers.
    """
    rows = rows_per_rank * args.world_size
    batch = CollectionSize(group_size, max(rows - rows % group_size, group_size), micro_steps=1)
    if not is_map_style(dataset):
        dataset = list(dataset)

    sampler = EvalSampler(
        len(dataset),
        batch,
        rank=args.process_index,
        ranks=args.world_size,
        drop_last=args.dataloader_drop_last,
    )
    return DataLoader(KeyedRows(dataset), batch_sampler=sampler, **_worker_options(args))


def _worker_options(args: TrainingArguments) -> dict[str, Any]:
    return {
        "collate_fn": as_rows,
        "num_workers": args.dataloader_num_workers,
        "persistent_workers": args.dataloader_persistent_workers,
        "prefetch_factor": args.dataloader_prefetch_factor,
        "multiprocessing_context": args.dataloader_multiprocessing_context,
        "pin_memory": args.dataloader_pin_memory,
    }
