"""The mutation test: every option of the config acts as it says, or is refused with the reason.

`table.py` has a row for every field: a small run that can feel it, another legal value, and what must change.
"""

import dataclasses
import re

import pytest

from gmpo.config import GMPOConfig, GRPOConfig
from tests.options.observables import completions, logs, rates, weights
from tests.options.rows import ANOTHER, Acts, Checked, Refused
from tests.options.runs import BASE, SCENARIOS, build, fresh_run, run
from tests.options.table import EXCEPTIONS, PARTS, TABLE

FIELDS = {
    f.name for config in (GMPOConfig, GRPOConfig) for f in dataclasses.fields(config) if f.init
}


def rows(kind):
    """Parameters (option, row) of every row of a kind."""
    return [
        pytest.param(name, row, id=name) for name, row in TABLE.items() if isinstance(row, kind)
    ]


def test_every_option_has_one_row_and_no_row_is_left_over():
    assert len(TABLE) == sum(len(part) for part in PARTS), "an option has two rows"
    assert not TABLE.keys() & EXCEPTIONS.keys()
    assert TABLE.keys() | EXCEPTIONS.keys() == FIELDS


@pytest.mark.parametrize("name", EXCEPTIONS)
def test_an_exception_says_why_and_its_value_is_kept(name, tmp_path):
    value, reason = EXCEPTIONS[name]
    assert len(reason.split()) > 5
    assert getattr(GMPOConfig(str(tmp_path), **{name: value}), name) == value


@pytest.mark.parametrize("name", SCENARIOS)
def test_a_run_made_twice_is_the_same(name):
    first, second = run(name), fresh_run(SCENARIOS[name])
    assert weights(first) == weights(second)
    assert logs(first) == logs(second)
    if first.collections:
        assert completions(first) == completions(second)


@pytest.mark.parametrize(("name", "row"), rows(Acts))
def test_an_option_acts(name, row):
    without, with_it = (
        run(row.scenario, **row.given),
        run(row.scenario, **{**row.given, name: row.value}),
    )
    before, after = row.sees(without), row.sees(with_it)
    assert after != before, f"{name}={row.value!r} changes nothing"
    if row.to is not ANOTHER:
        expected = row.to(with_it) if callable(row.to) else row.to
        assert after == (pytest.approx(expected) if row.sees is rates else expected)


@pytest.mark.parametrize(
    "copied", [dataclasses.replace, lambda c: type(c)(**c.to_dict())], ids=["replace", "to_dict"]
)
@pytest.mark.parametrize(("name", "row"), rows(Acts))
def test_a_copy_of_a_config_has_the_option_too(name, row, copied, tmp_path):
    scenario = SCENARIOS[row.scenario]
    options = {
        "output_dir": str(tmp_path),
        **BASE,
        **scenario.options,
        **row.given,
        name: row.value,
    }
    config = scenario.cls.config_class(**options)
    assert copied(config).to_dict() == config.to_dict()


@pytest.mark.parametrize(("name", "row"), rows(Refused))
def test_an_option_that_cannot_act_is_refused(name, row, tmp_path):
    with pytest.raises((ValueError, ImportError)) as caught:
        build(SCENARIOS[row.scenario], {**row.given, name: row.value}, tmp_path)
    assert name in str(caught.value)
    assert re.search(row.message, str(caught.value))


@pytest.mark.parametrize(("name", "row"), rows(Checked))
def test_an_option_passes_its_own_check(name, row, monkeypatch, tmp_path):
    row.by(monkeypatch, tmp_path)
