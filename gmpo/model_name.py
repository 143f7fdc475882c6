"""The base model behind a name or path that may be an adapter's."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers.utils.peft_utils import find_adapter_config_file

# Keywords of from_pretrained that say where files are.
WHERE = ("revision", "cache_dir", "token", "subfolder")


def base_model_name(name: str, keywords: Mapping[str, Any]) -> str | None:
    """Return the base model that an adapter names, or None if `name` is no adapter's.

    Args:
        name: A hub name or a directory.
        keywords: For from_pretrained; those of `WHERE` count.

    Raises:
        ValueError: If the adapter does not say what its base model is, or names a path where
            nothing is.
    """
    where = {key: keywords[key] for key in WHERE if keywords.get(key) is not None}
    folder = Path(name).expanduser()
    file = find_adapter_config_file(str(folder) if folder.is_dir() else name, **where)
    if file is None:
        return None

    base = json.loads(Path(file).read_text(encoding="utf-8")).get("base_model_name_or_path")
    if not base:
        raise ValueError(
            f"model={name!r} is an adapter that does not say what its base model is "
            "(base_model_name_or_path in adapter_config.json). Give the model as an object: "
            "PeftModel.from_pretrained(base, adapter, is_trainable=True)."
        )
    if Path(base).is_absolute() and not Path(base).exists():
        raise ValueError(
            f"model={name!r} is an adapter of {base!r}, and nothing is there. Put the base model "
            "there, or correct base_model_name_or_path in adapter_config.json."
        )
    return base


def without_place(keywords: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keywords without those that say where an adapter's files are."""
    return {key: value for key, value in keywords.items() if key not in ("revision", "subfolder")}
