"""Checks of a dataset's rows."""

from collections.abc import Iterable, Mapping
from typing import Any

from transformers import PreTrainedTokenizerBase

from gmpo.rollout.prompts.messages import is_messages, unsupported_reason, without_nulls
from gmpo.types import AnyDataset, is_map_style

Row = Mapping[str, Any]

IMAGE_COLUMNS = ("image", "images")  # what multimodal datasets call them


class PromptForm:
    """The form of a dataset's prompts: texts, or lists of messages.

    The first row that is seen decides.

    Args:
        tokenizer: With a chat template, if there are messages.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self.conversational: bool | None = None

    def check_all(self, rows: Iterable[Row]) -> None:
        """Check every row of `rows`, numbered from 0, without tokenising."""
        for number, row in enumerate(rows):
            self.check(row, number)

    def check(self, row: Row, number: int) -> None:
        """Raise a ValueError that names row `number` if its prompt can't be used.

        A prompt is missing, empty, of another form than those before it, or holds messages without
        text.
        """
        if "prompt" not in row:
            raise ValueError(
                f"Row {number} has no `prompt`; its columns are {sorted(row)}. "
                "Rename the column that holds the prompt."
            )

        for column in IMAGE_COLUMNS:
            if row.get(column) is not None:
                raise ValueError(
                    f"Row {number} has a column {column!r}, and gmpo does not train on images. "
                    f"Remove the column to train on the text: dataset.remove_columns({column!r})."
                )

        prompt = row["prompt"]
        messages = is_messages(prompt)
        if not messages and not isinstance(prompt, str):
            raise ValueError(
                f"The prompt of row {number} is {shown(prompt)}. It must be a text, or a list of "
                "messages [{'role': ..., 'content': ...}, ...]."
            )
        if not prompt:
            raise ValueError(
                f"The prompt of row {number} is empty. Remove the row from the dataset."
            )

        if self.conversational is None:
            self._decide(messages)
        if messages != self.conversational:
            found, before = ("messages", "a text") if messages else ("a text", "messages")
            raise ValueError(
                f"The prompt of row {number} is {found}, but the rows before it hold {before}: "
                f"{shown(prompt)}. Use one form in the whole dataset."
            )

        if not isinstance(prompt, str):
            reason = unsupported_reason(without_nulls(prompt))
            if reason is not None:
                raise ValueError(f"The prompt of row {number} {reason}.")

    def _decide(self, messages: bool) -> None:
        if messages and not getattr(self.tokenizer, "chat_template", None):
            raise ValueError(
                "The prompts are messages, but the tokenizer has no chat template. Use an "
                "instruction-tuned model, set tokenizer.chat_template, or give the prompts as text."
            )
        self.conversational = messages


def check_dataset(
    dataset: AnyDataset | Mapping[str, AnyDataset] | None,
    form: PromptForm,
    *,
    name: str = "train_dataset",
) -> None:
    """Check presence and form of every prompt of a dataset, without tokenising.

    Of a dataset that is made as it is read (iterable, or with a transform) this looks at the
    columns only; `encode` checks its rows as they come.

    Raises:
        ValueError: As `PromptEncoder.encode`, naming the dataset and the row.
    """
    if dataset is None:
        return
    if isinstance(dataset, Mapping):
        splits = [repr(split) for split in dataset]
        raise ValueError(
            f"{name} is a dict of datasets ({', '.join(splits)}). "
            f"Pass one of them: dataset[{splits[0]}]."
        )
    if is_map_style(dataset) and not len(dataset):
        raise ValueError(f"{name} is empty: there is no prompt.")

    columns = getattr(dataset, "column_names", None)
    for column in IMAGE_COLUMNS:
        if column in (columns or ()):
            raise ValueError(
                f"{name} has a column {column!r}, and gmpo does not train on images. Remove the "
                f"column to train on the text: dataset.remove_columns({column!r})."
            )
    try:
        if columns is not None and "prompt" not in columns:
            form.check_all([dict.fromkeys(columns)])
        elif not made_as_read(dataset):
            form.check_all(prompts_of(dataset))
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


def made_as_read(dataset: object) -> bool:
    """Return whether reading all rows would be work for nothing: a stream, or a transform."""
    if not is_map_style(dataset):
        return True
    return getattr(dataset, "format", {}).get("type") == "custom"


def prompts_of(dataset: Any) -> Iterable[Row]:
    """Return the rows of a map-style dataset, with the columns that prompts are made of."""
    if getattr(dataset, "column_names", None) is None:
        return (dataset[number] for number in range(len(dataset)))
    names = [c for c in ("prompt", "chat_template_kwargs") if c in dataset.column_names]
    return dataset.select_columns(names)


def row_number(row: Row, position: int) -> int:
    """Return the number of a row in its dataset, or `position` if it does not know."""
    return getattr(row, "number", position)


def shown(prompt: object, width: int = 80) -> str:
    """Return the beginning of a prompt for an error message."""
    text = repr(prompt)
    return text if len(text) <= width else text[:width] + "..."
