"""The texts of `gmpo COMMAND --help`, made without importing torch or transformers.

The options of the trainer are read in the source text where their classes would pull in both.
"""

import ast
import importlib
import importlib.util
import sys
import textwrap
from dataclasses import MISSING, Field, fields
from pathlib import Path
from typing import Any

import gmpo
from gmpo.cli.options import ScriptOptions
from gmpo.option import rules_of
from gmpo.reward.by_name import REWARDS

USAGE = """\
usage: gmpo train --config run.yaml [--option value ...]

The file holds one `option: value` per line; flags win.  A mapping is JSON or YAML text in a flag:
'{size: 500}'."""
STAGES = ("Data", "Rollout", "Reward", "Policy", "Objective", "Report")


def train_help() -> str:
    """Return our options by stage, with meanings and defaults, and transformers' by name."""
    own = overridden()
    parts = [USAGE, "", "What to train:"]
    parts += [described(field, default_of(field)) for field in fields(ScriptOptions)]
    settings = "(...) stands for settings: 'cosine(max_completion_length=256)'"
    parts += ["", f"Built-in rewards; {settings}:", *reward_lines()]

    for settings in stage_settings():
        module = sys.modules[settings.__module__]
        parts += ["", str(module.__doc__).splitlines()[0]]
        for field in fields(settings):
            parts.append(described(field, own.get(field.name, default_of(field))))

    inherited = sorted(inherited_names() - own_names())
    parts += ["", "Options of transformers.TrainingArguments:"]
    parts += textwrap.wrap(", ".join(inherited), 100, initial_indent="  ", subsequent_indent="  ")
    return "\n".join(parts)


def option_names() -> set[str]:
    """Return every option of `gmpo train`, and the --no_... that HfArgumentParser adds."""
    script = {field.name for field in fields(ScriptOptions)}
    names = script | own_names() | inherited_names() | {"config"}
    return names | {f"no_{name}" for name in names}


def own_names() -> set[str]:
    """Return the options of the stages and those that the configs declare themselves."""
    names = {field.name for settings in stage_settings() for field in fields(settings)}
    return names | overridden().keys()


def reward_lines() -> list[str]:
    """Return a line for each reward of the table, with (...) where settings are needed."""
    lines = []
    for name, entry in REWARDS.items():
        shown = f"{name}(...)" if entry.function is None else name
        lines.append(f"  {shown:<31}{entry.about}")
    return lines


def described(field: Field, default: object) -> str:
    """Return the flag of an option with its meaning and default."""
    rules = rules_of(field)
    text = f"{rules.help if rules else field.metadata['help']} [{default}]"
    return textwrap.fill(
        text, 100, initial_indent=f"  --{field.name:<33} ", subsequent_indent=" " * 38
    )


def default_of(field: Field) -> Any:
    """Return an option's default."""
    if field.default_factory is not MISSING:
        return field.default_factory()
    return field.default


def stage_settings() -> list[type]:
    """Return the settings classes of all stages."""
    modules = [importlib.import_module(f"gmpo.{stage.lower()}.settings") for stage in STAGES]
    return [
        getattr(module, f"{stage}Settings") for stage, module in zip(STAGES, modules, strict=True)
    ]


def overridden() -> dict[str, Any]:
    """Return the defaults that GMPOConfig and GRPOConfig set, as config.py writes them."""
    tree = ast.parse(Path(gmpo.__file__).with_name("config.py").read_text(encoding="utf-8"))
    classes = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}

    defaults: dict[str, Any] = {}
    for name in ("GRPOConfig", "GMPOConfig"):  # the later one wins
        for node in classes[name].body:
            if not isinstance(node, ast.AnnAssign) or not isinstance(node.value, ast.Call):
                continue
            if ast.unparse(node.value.func) == "option":
                defaults[ast.unparse(node.target)] = written(node.value.args[0])
    return defaults


def inherited_names() -> set[str]:
    """Return the options of transformers.TrainingArguments, read in its source."""
    spec = importlib.util.find_spec("transformers")
    if spec is None or spec.origin is None:
        return set()
    tree = ast.parse(Path(spec.origin).with_name("training_args.py").read_text(encoding="utf-8"))
    (found,) = [
        node
        for node in tree.body
        if isinstance(node, ast.ClassDef) and node.name == "TrainingArguments"
    ]

    names = set()
    for node in found.body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            hidden = node.value is not None and "init=False" in ast.unparse(node.value)
            if not hidden and not node.target.id.startswith("_"):
                names.add(node.target.id)
    return names


def written(node: ast.expr) -> Any:
    """Return the value of a literal, or the source of anything else."""
    try:
        return ast.literal_eval(node)
    except ValueError:
        return ast.unparse(node)
