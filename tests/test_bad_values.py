"""Every option's illegal values, made from what the option declares: all are refused, with option, value and remedy."""

import dataclasses

import pytest

from gmpo.config import STAGE_SETTINGS, GMPOConfig, GRPOConfig
from gmpo.option import declared_type, rules_of

OURS = {f.name: f for settings in STAGE_SETTINGS for f in dataclasses.fields(settings)}


def illegal_values(name):
    """Of one option: out of its bounds, not among its choices, of another type."""
    rules, declared = rules_of(OURS[name]), declared_type(GMPOConfig("unused"), name)
    bounds = rules.bounds
    if bounds.low is not None:
        yield from (bounds.low - 1, bounds.low) if bounds.low_open else (bounds.low - 1,)
    if bounds.high is not None:
        yield bounds.high + 1
    if declared.startswith("float"):
        yield float("nan")
        if not bounds.infinite:
            yield float("inf")
    if rules.choices is not None:
        yield "nonsense"
    if "None" not in declared:
        yield None
    yield from WRONG_TYPES[kind(declared)]


def kind(declared):
    for name in ("dict", "list", "bool", "int", "float", "str"):
        if declared.startswith(name):
            return name
    raise AssertionError(f"{declared}: say what is illegal for it")


WRONG_TYPES = {
    "dict": (3, "{bad"),
    "list": (3, "x", [None]),
    "bool": ("yes", 3),
    "int": (1.5, "x", True),
    "float": ("x", True),
    "str": (3,),
}
CASES = [
    pytest.param(name, value, id=f"{name}={value!r}")
    for name in OURS
    for value in illegal_values(name)
]


@pytest.mark.parametrize(("name", "value"), CASES)
def test_an_illegal_value_is_refused_with_option_value_and_remedy(tmp_path, name, value):
    with pytest.raises(ValueError) as caught:
        GMPOConfig(str(tmp_path), **{name: value})
    message = str(caught.value)
    assert f"{name}={value!r}" in message
    assert any(
        word in message for word in ("must be", "is not", "default", "Leave it", "would do nothing")
    ), message


def test_every_option_with_rules_has_illegal_values():
    assert {case.values[0] for case in CASES} == OURS.keys()
    assert {f.name for f in dataclasses.fields(GRPOConfig)} >= OURS.keys()
