"""Messages as a dataset stores them: nulls that Arrow adds, and contents that they may have."""

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from gmpo.types import Messages

Value = TypeVar("Value")


def is_messages(prompt: object) -> bool:
    """Return whether a prompt is a list of messages; an empty list is one."""
    return isinstance(prompt, list) and all(isinstance(m, Mapping) and "role" in m for m in prompt)


def without_nulls(value: Value) -> Value:
    """Return `value` without the keys whose value is None, at every depth.

    Arrow gives all rows of a column the same keys, and fills those that a row does not have.

    Example:
        [{"role": "user", "content": "a", "name": None}] -> [{"role": "user", "content": "a"}]
    """
    if isinstance(value, Mapping):
        kept = {key: without_nulls(item) for key, item in value.items() if item is not None}
        return kept  # pyright: ignore[reportReturnType] (a dict for a dict)
    if isinstance(value, list | tuple):
        items = [without_nulls(item) for item in value]
        return items  # pyright: ignore[reportReturnType] (a list for a list)
    return value


def blocks_of(message: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return the blocks of a message whose content is a list of them, and no blocks for text."""
    content = message.get("content")
    if not isinstance(content, list):
        return []
    return [block for block in content if isinstance(block, Mapping)]


def contents_joined(messages: Messages) -> Messages:
    """Return messages whose contents are text, for templates that read nothing else.

    Example:
        A message whose content is [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
        -> the message with content "ab"
    """
    joined = []
    for message in messages:
        content = message.get("content", "")  # a message that calls tools may have no content
        if isinstance(content, list):
            content = "".join(str(block.get("text", "")) for block in blocks_of(message))
        joined.append({**message, "content": content})
    return joined


def unsupported_reason(messages: Sequence[Mapping[str, Any]]) -> str | None:
    """Return why a list of messages can't be a prompt; None if it can."""
    for message in messages:
        kinds = {str(block.get("type")) for block in blocks_of(message)} - {"text"}
        if kinds:
            named = ", ".join(f"an {kind}" for kind in sorted(kinds))
            return f"holds {named}. Only text is supported: remove it"

        content = message.get("content")
        empty_call = content is None and message.get("tool_calls")
        if not isinstance(content, str | list) and not empty_call:
            return (
                f"has a message of role {message['role']!r} whose content is {content!r}. "
                "It must be a text, or a list of blocks [{'type': 'text', 'text': ...}]"
            )
    return None
