"""Writes docs/configuration.md from the options themselves: `python docs/make_configuration.py`."""

import dataclasses
import json
from pathlib import Path
from typing import Any

from gmpo.config import STAGE_SETTINGS, GMPOConfig, GRPOConfig
from gmpo.inherited_options import REFUSED
from gmpo.option import rules_of

PAGE = Path(__file__).with_name("configuration.md")
READERS = {
    "DataSettings": "Data: groups, collections, micro-batches",
    "RolloutSettings": "Rollout: sampling and engines",
    "RewardSettings": "Reward: from scores to advantages",
    "PolicySettings": "Policy: loading, scoring, reference",
    "ObjectiveSettings": "Objective: the loss",
    "ReportSettings": "Report: completions on console, disk and trackers",
}
# What `transformers.Trainer` reads, in our words: topic -> option -> meaning.
INHERITED: dict[str, dict[str, str]] = json.loads(
    Path(__file__).with_name("trainer_options.json").read_text("utf-8")
)
HEAD = """# Configuration

Every option of `GMPOConfig`, by who reads it. `GRPOConfig` has the same, with `epsilon` 0.2 as a
bound of the ratio. An option acts, or it is refused when the config is made, with the reason: none
is ignored. Values that are not legal are refused with the option, the value and what to use
instead.

On the command line they are flags and YAML keys of the same names (`gmpo train --help`).
"""


def legal(field: dataclasses.Field) -> str:
    """Return the legal values, in words."""
    rules = rules_of(field)
    assert rules is not None
    if rules.later:
        return "not available yet"
    if rules.choices:
        return ", ".join(f"`{choice}`" for choice in rules.choices)
    parts = []
    bounds = rules.bounds
    if bounds.low is not None:
        parts.append(f"{'>' if bounds.low_open else '≥'} {bounds.low:g}")
    if bounds.high is not None:
        parts.append(f"≤ {bounds.high:g}")
    return " and ".join(parts)


def help_of(field: dataclasses.Field) -> str:
    rules = rules_of(field)
    assert rules is not None
    return rules.help


def default(field: dataclasses.Field) -> str:
    return "`[]`" if field.default is dataclasses.MISSING else f"`{field.default!r}`"


def table(rows: list[tuple[str, ...]], *head: str) -> str:
    lines = [" | ".join(head), " | ".join("---" for _ in head), *(" | ".join(row) for row in rows)]
    return "\n".join(f"| {line} |" for line in lines)


def stage_section(settings: Any, fields: dict[str, dataclasses.Field]) -> str:
    rows = [
        (f"`{f.name}`", default(fields[f.name]), legal(fields[f.name]), help_of(fields[f.name]))
        for f in dataclasses.fields(settings)
    ]
    return f"## {READERS[settings.__name__]}\n\n" + table(
        rows, "option", "default", "legal", "meaning"
    )


def inherited_rows(
    names: dict[str, str], fields: dict[str, dataclasses.Field]
) -> list[tuple[str, ...]]:
    rows = []
    for name, meaning in names.items():
        refused = f" Another value is refused: {REFUSED[name][1]}." if name in REFUSED else ""
        text = meaning if rules_of(fields[name]) is None else help_of(fields[name])
        rows.append((f"`{name}`", default(fields[name]), text + refused))
    return rows


def page() -> str:
    fields = {f.name: f for f in dataclasses.fields(GMPOConfig)}
    parts = [HEAD.strip()]
    parts += [stage_section(settings, fields) for settings in STAGE_SETTINGS]
    parts.append(
        "## The Trainer: loop, optimizer, checkpoints, logs, hub\n\nRead by `transformers.Trainer`."
    )
    parts += [
        f"### {topic}\n\n" + table(inherited_rows(names, fields), "option", "default", "meaning")
        for topic, names in INHERITED.items()
    ]
    return "\n\n".join(parts) + "\n"


def undocumented() -> set[str]:
    """Return the Trainer's options that `trainer_options.json` lacks: newer versions have some."""
    known = {name for names in INHERITED.values() for name in names}
    ours = {f.name for settings in STAGE_SETTINGS for f in dataclasses.fields(settings)}
    return {f.name for f in dataclasses.fields(GRPOConfig)} - known - ours


if __name__ == "__main__":
    PAGE.write_text(page(), "utf-8")
