"""Dataset rows to prompts, and completion tokens back to text or messages."""

import json
from collections.abc import Sequence
from typing import Any

from gmpo.rollout.prompts.dataset import PromptForm, Row, parts_of, shown
from gmpo.rollout.prompts.model_facts import configs, context_length, ending_tokens, padding_token
from gmpo.rollout.settings import RolloutSettings
from gmpo.types import Messages, Prompt


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
        self.form = PromptForm(tokenizer)

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

    def encode(self, rows: Sequence[Row]) -> list[Prompt]:
        """One Prompt per row; equal rows share one object.

        Raises:
            ValueError: A row without a prompt, an empty one, texts among messages, messages without a chat template, or
                a prompt that leaves no room for max_completion_length in the model's context.
        """
        known: dict[str, Prompt] = {}
        prompts = []
        for number, row in enumerate(rows):
            self.form.check(row, number)
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
