"""Options of `gmpo train` out of a YAML file and flags: flags win, unknown names are refused."""

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from transformers.hf_argparser import HfArgumentParser, string_to_bool

from gmpo.cli.options import SEVERAL, ScriptOptions, expanded, plain_name, unknown_option
from gmpo.cli.yaml_text import as_mapping, read_yaml
from gmpo.config import GMPOConfig, GRPOConfig
from gmpo.option import declared_type

CONFIGS: dict[str, type[GRPOConfig]] = {"gmpo": GMPOConfig, "grpo": GRPOConfig}
# Options where true and false are words too.
BOOLEAN_OR_TEXT = ("scale_rewards", "fsdp", "include_num_input_tokens_seen")
PATHS = ("output_dir", "logging_dir")


def parse(arguments: Sequence[str]) -> tuple[ScriptOptions, GRPOConfig]:
    """Return the options that `arguments` and the YAML file they name ask for.

    Raises:
        ValueError: For an unknown option, an illegal value, or a file that isn't a mapping.
        FileNotFoundError: If the YAML file is not there.
    """
    flags = parse_flags(arguments, GMPOConfig)
    path = expanded(flags.pop("config", None))
    written = read_yaml(path) if path else {}

    algorithm = {**written, **flags}.get("algorithm", "gmpo")
    known = isinstance(algorithm, str) and algorithm in CONFIGS
    config_class = CONFIGS[algorithm] if known else GMPOConfig  # ScriptOptions refuses another
    values = {**converted(written, config_class, path), **flags}

    if algorithm == "gmpo" and values.get("loss_type", "gmpo") != "gmpo":
        # GMPOConfig takes the default that it inherits; here somebody has written it.
        raise ValueError(
            f"loss_type={values['loss_type']!r} would do nothing with algorithm='gmpo'. Set "
            "algorithm to 'grpo', or leave loss_type out."
        )

    script_names = {field.name for field in fields(ScriptOptions)}
    script = ScriptOptions(**{key: value for key, value in values.items() if key in script_names})
    own = {key: value for key, value in values.items() if key not in script_names}
    own.setdefault("output_dir", f"{Path(str(script.model)).name}-{str(script.algorithm).upper()}")
    return script, config_class(**settled(own, config_class))


def settled(values: dict[str, Any], config_class: type[GRPOConfig]) -> dict[str, Any]:
    """Return the trainer's options with mappings read and ~ expanded."""
    result = dict(values)
    for name, value in values.items():
        if name in PATHS:
            result[name] = expanded(value)
        is_text = isinstance(value, str) and value.lstrip().startswith("{")
        if is_text and declared_in(config_class, name).startswith("dict"):
            result[name] = as_mapping(name, value)
    return result


def declared_in(config_class: type[GRPOConfig], name: str) -> str:
    """Return the declared type of an option, as text."""
    return declared_type(config_class.__new__(config_class), name)


# -- flags -----------------------------------------------------------------------------------------


class FlagParser(HfArgumentParser):
    """argparse over a config class; what is wrong is raised, and no default is filled in."""

    def __init__(self, config_class: type[GRPOConfig]):
        kind: Any = config_class
        super().__init__(kind, allow_abbrev=False, add_help=False)
        for field in fields(ScriptOptions):
            names = dict.fromkeys((f"--{field.name}", f"--{field.name.replace('_', '-')}"))
            self.add_argument(*names, **script_argument(field.name))
        self.add_argument("--config", type=str)

        for action in self._actions:
            action.default, action.required = argparse.SUPPRESS, False
            if "dict" in str(action.type) or "Config" in str(action.type):
                action.type = str  # a mapping's text, which is read later
            if action.type is string_to_bool or action.dest in BOOLEAN_OR_TEXT:
                action.type = boolean_or_text if action.dest in BOOLEAN_OR_TEXT else boolean
                action.nargs, action.const = "?", True

    def error(self, message: str) -> Any:
        raise ValueError(f"{message.rstrip('.')}.")

    def types(self) -> dict[str, Any]:
        """Return what turns a flag's text into its value, by option."""
        return {
            action.dest: action.type for action in self._actions if action.nargs not in ("+", 0)
        }


def script_argument(name: str) -> dict[str, Any]:
    """Return how argparse takes an option of ScriptOptions."""
    declared = str(ScriptOptions.__annotations__[name])
    if "bool" in declared:
        return {"type": string_to_bool}
    if name in SEVERAL:
        return {"nargs": "+", "action": "extend", "type": str}
    return {"type": str}


def boolean(text: str) -> bool:
    """Return what `text` says: true or false."""
    try:
        return string_to_bool(text)
    except argparse.ArgumentTypeError:
        raise ValueError("use true or false") from None


def boolean_or_text(text: str) -> bool | str:
    """Return what `text` says, or `text` if that isn't true or false."""
    try:
        return boolean(text)
    except ValueError:
        return text


def parse_flags(arguments: Sequence[str], config_class: type[GRPOConfig]) -> dict[str, Any]:
    """Return the options given as flags, by name."""
    parser = FlagParser(config_class)
    namespace, unknown = parser.parse_known_args(list(arguments))
    if unknown:
        raise ValueError(unknown_option(unknown[0], known_options(config_class)))
    return vars(namespace)


def known_options(config_class: type[GRPOConfig]) -> set[str]:
    """Return the names of all options."""
    names = set()
    for owner in (ScriptOptions, config_class):
        names |= {field.name for field in fields(owner) if field.init}
    return names


# -- the file --------------------------------------------------------------------------------------


def converted(
    written: Mapping[str, Any], config_class: type[GRPOConfig], path: str | None
) -> dict[str, Any]:
    """Return the file's options, checked by name.

    Text for an option of another type is read as that flag's text would be.
    """
    known, types = known_options(config_class), FlagParser(config_class).types()
    values: dict[str, Any] = {}
    for key, value in written.items():
        name = plain_name(str(key))
        if name not in known:
            raise ValueError(unknown_option(str(key), known, source=f" (in {path})"))
        if name in values:
            raise ValueError(f"{path} gives {name} twice.")
        values[name] = from_text(name, value, types.get(name), path)
    return values


def from_text(
    name: str, value: object, convert: Callable[[str], Any] | None, path: str | None
) -> Any:
    """Return `value`, read as a flag's text would be if it is text for another type."""
    if not isinstance(value, str) or convert in (None, str):
        return value
    try:
        return convert(value)
    except (ValueError, TypeError) as error:
        kind = getattr(convert, "__name__", "legal value")
        raise ValueError(f"{name}={value!r} in {path} is no {kind}: {error}.") from None
