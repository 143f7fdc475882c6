"""The kinds of rows that the table of options is made of."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

ANOTHER = object()  # anything but what the run without the option shows


@dataclass(frozen=True)
class Acts:
    """The option, set to `value`, changes what `sees` gives of a run."""

    value: Any
    sees: Callable[[Any], Any]
    to: Any = ANOTHER  # what it then gives, if it can be said beforehand
    scenario: str = "gmpo"
    given: dict[str, Any] = field(
        default_factory=dict
    )  # options of the run, with and without this one


@dataclass(frozen=True)
class Refused:
    """Config or trainer refuse `value` with an error whose message matches."""

    value: Any
    message: str
    scenario: str = "gmpo"
    given: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Checked:
    """A function of its own shows how the option acts; it gets pytest's monkeypatch and a folder."""

    by: Callable[..., None]


Row = Acts | Refused | Checked
