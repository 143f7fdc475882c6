"""Checks of a dataset's rows."""

from collections.abc import Iterable, Mapping
from typing import Any

Row = Mapping[str, Any]


class PromptForm:
    """The form of a dataset's prompts: texts, or lists of messages.  The first row that is seen decides.

    Args:
        tokenizer: With a chat template, if there are messages.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.conversational: bool | None = None

    def check_all(self, rows: Iterable[Row]) -> None:
        """Check every row of `rows`, numbered from 0, without tokenising."""
        for number, row in enumerate(rows):
            self.check(row, number)

    def check(self, row: Row, number: int) -> None:
        """Raise a ValueError that names row `number` if its prompt is missing, empty or of another form."""
        if "prompt" not in row:
            raise ValueError(
                f"Row {number} has no `prompt`; its columns are {sorted(row)}. "
                "Rename the column that holds the prompt."
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

    def _decide(self, messages: bool) -> None:
        if messages and not getattr(self.tokenizer, "chat_template", None):
            raise ValueError(
                "The prompts are messages, but the tokenizer has no chat template. Use an "
                "instruction-tuned model, set tokenizer.chat_template, or give the prompts as text."
            )
        self.conversational = messages


def is_messages(prompt: Any) -> bool:
    """Whether a prompt is a list of messages (an empty list counts)."""
    return isinstance(prompt, list) and all(isinstance(m, Mapping) and "role" in m for m in prompt)


def parts_of(message: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The blocks of a message whose content is a list of them; none for plain text."""
    content = message.get("content")
    return (
        [part for part in content if isinstance(part, Mapping)] if isinstance(content, list) else []
    )


def shown(prompt: Any, width: int = 80) -> str:
    text = repr(prompt)
    return text if len(text) <= width else text[:width] + "..."


def check_dataset(dataset: Any, form: PromptForm, *, name: str = "train_dataset") -> None:
    """Check presence and form of every prompt of a dataset, without tokenising.

    Of a dataset that is made as it is read (iterable, or with a transform) this looks at the columns only; `encode`
    checks its rows as they come.

    Raises:
        ValueError: As `PromptEncoder.encode`, naming the dataset and the row.
    """
    if dataset is None:
        return
    if isinstance(dataset, Mapping):
        splits = [repr(split) for split in dataset]
        raise ValueError(
            f"{name} is a dict of datasets ({', '.join(splits)}). Pass one of them: dataset[{splits[0]}]."
        )
    if hasattr(dataset, "__len__") and not len(dataset):
        raise ValueError(f"{name} is empty: there is no prompt.")
    columns = getattr(dataset, "column_names", None)
    made_as_read = (
        not hasattr(dataset, "__len__") or getattr(dataset, "format", {}).get("type") == "custom"
    )
    try:
        if columns is not None and "prompt" not in columns:
            form.check_all([dict.fromkeys(columns)])
        elif not made_as_read:
            rows = (
                dataset if columns is None else ({"prompt": prompt} for prompt in dataset["prompt"])
            )
            form.check_all(rows)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
