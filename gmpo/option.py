"""The declaration of an option: its default, its legal values and what it does, in one place.

Every stage's `settings.py` is a dataclass whose fields are made by `option`.  `check_options` holds
the legal values, `docs/configuration.md` prints the help texts, and the command line shows them.
"""

import dataclasses
import difflib
import functools
import inspect
import json
import math
import types
import typing
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeGuard

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

# options of older trainers that have no successor -> what to do instead
GONE = {
    "max_prompt_length": "Prompts may fill the model's context: overlong_prompts says what becomes "
    "of longer ones.",
    "use_liger_loss": "The vocabulary head is computed in tiles whatever the options are: leave it "
    "out.",
    "ref_model_init_kwargs": "The reference is a copy of the policy as it is given: leave it out.",
    "dataset_num_proc": "Prompts are encoded as they are needed: leave it out.",
}

# a declared type -> in words
WORDS: dict[Any, str] = {
    bool: "True or False",
    int: "a whole number",
    float: "a number",
    str: "text",
    dict: "a dict (or a JSON object)",
    list[float]: "a list of numbers",
    list[str]: "a list of texts",
    types.NoneType: "None",
}


@dataclasses.dataclass(frozen=True, slots=True)
class Bounds:
    """The range of a number."""

    low: float | None = None
    high: float | None = None
    low_open: bool = False  # the lower bound itself is illegal
    high_open: bool = False
    infinite: bool = False  # an infinite value is legal

    def check(self, name: str, value: object) -> None:
        """Raise a ValueError that names the option unless its number, or each of a list, fits."""
        numbers = value if isinstance(value, list | tuple) else [value]
        for number in numbers:
            if is_number(number) and not self._holds(number):
                raise ValueError(f"{name}={value!r} is out of range: it must be {self}.")

    def _holds(self, number: float) -> bool:
        if not math.isfinite(number) and (math.isnan(number) or not self.infinite):
            return False
        if self.low is not None and (number < self.low or (self.low_open and number == self.low)):
            return False
        if self.high is None:
            return True
        return number < self.high or (number == self.high and not self.high_open)

    def __str__(self) -> str:
        words = []
        if self.low is not None:
            words.append(f"above {self.low:g}" if self.low_open else f"at least {self.low:g}")
        if self.high is not None:
            words.append(f"below {self.high:g}" if self.high_open else f"at most {self.high:g}")
        if self.high is None and not self.infinite:
            words.append("finite")
        return " and ".join(words)


@dataclasses.dataclass(frozen=True, slots=True)
class Rules:
    """The help text and the legal values of a field."""

    help: str
    choices: tuple[Any, ...] | None
    bounds: Bounds
    later: bool


class Help(str):
    """A help text for argparse that carries the rules of its option.

    HfArgumentParser hands all metadata of a field to argparse, which knows only `help`.
    """

    rules: Rules

    def __new__(cls, rules: Rules) -> "Help":
        text = super().__new__(cls, rules.help.replace("%", "%%"))
        text.rules = rules
        return text


def rules_of(field: dataclasses.Field) -> Rules | None:
    """Return what `option` has declared of `field`; None if it was not declared with `option`."""
    return getattr(field.metadata.get("help"), "rules", None)


def option(
    default: Any,
    help: str,
    *,
    choices: Sequence[Any] | None = None,
    low: float | None = None,
    high: float | None = None,
    low_open: bool = False,
    infinite: bool = False,
    later: bool = False,
) -> Any:
    """Declare a dataclass field with its help text and legal values.

    Args:
        default: Also legal, whatever the bounds say (`None` for "off").
        help: One or two sentences for the documentation and `gmpo train --help`.
        choices: The only legal values.
        low, high: Bounds, inclusive.
        low_open: The lower bound itself is illegal.
        infinite: Infinity is legal.
        later: The machinery is not there yet: anything but the default is refused.
    """
    legal = tuple(choices) if choices is not None else None
    bounds = Bounds(low, high, low_open=low_open, infinite=infinite)
    metadata = {"help": Help(Rules(help, legal, bounds, later))}
    if isinstance(default, dict | list):
        return dataclasses.field(default_factory=lambda: type(default)(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


# -- checks ------------------------------------------------------------------------------------


def check_options(settings: "DataclassInstance") -> None:
    """Raise a ValueError for the first option of `settings` whose value is not legal."""
    for field in dataclasses.fields(settings):
        rules = rules_of(field)
        if rules is not None:
            annotation = annotation_of(type(settings), field.name)
            check_option(field, rules, getattr(settings, field.name), annotation)


def check_option(field: dataclasses.Field, rules: Rules, value: object, annotation: object) -> None:
    """Raise a ValueError that names the option, what was got and what to use, if it is not legal.

    Args:
        annotation: The declared type.  Of a dict that may be given as JSON text only the dict is
            legal: `parse_dicts` has read the text.
    """
    if value == field.default and type(value) is type(field.default):
        return
    if rules.later:
        raise ValueError(
            f"{field.name}={value!r} is not available yet. Leave it at {field.default!r}."
        )

    members = members_of(annotation)
    if value is None and types.NoneType not in members:
        raise ValueError(f"{field.name}=None is not allowed. The default is {field.default!r}.")
    if rules.choices is not None and value is not None and value not in rules.choices:
        listed = ", ".join(repr(choice) for choice in rules.choices)
        raise ValueError(f"{field.name}={value!r} is not one of {listed}.")

    if any(typing.get_origin(member) is dict for member in members):
        members = [member for member in members if member is not str]
    check_type(field.name, value, typing.Union[tuple(members)])  # noqa: UP007 (made at run time)
    rules.bounds.check(field.name, value)


def check_type(name: str, value: object, annotation: object) -> None:
    """Raise a ValueError unless `value` is of the annotated type as it is, without conversion."""
    from pydantic import ValidationError

    # A tuple will do for a list, and a Trainer copies what it keeps.
    plain = list(value) if isinstance(value, tuple) else value
    try:
        _validator(annotation).validate_python(plain)
    except ValidationError:
        wanted = " or ".join(in_words(member) for member in members_of(annotation))
        raise ValueError(f"{name}={value!r} ({type(value).__name__}) is not {wanted}.") from None


@functools.cache
def _validator(annotation: Any) -> Any:
    from pydantic import ConfigDict, TypeAdapter

    config = ConfigDict(strict=True, arbitrary_types_allowed=True)
    return TypeAdapter(annotation, config=config)


def is_number(value: object) -> TypeGuard[float]:
    """Return whether `value` is an int or a float; True and False are not."""
    return isinstance(value, int | float) and not isinstance(value, bool)


# -- declared types ----------------------------------------------------------------------------


def annotation_of(cls: type, name: str) -> Any:
    """Return the type of an option as its class declares it.

    `field.type` won't do: HfArgumentParser overwrites it.
    """
    for owner in cls.__mro__:
        annotations = inspect.get_annotations(owner)
        if name in annotations:
            return annotations[name]
    raise AttributeError(f"{cls.__name__} declares no option {name!r}.")


def declared_type(settings: "DataclassInstance", name: str) -> str:
    """Return the declared type of an option as text: "float", "str | None"."""
    declared = annotation_of(type(settings), name)
    plain = isinstance(declared, type) and typing.get_origin(declared) is None
    return declared.__name__ if plain else str(declared)


def members_of(annotation: object) -> list[Any]:
    """Return the types that a union allows.

    Example:
        `str | None` -> [str, NoneType], `float` -> [float]
    """
    if isinstance(annotation, types.UnionType) or typing.get_origin(annotation) is typing.Union:
        return list(typing.get_args(annotation))
    return [annotation]


def in_words(member: Any) -> str:
    """Return one type of an annotation in words."""
    if member in WORDS:
        return WORDS[member]
    origin = typing.get_origin(member)
    if origin is typing.Literal:
        return " or ".join(repr(value) for value in typing.get_args(member))
    return WORDS.get(origin) or getattr(member, "__name__", str(member))


# -- names and texts ---------------------------------------------------------------------------


def advice(name: str, known: Iterable[str], *, prefix: str = "") -> str:
    """Return a sentence about what to use in the place of `name`; "" if nothing fits."""
    if name in GONE:
        return f" {GONE[name]}"
    closest = difflib.get_close_matches(name, known, n=1)
    return f" Did you mean '{prefix}{closest[0]}'?" if closest else ""


def parse_dicts(settings: "DataclassInstance") -> None:
    """Read options that are declared as dicts and were given as JSON text."""
    for field in dicts_of(settings):
        value = getattr(settings, field.name)
        if isinstance(value, str):
            setattr(settings, field.name, parsed_dict(field.name, value))


def dicts_of(settings: "DataclassInstance") -> Iterator[dataclasses.Field]:
    """Yield the fields made by `option` that are declared as dicts."""
    for field in dataclasses.fields(settings):
        members = members_of(annotation_of(type(settings), field.name))
        if rules_of(field) is not None and typing.get_origin(members[0]) is dict:
            yield field


def parsed_dict(name: str, text: str) -> Any:
    """Return what the JSON text of option `name` says."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{name}={text!r} is not a JSON object: {error}.") from None
