"""How an option is declared: its default, its legal values and what it does, in one place.

Every stage's `settings.py` is a dataclass whose fields are made by `option`.  `check_options` holds the legal values,
`docs/configuration.md` prints the help texts, and the command line shows them.
"""

import dataclasses
import difflib
import inspect
import json
from collections.abc import Callable, Iterable, Sequence
from typing import Any


@dataclasses.dataclass(frozen=True, slots=True)
class Rules:
    """What `option` declares of a field."""

    help: str
    choices: tuple[Any, ...] | None
    low: float | None
    high: float | None
    low_open: bool
    later: bool


class Help(str):
    """A help text for argparse that carries the rules of its option.

    HfArgumentParser hands all metadata of a field to argparse, which knows `help` alone.
    """

    rules: Rules

    def __new__(cls, rules: Rules) -> "Help":
        text = super().__new__(cls, rules.help.replace("%", "%%"))
        text.rules = rules
        return text


def rules_of(field: dataclasses.Field) -> Rules | None:
    """What `option` has declared of `field`; None for a field of another making."""
    return getattr(field.metadata.get("help"), "rules", None)


def option(
    default: Any,
    help: str,
    *,
    choices: Sequence[Any] | None = None,
    low: float | None = None,
    high: float | None = None,
    low_open: bool = False,
    later: bool = False,
) -> Any:
    """A dataclass field with its help text and legal values.

    Args:
        default: Also legal, whatever the bounds say (`None` for "off").
        help: One or two sentences for the documentation and `gmpo train --help`.
        choices: The only legal values.
        low, high: Bounds, inclusive.
        low_open: The lower bound itself is illegal.
        later: The machinery is not there yet: anything but the default is refused.
    """
    legal = tuple(choices) if choices is not None else None
    metadata = {"help": Help(Rules(help, legal, low, high, low_open, later))}
    if isinstance(default, dict | list):
        return dataclasses.field(default_factory=lambda: type(default)(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def check_options(settings: Any) -> None:
    """Raise a ValueError for the first option of `settings` whose value is not legal."""
    for field in dataclasses.fields(settings):
        if rules_of(field) is not None:
            check_option(field, getattr(settings, field.name), declared_type(settings, field.name))


# options of older trainers that have no successor -> what to do instead
GONE = {
    "max_prompt_length": "Prompts may fill the model's context: overlong_prompts says what becomes of longer ones.",
    "use_liger_loss": "The vocabulary head is computed in tiles whatever the options are: leave it out.",
    "ref_model_init_kwargs": "The reference is a copy of the policy as it is given: leave it out.",
    "dataset_num_proc": "Prompts are encoded as they are needed: leave it out.",
}


def advice(name: str, known: Iterable[str], *, prefix: str = "") -> str:
    """What to use in the place of an option that does not exist; "" if nothing comes to mind."""
    if name in GONE:
        return f" {GONE[name]}"
    closest = difflib.get_close_matches(name, known, n=1)
    return f" Did you mean {prefix}{closest[0]}?" if closest else ""


def declared_type(settings: Any, name: str) -> str:
    """The type of an option as its class declares it.  `field.type` won't do: HfArgumentParser overwrites it."""
    for owner in type(settings).__mro__:
        annotations = inspect.get_annotations(owner)
        if name in annotations:
            declared = annotations[name]
            return declared.__name__ if isinstance(declared, type) else str(declared)
    raise AttributeError(f"{type(settings).__name__} declares no option {name!r}.")


def check_option(field: dataclasses.Field, value: Any, declared: str) -> None:
    """Raise a ValueError that names the option, what was got and what to use, unless `value` is legal.

    Args:
        declared: Its type, as `declared_type` gives it.
    """
    if value == field.default and type(value) is type(field.default):
        return
    rules = rules_of(field)
    assert rules is not None
    if rules.later:
        raise ValueError(
            f"{field.name}={value!r} is not available yet. Leave it at {field.default!r}."
        )
    if value is None:
        if "None" not in declared:
            raise ValueError(f"{field.name}=None is not allowed. The default is {field.default!r}.")
        return
    if rules.choices is not None and value not in rules.choices:
        listed = ", ".join(repr(choice) for choice in rules.choices)
        raise ValueError(f"{field.name}={value!r} is not one of {listed}.")
    check_type(field, value, declared)
    check_range(field, value, rules)


def check_type(field: dataclasses.Field, value: Any, declared: str) -> None:
    """Raise a ValueError if `value`, which is not None, is of another type than the first one that is declared."""
    for start, (fits, wanted) in TYPES.items():
        if declared.startswith(start):
            if not fits(value):
                raise ValueError(
                    f"{field.name}={value!r} ({type(value).__name__}) is not {wanted}."
                )
            return


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


# how a declared type starts -> (what is of that type, what it is in words)
TYPES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "bool": (lambda value: isinstance(value, bool), "True or False"),
    "int": (lambda value: isinstance(value, int) and not isinstance(value, bool), "a whole number"),
    "float": (is_number, "a number"),
    "str": (lambda value: isinstance(value, str), "text"),
    "dict": (lambda value: isinstance(value, dict), "a dict (or a JSON object)"),
    "list[float]": (
        lambda value: isinstance(value, list | tuple) and all(map(is_number, value)),
        "a list of numbers",
    ),
    "list[str]": (
        lambda value: (
            isinstance(value, list | tuple) and all(isinstance(item, str) for item in value)
        ),
        "a list of texts",
    ),
}


def check_range(field: dataclasses.Field, value: Any, rules: Rules) -> None:
    low, high, low_open = rules.low, rules.high, rules.low_open
    if low is None and high is None:
        return
    fits = value == value  # NaN fits nowhere
    fits = fits and (low is None or (value > low if low_open else value >= low))
    fits = fits and (high is None or value <= high)
    if not fits:
        lower = "" if low is None else f"above {low}" if low_open else f"at least {low}"
        upper = "" if high is None else f"at most {high}"
        raise ValueError(
            f"{field.name}={value!r} is out of range: it must be {' and '.join(filter(None, (lower, upper)))}."
        )


def parse_dicts(settings: Any) -> None:
    """Replace JSON strings by what they say in every option that holds a dict (the command line passes strings)."""
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        if (
            rules_of(field) is not None
            and isinstance(value, str)
            and declared_type(settings, field.name).startswith("dict")
        ):
            try:
                setattr(settings, field.name, json.loads(value))
            except json.JSONDecodeError as error:
                raise ValueError(f"{field.name}={value!r} is not a JSON object: {error}.") from None
