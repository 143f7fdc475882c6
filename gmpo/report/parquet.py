"""Rows of any content as a parquet file: what parquet has no type for becomes text."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def as_text(value: object) -> str:
    """Return text as it is, anything else (messages, tool calls, images) as JSON.

    Python's own form stands where JSON has none.
    """
    if not isinstance(value, str):
        try:
            value = json.dumps(value, ensure_ascii=False, default=repr)
        except (TypeError, ValueError):  # keys that are no strings, circular references
            value = repr(value)
    # A lone surrogate (from JSON's \ud800) is no UTF-8.
    return value.encode("utf-8", "replace").decode()


def as_column(values: Sequence[Any]) -> list[Any]:
    """Return values of one type that parquet has: truth values, text or numbers; None anywhere.

    Values of several types become text.
    """
    values = [value.item() if getattr(value, "ndim", None) == 0 else value for value in values]
    kinds = {type(value) for value in values if value is not None}
    if kinds <= {bool}:
        return values
    if kinds <= {int} and all(value is None or -(2**63) <= value < 2**63 for value in values):
        return values
    if kinds <= {int, float} and float in kinds:
        return [None if value is None else float(value) for value in values]
    return [None if value is None else as_text(value) for value in values]


def as_table(rows: Sequence[dict[str, Any]]) -> Any:
    """Return `rows` as a pyarrow table.

    A column that some rows lack is null there; one without values counts as numbers.
    """
    import pyarrow

    names = dict.fromkeys(name for row in rows for name in row)
    arrays = {name: pyarrow.array(as_column([row.get(name) for row in rows])) for name in names}
    untyped = pyarrow.null()
    return pyarrow.table(
        {
            name: array.cast(pyarrow.float64()) if array.type == untyped else array
            for name, array in arrays.items()
        }
    )


def write_parquet(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Write `rows` to `path`, which appears whole or not at all."""
    import pyarrow.parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(path.name + ".tmp")
    pyarrow.parquet.write_table(as_table(rows), fresh)
    os.replace(fresh, path)
