"""Messages to token ids by the chat template, and the text that a prompt leaves open."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from gmpo.rollout.prompts.messages import contents_joined
from gmpo.types import Messages

TAG = re.compile(r"<[A-Za-z][\w-]*>")
PROBE = "gmpoprobe"


class ChatTemplate:
    """The chat template of a tokenizer, with the keywords of the config.

    Args:
        tokenizer: With a chat template, if there are messages.
        keywords: For every call; those of a row win over them.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, keywords: Mapping[str, Any]) -> None:
        self.tokenizer = tokenizer
        self.keywords = dict(keywords)
        self._reads_blocks: bool | None = None

    def ids(self, messages: Messages, keywords: Mapping[str, Any]) -> list[int]:
        """Return the token ids of a prompt that asks for an answer, or for the rest of one."""
        return list(self._apply(messages, keywords, tokenize=True, **asking(messages)))

    def text(self, messages: Messages, keywords: Mapping[str, Any]) -> str:
        """Return the text whose token ids `ids` gives."""
        return self._apply(messages, keywords, tokenize=False, **asking(messages))

    def opened(self, messages: Messages, keywords: Mapping[str, Any]) -> str:
        """Return the text at the prompt's end that the completion continues.

        Example:
            A last message {"role": "assistant", "content": "The answer is"} -> "The answer is".
            A template that asks with "<|im_start|>assistant\\n<think>\\n" -> "<think>\\n".
            A template that asks with "<|im_start|>assistant\\n" -> "".
        """
        if continues(messages):
            return contents_joined(messages)[-1]["content"]

        plain = self._apply(messages, keywords, tokenize=False, add_generation_prompt=False)
        asked = self._apply(messages, keywords, tokenize=False, add_generation_prompt=True)
        pairs = enumerate(zip(plain, asked, strict=False))
        same = next((i for i, (a, b) in pairs if a != b), len(plain))
        return self._from_first_tag(asked[same:])

    def _from_first_tag(self, text: str) -> str:
        """Return `text` from its first tag on; special tokens are no tags, and are left out."""
        for token in special_tokens(self.tokenizer):
            text = text.replace(token, "")
        tag = TAG.search(text)
        return text[tag.start() :] if tag else ""

    def _apply(self, messages: Messages, keywords: Mapping[str, Any], **how: Any) -> Any:
        if not self._blocks_are_read():
            messages = contents_joined(messages)
        return self.tokenizer.apply_chat_template(
            messages, return_dict=False, **how, **{**self.keywords, **keywords}
        )

    def _blocks_are_read(self) -> bool:
        """Return whether the template reads contents that are lists of blocks, and not only text.

        Most templates print the Python list then, or fail.  Some, made for images, read only it.
        """
        if self._reads_blocks is None:
            probe = [{"role": "user", "content": [{"type": "text", "text": PROBE}]}]
            try:
                text = self.tokenizer.apply_chat_template(probe, tokenize=False, **self.keywords)
            except Exception:  # whatever the template raises, it can't read blocks
                text = ""
            self._reads_blocks = PROBE in text and "'type'" not in text
        return self._reads_blocks


def asking(messages: Messages) -> dict[str, bool]:
    """Return the options by which a template asks for an answer, or leaves the last one open."""
    open_answer = continues(messages)
    return {"add_generation_prompt": not open_answer, "continue_final_message": open_answer}


def continues(messages: Messages) -> bool:
    """Return whether the last message is the beginning of the assistant's answer."""
    return messages[-1]["role"] == "assistant"


def opened_by_text(text: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the tag that a prompt given as text ends in, with the white space behind it.

    Example:
        "What is 1 + 1? <think>\\n" -> "<think>\\n", and "Write <b>this</b>." -> "".
    """
    tags = list(TAG.finditer(text))
    if not tags or text[tags[-1].end() :].strip() or tags[-1][0] in special_tokens(tokenizer):
        return ""
    return text[tags[-1].start() :]


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> Sequence[str]:
    """Return the texts of the tokens that decoding leaves out, the longest first."""
    added = getattr(tokenizer, "added_tokens_decoder", {}).values()
    texts = {str(token) for token in added if token.special} | set(tokenizer.all_special_tokens)
    return sorted(texts, key=len, reverse=True)
