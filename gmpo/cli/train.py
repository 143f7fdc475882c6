"""gmpo train: from a YAML file and flags to a trained model."""

import difflib
import os
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import MISSING, Field, fields
from pathlib import Path
from typing import Any

from transformers import TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback

import gmpo
from gmpo.cli.datasets import count_shared_prompts, load_rows
from gmpo.cli.dry_run import plan
from gmpo.cli.parse import CONFIGS, ScriptOptions, parse
from gmpo.config import STAGE_SETTINGS, GRPOConfig
from gmpo.option import rules_of
from gmpo.policy.load import check_path, load_tokenizer
from gmpo.report.completions import warn_on_error
from gmpo.report.plots import training_curves
from gmpo.report.progress import ProgressLines
from gmpo.reward.by_name import BUILTIN, FACTORIES, is_reward_spec, load_reward
from gmpo.reward.reasoning_gym import PREFIX, evaluation_settings

USAGE = """\
usage: gmpo train --config run.yaml [--option value ...]

The file holds one `option: value` per line; flags win.  A mapping is JSON or YAML text in a flag: '{"size": 500}'."""
TRAINERS = {"gmpo": "GMPOTrainer", "grpo": "GRPOTrainer"}


def run(arguments: Sequence[str]) -> None:
    if {"-h", "--help"} & set(arguments):
        print(help_text())
        return
    script, config = parse(arguments)
    check_evaluation(script, config)
    if script.dry_run:
        check_path(str(script.model))
        for spec in reward_specs(script):
            resolve_reward(spec)
        rows = training_rows(script, as_messages=False)
        print(plan(script, config, len(rows) if hasattr(rows, "__len__") else None))
        return
    train(script, config)


def train(script: ScriptOptions, config: GRPOConfig) -> None:
    """Train what `script` names, with everything that can be wrong checked before weights are loaded."""
    rewards = [resolve_reward(spec) for spec in reward_specs(script)]
    adapter = lora_config(script.peft)
    checkpoint = checkpoint_to_resume(script)
    revision = (config.model_init_kwargs or {}).get("revision")  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer = load_tokenizer(
        str(script.model), trust_remote_code=config.trust_remote_code, revision=revision
    )
    as_messages = wants_messages(script, tokenizer)
    with config.main_process_first(desc="loading the datasets"):
        rows = training_rows(script, as_messages=as_messages)
        eval_rows = evaluation_rows(script, rows, as_messages=as_messages)
    trainer = getattr(gmpo, TRAINERS[script.algorithm])(
        model=script.model,
        reward_funcs=rewards,
        args=config,
        train_dataset=rows,
        eval_dataset=eval_rows,
        processing_class=tokenizer,
        peft_config=adapter,
    )
    for callback in (ProgressCallback, PrinterCallback):
        trainer.remove_callback(callback)
    trainer.add_callback(ProgressLines(bar=not config.disable_tqdm))
    trainer.train(resume_from_checkpoint=checkpoint)
    finish(trainer, script, config)


def finish(trainer: Any, script: ScriptOptions, config: GRPOConfig) -> None:
    """Leave the model, its card and the curves in output_dir, and say where everything is."""
    folder = Path(str(config.output_dir))
    trainer.save_model(str(folder))
    if trainer.is_world_process_zero():
        with warn_on_error("write the model card"):
            trainer.create_model_card(dataset_name=script.dataset)
        if (folder / "metrics.jsonl").exists():
            with warn_on_error("draw the training curves"):
                model, dataset = (
                    Path(str(script.model)).name,
                    Path(str(script.dataset)).name,
                )  # of a folder, its name alone
                title = f"{model} on {dataset}, {script.algorithm.upper()}"
                training_curves(
                    folder / "metrics.jsonl", folder / "training_curves.png", title=title
                )
        print(what_is_where(folder, adapter=script.peft is not None))
    if config.push_to_hub:
        trainer.push_to_hub(dataset_name=script.dataset)


def what_is_where(folder: Path, *, adapter: bool) -> str:
    """The files of a finished run, and the lines that load its model."""
    places = {
        "metrics": folder / "metrics.jsonl",
        "curves": folder / "training_curves.png",
        "completions": folder / "completions",
    }
    lines = [f"model        {folder}"]
    lines += [f"{name:<13}{path}" for name, path in places.items() if path.exists()]
    package, loader = (
        ("peft", "AutoPeftModelForCausalLM")
        if adapter
        else ("transformers", "AutoModelForCausalLM")
    )
    return "\n".join(
        [
            *lines,
            "",
            f"from {package} import {loader}",
            f'model = {loader}.from_pretrained("{folder}")',
        ]
    )


# -- what the options mean ---------------------------------------------------------------------------------------------


def check_evaluation(script: ScriptOptions, config: GRPOConfig) -> None:
    """Refuse rows for evaluation that would never be used, and an evaluation without rows."""
    strategy = str(getattr(config.eval_strategy, "value", config.eval_strategy))
    if script.eval_dataset is not None and strategy == "no":
        raise ValueError(
            "eval_dataset is given, but eval_strategy is 'no'. Set eval_strategy to 'steps' or 'epoch'."
        )
    if script.eval_dataset is None and strategy != "no":
        raise ValueError(
            f"eval_strategy={strategy!r} needs rows. Give --eval_dataset (it may be the same as --dataset: its split "
            f"{script.eval_dataset_split!r} is taken, or other entries of a task)."
        )


def training_rows(script: ScriptOptions, *, as_messages: bool) -> Any:
    return load_rows(
        str(script.dataset),
        split=script.dataset_split,
        kwargs=script.dataset_kwargs,  # pyright: ignore[reportArgumentType]
        prompt_column=script.prompt_column,
        system_prompt=script.system_prompt,
        as_messages=as_messages,
    )


def evaluation_rows(script: ScriptOptions, training: Any, *, as_messages: bool) -> Any:
    """The rows for evaluation, or None.  Says how many of their prompts are trained on too."""
    if script.eval_dataset is None:
        return None
    kwargs: Any = script.eval_dataset_kwargs
    if script.eval_dataset == script.dataset:
        own_task = script.eval_dataset.startswith(PREFIX)
        base: Any = script.dataset_kwargs
        kwargs = (
            evaluation_settings(base, kwargs) if own_task else {**(base or {}), **(kwargs or {})}
        )
    rows = load_rows(
        script.eval_dataset,
        split=script.eval_dataset_split,
        kwargs=kwargs,
        prompt_column=script.prompt_column,
        system_prompt=script.system_prompt,
        as_messages=as_messages,
    )
    if hasattr(rows, "__len__") and hasattr(training, "__len__"):
        shared = count_shared_prompts(rows, training)
        if shared:
            print(
                f"{shared} of {len(rows)} evaluation prompts are training prompts too.",
                file=sys.stderr,
            )
    return rows


def wants_messages(script: ScriptOptions, tokenizer: Any) -> bool:
    if script.prompt_format == "auto":
        return getattr(tokenizer, "chat_template", None) is not None
    return script.prompt_format == "messages"


def reward_specs(script: ScriptOptions) -> list[str]:
    """The rewards asked for, or the verifier of the task."""
    if script.reward:
        return script.reward
    if str(script.dataset).startswith(PREFIX):
        return ["reasoning_gym"]
    raise ValueError(
        "There is no reward. Give --reward: a built-in name, file.py:function, or a reward model."
    )


def resolve_reward(spec: str) -> Any:
    """The function that `spec` names, or `spec` itself where it names a reward model for the trainer to load."""
    if not is_reward_spec(spec) and ("/" in spec or os.path.isdir(spec)):
        return spec
    known = BUILTIN.keys() | FACTORIES.keys()
    close = difflib.get_close_matches(spec, known, n=1)
    if spec.endswith(".py"):
        raise ValueError(f"The reward {spec!r} is a file without a function: write {spec}:NAME.")
    if "." not in spec and not is_reward_spec(spec):
        hint = (
            f"Did you mean {close[0]!r}?" if close else f"Built in are {', '.join(sorted(known))}."
        )
        raise ValueError(f"There is no reward {spec!r}. {hint}")
    return load_reward(spec)


def lora_config(options: Any) -> Any:
    """The peft config that the mapping `options` asks for; None stays None."""
    if options is None:
        return None
    try:
        import peft
    except ImportError as error:
        raise ImportError(
            f"The option peft needs an extra: pip install 'gmpo[peft]' ({error})."
        ) from None
    known = {field.name for field in fields(peft.LoraConfig) if field.init}
    for name in options:
        if name not in known:
            close = difflib.get_close_matches(str(name), known, n=1)
            hint = f" Did you mean {close[0]!r}?" if close else ""
            raise ValueError(f"peft.LoraConfig has no option {name!r}.{hint}")
    return peft.LoraConfig(**{"task_type": "CAUSAL_LM", **options})


def checkpoint_to_resume(script: ScriptOptions) -> str | bool | None:
    """What `Trainer.train` takes: True for the last checkpoint, a folder, or None."""
    if script.resume is None or script.resume == "latest":
        return True if script.resume else None
    if not os.path.isdir(script.resume):
        raise FileNotFoundError(
            f"There is no checkpoint folder {script.resume!r}. --resume latest takes the last one."
        )
    return script.resume


# -- help --------------------------------------------------------------------------------------------------------------


def help_text() -> str:
    """Our options with their meanings and defaults, by stage; those of TrainingArguments by name."""
    defaults = {
        field.name: field for owner in (CONFIGS["gmpo"], ScriptOptions) for field in fields(owner)
    }
    parts = [USAGE, "", "What to train:", *(described(field) for field in fields(ScriptOptions))]
    ours = {field.name for field in fields(ScriptOptions)}
    for owner in STAGE_SETTINGS:
        parts += ["", str(sys.modules[owner.__module__].__doc__).splitlines()[0]]
        parts += [described(defaults[field.name]) for field in fields(owner)]
        ours |= {field.name for field in fields(owner)}
    inherited = sorted(
        field.name for field in fields(TrainingArguments) if field.init and field.name not in ours
    )
    parts += ["", "Options of transformers.TrainingArguments:"]
    parts += textwrap.wrap(", ".join(inherited), 100, initial_indent="  ", subsequent_indent="  ")
    return "\n".join(parts)


def described(field: Field) -> str:
    default = field.default_factory() if field.default_factory is not MISSING else field.default
    rules = rules_of(field)
    text = f"{rules.help if rules else field.metadata['help']} [{default}]"
    return textwrap.fill(
        text, 116, initial_indent=f"  --{field.name:<42}", subsequent_indent=" " * 46
    )
