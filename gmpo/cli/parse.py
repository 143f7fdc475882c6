"""Options of `gmpo train` out of a YAML file and flags: flags win, unknown names are refused with the closest one."""

import argparse
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import yaml
from transformers.hf_argparser import HfArgumentParser, string_to_bool

from gmpo.config import GMPOConfig, GRPOConfig
from gmpo.option import advice, check_options, declared_type, option

CONFIGS: dict[str, type[GRPOConfig]] = {"gmpo": GMPOConfig, "grpo": GRPOConfig}
PEER_NAMES = {  # what the same option is called in TRL's scripts
    "model_name_or_path": "model",
    "dataset_name": "dataset",
    "dataset_config": "dataset_kwargs",
    "dataset_train_split": "dataset_split",
    "dataset_test_split": "eval_dataset_split",
    "reward_funcs": "reward",
    "reward_model_name_or_path": "reward",
    "use_peft": "peft",
    "dtype": "model_init_kwargs",
    "attn_implementation": "model_init_kwargs",
}
BOOLEAN_OR_TEXT = (
    "scale_rewards",
    "fsdp",
    "include_num_input_tokens_seen",
)  # where true and false are words too


@dataclass
class ScriptOptions:
    """What `gmpo train` needs beside the trainer's config."""

    model: str | None = option(None, "Name or path of the model to train.")
    dataset: str | None = option(
        None,
        "Rows to train on: a dataset on the hub, a .jsonl, .json, .parquet or .csv file, or reasoning_gym:TASK.",
    )
    dataset_split: str = option("train", "Split of the dataset.")
    dataset_kwargs: dict[str, Any] | str | None = option(
        None,
        "Mapping: keywords for load_dataset (`name`, `data_dir`, ...), or the task's own for reasoning_gym.",
    )
    prompt_column: str = option("prompt", "Column of the dataset that holds the prompt.")
    prompt_format: str = option(
        "auto",
        "Text prompts become 'messages' or stay 'text'; 'auto': messages where the tokenizer has a chat template.",
        choices=("auto", "messages", "text"),
    )
    system_prompt: str | None = option(None, "Put before every prompt.")
    eval_dataset: str | None = option(
        None, "Rows for evaluation (see eval_strategy); as `dataset`, may be the same."
    )
    eval_dataset_split: str = option("test", "Split of the evaluation dataset.")
    eval_dataset_kwargs: dict[str, Any] | str | None = option(
        None,
        "As dataset_kwargs. For the reasoning_gym task of `dataset`: what differs; other entries are drawn.",
    )
    reward: list[str] | None = option(
        None,
        "One or more: a built-in name (accuracy, number_match, think_format, bare_number, reasoning_gym, ...), "
        "file.py:function, or a reward model. None: the verifier of the reasoning_gym task.",
    )
    algorithm: str = option(
        "gmpo", "gmpo, or the GRPO family (see loss_type).", choices=tuple(CONFIGS)
    )
    peft: dict[str, Any] | str | None = option(
        None,
        "Mapping: train a LoRA adapter with these options of peft.LoraConfig, for example {r: 16}.",
    )
    resume: str | None = option(
        None, "Go on from this checkpoint folder, or from the 'latest' in output_dir."
    )
    dry_run: bool = option(
        False, "Print the resolved options and the batch arithmetic, without loading weights."
    )

    def __post_init__(self):
        for field in fields(self):
            if declared_type(self, field.name).startswith("dict"):
                setattr(self, field.name, as_mapping(field.name, getattr(self, field.name)))
        self.reward = [self.reward] if isinstance(self.reward, str) else self.reward
        check_options(self)
        for name in ("model", "dataset"):
            if getattr(self, name) is None:
                raise ValueError(
                    f"There is no {name}. Give --{name} NAME, or `{name}: NAME` in the config file."
                )


def parse(arguments: Sequence[str]) -> tuple[ScriptOptions, GRPOConfig]:
    """The options that `arguments` and the YAML file they name ask for.

    Raises:
        ValueError: For an unknown option, an illegal value, or a file that is no mapping.
        FileNotFoundError: If the YAML file is not there.
    """
    flags = parse_flags(arguments, GMPOConfig)
    path = flags.pop("config", None)
    written = read_yaml(path) if path else {}
    algorithm = {**written, **flags}.get("algorithm", "gmpo")
    config_class = CONFIGS.get(
        algorithm, GMPOConfig
    )  # another algorithm is refused by ScriptOptions
    values = {**converted(written, config_class, path), **flags}
    script_names = {field.name for field in fields(ScriptOptions)}
    script = ScriptOptions(
        **{name: value for name, value in values.items() if name in script_names}
    )
    own = {name: value for name, value in values.items() if name not in script_names}
    own.setdefault("output_dir", f"{Path(str(script.model)).name}-{algorithm.upper()}")
    return script, config_class(**own)


# -- flags -------------------------------------------------------------------------------------------------------------


class FlagParser(HfArgumentParser):
    """argparse over a config class; what is wrong is raised, and nothing that was not given is filled in."""

    def __init__(self, config_class: type[GRPOConfig]):
        super().__init__(config_class, allow_abbrev=False, add_help=False)  # pyright: ignore[reportArgumentType]
        for field in fields(ScriptOptions):
            names = dict.fromkeys((f"--{field.name}", f"--{field.name.replace('_', '-')}"))
            self.add_argument(*names, **script_argument(field.name))
        self.add_argument("--config", type=str)
        for action in self._actions:
            action.default, action.required = argparse.SUPPRESS, False
            if "dict" in str(action.type) or "Config" in str(action.type):
                action.type = str  # JSON, which the config reads
            if action.type is string_to_bool or action.dest in BOOLEAN_OR_TEXT:
                action.type = boolean_or_text if action.dest in BOOLEAN_OR_TEXT else boolean
                action.nargs, action.const = "?", True

    def error(self, message: str) -> Any:
        raise ValueError(f"{message.rstrip('.')}.")

    def types(self) -> dict[str, Any]:
        """What turns a flag's text into its value, by option."""
        return {
            action.dest: action.type for action in self._actions if action.nargs not in ("+", 0)
        }


def script_argument(name: str) -> dict[str, Any]:
    """How argparse takes an option of ScriptOptions."""
    declared = str(ScriptOptions.__annotations__[name])
    if "bool" in declared:
        return {"type": string_to_bool}
    return (
        {"nargs": "+", "action": "extend", "type": str}
        if declared.startswith("list")
        else {"type": str}
    )


def boolean(text: str) -> bool:
    try:
        return string_to_bool(text)
    except argparse.ArgumentTypeError:
        raise ValueError("use true or false") from None


def boolean_or_text(text: str) -> bool | str:
    try:
        return boolean(text)
    except ValueError:
        return text


def parse_flags(arguments: Sequence[str], config_class: type[GRPOConfig]) -> dict[str, Any]:
    """The options given as flags, by name."""
    parser = FlagParser(config_class)
    namespace, unknown = parser.parse_known_args(list(arguments))
    if unknown:
        raise ValueError(unknown_option(unknown[0], known_options(config_class)))
    return vars(namespace)


def known_options(config_class: type[GRPOConfig]) -> set[str]:
    return {
        field.name
        for owner in (ScriptOptions, config_class)
        for field in fields(owner)
        if field.init
    }


def unknown_option(name: str, known: set[str], *, source: str = "") -> str:
    """What is wrong with `name`, and the closest name that is right."""
    dashes = "--" if name.startswith("-") else ""
    bare = name.lstrip("-").partition("=")[0].replace("-", "_")
    if not dashes and not source:
        return f"{name!r} stands alone. Options are --name value; a config file is --config FILE."
    if bare in PEER_NAMES:
        hint = f" Did you mean {dashes}{PEER_NAMES[bare]}?"
    else:
        hint = advice(bare, known, prefix=dashes) or " gmpo train --help lists the options."
    return f"There is no option {dashes}{bare}{source}.{hint}"


# -- YAML --------------------------------------------------------------------------------------------------------------


class Loader(yaml.SafeLoader):
    """YAML 1.2's scalars: 1e-6 is a number, and `no` and `off` are words (as in `save_strategy: no`), not false."""

    yaml_implicit_resolvers = {  # noqa: RUF012 (PyYAML's protocol)
        start: [
            (tag, form)
            for tag, form in resolvers
            if not tag.endswith((":bool", ":float", ":timestamp"))
        ]
        for start, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


Loader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile("^([Tt]rue|TRUE|[Ff]alse|FALSE)$"), list("tTfF")
)
Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?((\.\d+|\d+(\.\d*)?)([eE][-+]?\d+)?|\.inf|\.Inf|\.INF)$|^\.(nan|NaN|NAN)$"),
    list("-+.0123456789"),
)


def read_yaml(path: str) -> dict[str, Any]:
    """The mapping in the file `path`."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"There is no config file {path!r}.")
    try:
        content = yaml.load(Path(path).read_text(encoding="utf-8"), Loader)
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not YAML: {error}") from None
    if content is not None and not isinstance(content, dict):
        raise ValueError(
            f"{path} holds a {type(content).__name__}, not a mapping. Write one `option: value` per line."
        )
    return content or {}


def converted(
    written: Mapping[str, Any], config_class: type[GRPOConfig], path: str | None
) -> dict[str, Any]:
    """The file's options, checked by name; text for an option of another type is read as that flag's text would be."""
    known, types = known_options(config_class), FlagParser(config_class).types()
    values = {}
    for name, value in written.items():
        if name not in known:
            raise ValueError(unknown_option(str(name), known, source=f" (in {path})"))
        convert = types.get(name)
        if isinstance(value, str) and convert not in (None, str):
            try:
                value = convert(value)
            except (ValueError, TypeError) as error:
                kind = getattr(convert, "__name__", "legal value")
                raise ValueError(f"{name}={value!r} in {path} is no {kind}: {error}.") from None
        values[name] = value
    return values


def as_mapping(name: str, value: Any) -> dict[str, Any] | None:
    """A mapping, given as such (in YAML) or as JSON or YAML text (as a flag)."""
    if isinstance(value, str):
        try:
            value = yaml.load(value, Loader)
        except yaml.YAMLError as error:
            raise ValueError(f"{name}={value!r} can't be read: {error}") from None
    if value is not None and not isinstance(value, dict):
        raise ValueError(f"{name}={value!r} is not a mapping, like '{{\"size\": 500}}'.")
    return value
