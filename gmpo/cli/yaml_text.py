"""YAML 1.2: `no` is a word, 1e-6 a number, and a key that comes twice an error."""

import io
from pathlib import Path
from typing import Any


def read_yaml(path: str) -> dict[str, Any]:
    """Return the mapping in the file `path`.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it isn't text in UTF-8, isn't YAML, or holds something else.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"There is no config file {path!r}.")
    try:
        text = Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not text in UTF-8: {error}.") from None

    content = load_yaml(text, source=path)
    if content is not None and not isinstance(content, dict):
        raise ValueError(
            f"{path} holds a {type(content).__name__}, not a mapping. Write one `option: value` "
            "per line."
        )
    return content or {}


def load_yaml(text: str, *, source: str) -> Any:
    """Return what `text` says.

    Args:
        source: Where it is from, for the message.

    Raises:
        ValueError: If it isn't YAML.
    """
    from ruamel.yaml.error import YAMLError

    try:
        return reader().load(text)
    except YAMLError as error:
        reason = str(error).partition("\nTo suppress this")[0].strip()
        raise ValueError(f"{source} is not YAML: {reason}") from None


def dump_yaml(values: dict[str, Any]) -> str:
    """Return `values` as YAML, one option per line."""
    writer = reader()
    writer.default_flow_style = False
    writer.width = 120
    writer.allow_unicode = True
    writer.sort_base_mapping_type_on_output = False
    text = io.StringIO()
    writer.dump(values, text)
    return text.getvalue()


def reader() -> Any:
    """Return ruamel's reader of YAML 1.2 for plain values; a date stays the text that it is."""
    from ruamel.yaml import YAML
    from ruamel.yaml.constructor import SafeConstructor

    class Constructor(SafeConstructor):
        pass

    Constructor.add_constructor("tag:yaml.org,2002:timestamp", lambda _, node: node.value)
    yaml = YAML(typ="safe", pure=True)
    yaml.Constructor = Constructor
    return yaml


def as_mapping(name: str, value: object) -> dict[str, Any] | None:
    """Return a mapping that was given as such (in a file) or as JSON or YAML text (in a flag)."""
    if isinstance(value, str):
        value = load_yaml(value, source=f"{name}={value!r}")
    if value is not None and not isinstance(value, dict):
        raise ValueError(f"{name}={value!r} is not a mapping, like '{{\"size\": 500}}'.")
    return value
