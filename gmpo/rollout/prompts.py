"""Dataset rows to prompts, and completion tokens back to text or messages."""

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from transformers import AutoConfig, GenerationConfig

from gmpo.rollout.settings import RolloutSettings
from gmpo.types import Messages, Prompt

Row = Mapping[str, Any]


class PromptEncoder:
    """Turns the `prompt` of dataset rows into tokens, and completions into the form of their prompt.

    A dataset holds texts or lists of messages, not both: the first row that the encoder sees decides.

    Args:
        tokenizer: With a chat template, if there are messages.
        settings: For chat_template_kwargs and max_completion_length.
        eos: Every token that ends a completion.
        pad: The token that fills rectangles.
        context_length: Tokens that the model can hold; None: not limited.
    """

    def __init__(
        self,
        tokenizer: Any,
        settings: RolloutSettings,
        *,
        eos: Sequence[int],
        pad: int,
        context_length: int | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.eos = tuple(eos)
        self.pad = pad
        self.template_kwargs = dict(settings.chat_template_kwargs or {})  # type: ignore[arg-type]
        self.max_completion_length = settings.max_completion_length
        self.context_length = context_length
        self.conversational: bool | None = None

    @classmethod
    def build(cls, tokenizer: Any, model: Any, settings: RolloutSettings) -> "PromptEncoder":
        """An encoder for a model given as an object, or by name or path (of which only the config is read).

        Raises:
            ValueError: Nothing could end a completion, or nothing could pad one.
        """
        config, defaults = configs(model, settings)
        return cls(
            tokenizer,
            settings,
            eos=ending_tokens(tokenizer, defaults),
            pad=padding_token(tokenizer),
            context_length=context_length(config),
        )

    def check(self, rows: Iterable[Row], *, first: int = 0) -> None:
        """Raise the ValueError that `encode` would raise for the form of a row, without tokenising.

        Args:
            first: Number of the first row, for the message.
        """
        for number, row in enumerate(rows, first):
            self._check_form(row, number)

    def encode(self, rows: Sequence[Row]) -> list[Prompt]:
        """One Prompt per row; equal rows share one object.

        Raises:
            ValueError: A row without a prompt, an empty one, texts among messages, messages without a chat template, or
                a prompt that leaves no room for max_completion_length in the model's context.
        """
        known: dict[str, Prompt] = {}
        prompts = []
        for number, row in enumerate(rows):
            self._check_form(row, number)
            key = json.dumps(
                [row["prompt"], row.get("chat_template_kwargs")], sort_keys=True, default=str
            )
            if key not in known:
                known[key] = Prompt(ids=self._ids(row, number), source=row["prompt"])
            prompts.append(known[key])
        return prompts

    def decode(self, prompt: Prompt, ids: Sequence[int]) -> str | Messages:
        """Completion tokens in the form of their prompt: text, or one assistant message.  No special tokens."""
        ids = list(ids[:-1] if ids and ids[-1] in self.eos else ids)
        text = self.tokenizer.decode(ids, skip_special_tokens=True)
        return text if isinstance(prompt.source, str) else [{"role": "assistant", "content": text}]

    def _check_form(self, row: Row, number: int) -> None:
        if "prompt" not in row:
            raise ValueError(
                f"Row {number} has no `prompt`; its columns are {sorted(row)}. Rename the column that holds the prompt."
            )
        prompt = row["prompt"]
        messages = is_messages(prompt)
        if not messages and not isinstance(prompt, str):
            raise ValueError(
                f"The prompt of row {number} is {shown(prompt)}. It must be a text, or a list of messages "
                "[{'role': ..., 'content': ...}, ...]."
            )
        if not prompt:
            raise ValueError(
                f"The prompt of row {number} is empty. Remove the row from the dataset."
            )
        if self.conversational is None:
            self._decide(messages)
        if messages != self.conversational:
            kinds = ("messages", "a text") if messages else ("a text", "messages")
            raise ValueError(
                f"The prompt of row {number} is {kinds[0]}, but the rows before it hold {kinds[1]}: {shown(prompt)}. "
                "Use one form in the whole dataset."
            )

    def _decide(self, messages: bool) -> None:
        if messages and not getattr(self.tokenizer, "chat_template", None):
            raise ValueError(
                "The prompts are messages, but the tokenizer has no chat template. Use an instruction-tuned model, set "
                "tokenizer.chat_template, or give the prompts as text."
            )
        self.conversational = messages

    def _ids(self, row: Row, number: int) -> list[int]:
        prompt = row["prompt"]
        ids = self._text_ids(prompt) if isinstance(prompt, str) else self._message_ids(row, number)
        if not ids:
            raise ValueError(
                f"The prompt of row {number} has no tokens: {shown(prompt)}. Remove the row."
            )
        room = (
            None
            if self.context_length is None
            else self.context_length - self.max_completion_length
        )
        if room is not None and len(ids) > room:
            raise ValueError(
                f"The prompt of row {number} has {len(ids)} tokens. The model's context of {self.context_length} "
                f"tokens less max_completion_length={self.max_completion_length} leaves {room}. Shorten it, drop "
                f"the row, or lower max_completion_length. It begins {shown(prompt)}"
            )
        return ids

    def _text_ids(self, text: str) -> list[int]:
        """Tokens with the tokenizer's special tokens, but no second bos and no closing eos."""
        tokenizer = self.tokenizer
        ids = list(tokenizer(text)["input_ids"])
        bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
        if bos is not None and ids[:2] == [bos, bos] and text.startswith(tokenizer.bos_token):
            ids = ids[1:]
        if (
            eos is not None
            and len(ids) > 1
            and ids[-1] == eos
            and not text.endswith(tokenizer.eos_token)
        ):
            ids = ids[:-1]
        return ids

    def _message_ids(self, row: Row, number: int) -> list[int]:
        messages = row["prompt"]
        kinds = {part.get("type") for message in messages for part in parts_of(message)} - {"text"}
        if kinds:
            raise ValueError(
                f"The prompt of row {number} holds {', '.join(f'an {kind}' for kind in sorted(map(str, kinds)))}. Only "
                "text is supported: remove it."
            )
        continued = messages[-1]["role"] == "assistant"
        from jinja2 import TemplateError

        try:
            ids = self.tokenizer.apply_chat_template(
                messages,
                tokenize=True,
                return_dict=False,
                add_generation_prompt=not continued,
                continue_final_message=continued,
                **{**self.template_kwargs, **(row.get("chat_template_kwargs") or {})},
            )
        except TemplateError as error:
            raise ValueError(
                f"The chat template refuses the prompt {shown(messages)}: {error}"
            ) from error
        return list(ids)


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


def check_dataset(dataset: Any, encoder: PromptEncoder, *, name: str = "train_dataset") -> None:
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
            encoder.check([dict.fromkeys(columns)])
        elif not made_as_read:
            rows = (
                dataset if columns is None else ({"prompt": prompt} for prompt in dataset["prompt"])
            )
            encoder.check(rows)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


def configs(model: Any, settings: Any) -> tuple[Any, Any]:
    """Config and generation config (None: there is none) of a model given as an object, or by name or path."""
    if not isinstance(model, str):
        return model.config, getattr(model, "generation_config", None)
    wanted = getattr(settings, "model_init_kwargs", None) or {}
    where = {
        name: wanted[name]
        for name in ("revision", "cache_dir", "token", "subfolder")
        if name in wanted
    }
    trust = getattr(settings, "trust_remote_code", False) or wanted.get("trust_remote_code", False)
    config = AutoConfig.from_pretrained(model, trust_remote_code=trust, **where)
    try:
        return config, GenerationConfig.from_pretrained(model, **where)
    except OSError:
        return config, None


def context_length(config: Any) -> int | None:
    """Tokens that a model can hold, from its config; None: it says nothing."""
    length = getattr(config.get_text_config(), "max_position_embeddings", None)
    return length if isinstance(length, int) and length > 0 else None


def ending_tokens(tokenizer: Any, generation_config: Any = None) -> tuple[int, ...]:
    """Every token that ends a completion: the tokenizer's, then those of the model's generation config.

    Raises:
        ValueError: There is none.
    """
    of_model = getattr(generation_config, "eos_token_id", None)
    of_model = of_model if isinstance(of_model, list | tuple) else [of_model]
    tokens = [token for token in (tokenizer.eos_token_id, *of_model) if token is not None]
    if not tokens:
        raise ValueError(
            "Neither the tokenizer nor the model's generation config has an end-of-sequence token, so no completion "
            "could end. Set tokenizer.eos_token."
        )
    return tuple(dict.fromkeys(int(token) for token in tokens))


def padding_token(tokenizer: Any) -> int:
    """The token that fills rectangles: pad, else eos.

    Raises:
        ValueError: The tokenizer has neither.
    """
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    raise ValueError(
        "The tokenizer has neither a pad token nor an eos token. Set tokenizer.pad_token."
    )
