"""Dataset rows to prompts, and completion tokens back to text or messages."""

import json
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from gmpo.rollout.prompts.chat_template import ChatTemplate, opened_by_text
from gmpo.rollout.prompts.dataset import PromptForm, Row, row_number, shown
from gmpo.rollout.prompts.messages import without_nulls
from gmpo.rollout.prompts.model_facts import configs, context_length, ending_tokens, padding_token
from gmpo.rollout.sampling import completion_budget
from gmpo.rollout.settings import RolloutSettings
from gmpo.types import Messages, Prompt

Rendered = TypeVar("Rendered")

SPECIAL_TOKENS = 16  # that a tokenizer adds to a text, at most


class PromptEncoder:
    """Turns the `prompt` of dataset rows into tokens, and completion tokens into what it holds.

    A dataset holds texts or lists of messages, not both: the first row that is seen decides.

    Args:
        tokenizer: With a chat template, if there are messages.
        settings: For chat_template_kwargs, overlong_prompts and the tokens of a completion.
        eos: Every token that ends a completion.
        pad: The token that fills rectangles.
        context_length: Tokens that the model can hold; None if they are not limited.
        num_model_tokens: Different tokens that the model has embeddings for; None if unknown.

    Raises:
        ValueError: If a completion alone fills the model's context.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        settings: RolloutSettings,
        *,
        eos: Sequence[int],
        pad: int,
        context_length: int | None = None,
        num_model_tokens: int | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.eos = tuple(eos)
        self.pad = pad
        self.overlong_prompts = settings.overlong_prompts
        self.budget = completion_budget(settings)
        self.context_length = context_length
        self.num_model_tokens = num_model_tokens
        self.form = PromptForm(tokenizer)

        keywords: Any = settings.chat_template_kwargs or {}
        self.template = ChatTemplate(tokenizer, keywords)

        if self.room is not None and self.room < 1:
            raise ValueError(
                f"max_completion_length={self.budget} leaves no room for a prompt in the model's "
                f"context of {context_length} tokens. Lower max_completion_length."
            )

    @classmethod
    def build(
        cls,
        tokenizer: PreTrainedTokenizerBase,
        model: str | PreTrainedModel,
        settings: RolloutSettings,
    ) -> "PromptEncoder":
        """Return an encoder for a model given as an object, or by name or path.

        Of a model given by name or path only the config is read.

        Raises:
            ValueError: If nothing could end a completion, or nothing could pad one.
        """
        config, defaults = configs(model, settings)
        return cls(
            tokenizer,
            settings,
            eos=ending_tokens(tokenizer, defaults),
            pad=padding_token(tokenizer),
            context_length=context_length(config),
            num_model_tokens=getattr(config.get_text_config(), "vocab_size", None),
        )

    @property
    def room(self) -> int | None:
        """Return the tokens that a prompt may have; None if they are not limited."""
        return None if self.context_length is None else self.context_length - self.budget

    def encode(self, rows: Sequence[Row]) -> list[Prompt]:
        """Return one Prompt per row; equal rows share one object.

        Raises:
            ValueError: For a row without a prompt, an empty one, texts among messages, messages
                without a chat template, or a prompt that leaves no room for its completion.
        """
        known: dict[str, Prompt] = {}
        prompts = []
        for position, row in enumerate(rows):
            number = row_number(row, position)
            self.form.check(row, number)

            given = [row["prompt"], row.get("chat_template_kwargs")]
            key = json.dumps(given, sort_keys=True, default=str)
            if key not in known:
                known[key] = self._prompt(row, number)
            prompts.append(known[key])
        return prompts

    def decode(self, prompt: Prompt, ids: Sequence[int]) -> str | Messages:
        """Return completion tokens as text, or as one assistant message if the prompt is messages.

        Special tokens are left out.
        """
        ids = list(ids[:-1] if ids and ids[-1] in self.eos else ids)
        text = str(self.tokenizer.decode(ids, skip_special_tokens=True))
        return text if isinstance(prompt.source, str) else [{"role": "assistant", "content": text}]

    def overlong_tokens(self, row: Row, number: int) -> int:
        """Return the tokens of a prompt that is too long for its context; 0 for one that fits.

        A text has at most one token per byte, so that texts of few bytes need no tokens.
        """
        if self.room is None:
            return 0
        short = len(self._text(row, number).encode()) + SPECIAL_TOKENS <= self.room
        if short and not self._has_unknown_tokens:
            return 0
        tokens = len(self._ids(row, number))
        return tokens if tokens > self.room else 0

    def overlong_remedy(self) -> str:
        """Return the room of a prompt and what to do about longer ones, for an error message."""
        return (
            f"The model's context of {self.context_length} tokens less max_completion_length="
            f"{self.budget} leaves {self.room}. Set overlong_prompts to 'drop' or 'truncate_left', "
            "shorten it, or lower max_completion_length"
        )

    # -- one row ---------------------------------------------------------------------------------

    def _prompt(self, row: Row, number: int) -> Prompt:
        source = without_nulls(row["prompt"])
        ids = self._ids(row, number)
        if not ids:
            raise ValueError(
                f"The prompt of row {number} has no tokens: {shown(source)}. Remove the row."
            )

        if self.room is not None and len(ids) > self.room:
            if self.overlong_prompts != "truncate_left":
                raise ValueError(
                    f"The prompt of row {number} has {len(ids)} tokens. {self.overlong_remedy()}. "
                    f"It begins {shown(source)}"
                )
            ids = self._cut(ids, self.room)
        return Prompt(ids, source, self._opened(row, number))

    def _cut(self, ids: list[int], room: int) -> list[int]:
        """Return the last `room` tokens; a token that begins every text stays at the front.

        Example:
            [bos, 5, 6, 7, 8] with room for 3 -> [bos, 7, 8]
        """
        bos = self.tokenizer.bos_token_id
        front = ids[:1] if room > 1 and ids[0] == bos else []
        return [*front, *ids[len(ids) - room + len(front) :]]

    def _text(self, row: Row, number: int) -> str:
        if isinstance(row["prompt"], str):
            return row["prompt"]
        return self._rendered(self.template.text, row, number)

    @property
    def _has_unknown_tokens(self) -> bool:
        """Return whether the tokenizer has tokens that the model has no embeddings for."""
        return self.num_model_tokens is not None and len(self.tokenizer) > self.num_model_tokens

    def _ids(self, row: Row, number: int) -> list[int]:
        if isinstance(row["prompt"], str):
            ids = self._text_ids(row["prompt"])
        else:
            ids = self._rendered(self.template.ids, row, number)

        size = self.num_model_tokens
        if size is not None and self._has_unknown_tokens and max(ids, default=0) >= size:
            token = self.tokenizer.convert_ids_to_tokens(max(ids))
            raise ValueError(
                f"The prompt of row {number} has the token {token!r} with the number {max(ids)}, "
                f"but the model knows only {self.num_model_tokens} tokens. Call "
                "model.resize_token_embeddings(len(tokenizer)) and pass the model."
            )
        return ids

    def _opened(self, row: Row, number: int) -> str:
        if isinstance(row["prompt"], str):
            return opened_by_text(row["prompt"], self.tokenizer)
        return self._rendered(self.template.opened, row, number)

    def _rendered(
        self, render: Callable[[Messages, Row], Rendered], row: Row, number: int
    ) -> Rendered:
        """Call `render` with the messages of a row; an error of the template names the row."""
        messages = without_nulls(row["prompt"])
        keywords = without_nulls(row.get("chat_template_kwargs") or {})
        try:
            return render(messages, keywords)
        except Exception as error:  # templates raise whatever Python does with their expressions
            raise ValueError(
                f"The chat template refuses the prompt of row {number}, {shown(messages)}: "
                f"{type(error).__name__}: {error}"
            ) from error

    def _text_ids(self, text: str) -> list[int]:
        """Return tokens with the tokenizer's own, but no second bos and no closing eos."""
        tokenizer = self.tokenizer
        ids = list(tokenizer(text)["input_ids"])

        bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
        doubled = bos is not None and ids[:2] == [bos, bos]
        if doubled and text.startswith(str(tokenizer.bos_token)):
            ids = ids[1:]

        closed = eos is not None and len(ids) > 1 and ids[-1] == eos
        if closed and not text.endswith(str(tokenizer.eos_token)):
            ids = ids[:-1]
        return ids
