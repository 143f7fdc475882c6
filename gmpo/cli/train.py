"""gmpo train: from a YAML file and flags to a trained model."""

import contextlib
import importlib.util
import inspect
import logging
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase
from transformers.trainer_callback import PrinterCallback, ProgressCallback

import gmpo
from gmpo.cli.datasets import count_shared_prompts, load_rows
from gmpo.cli.dry_run import plan
from gmpo.cli.options import ScriptOptions
from gmpo.cli.parse import parse
from gmpo.config import GRPOConfig
from gmpo.option import advice
from gmpo.policy.load import check_path, load_tokenizer
from gmpo.report.plots import training_curves
from gmpo.report.progress import ProgressLines
from gmpo.reward.by_name import find_reward
from gmpo.reward.check import check_weights
from gmpo.reward.functions import FunctionReward
from gmpo.reward.reasoning_gym import PREFIX, evaluation_settings
from gmpo.run.folder import refuse_folder_of_model

logger = logging.getLogger(__name__)

TRAINERS = {"gmpo": "GMPOTrainer", "grpo": "GRPOTrainer"}


def run(arguments: Sequence[str]) -> None:
    """Train, or print what would be trained."""
    script, config = parse(arguments)
    check_evaluation(script, config)
    if script.dry_run:
        print(dry_run(script, config))
    else:
        train(script, config)


def dry_run(script: ScriptOptions, config: GRPOConfig) -> str:
    """Return the plan of the run, with everything checked that needs no weights."""
    check_path(str(script.model))
    refuse_folder_of_model(script.model, config.output_dir)
    rewards = [find_reward(spec) for spec in reward_specs(script)]
    check_weights(config.reward_weights, len(rewards))
    checkpoint_to_resume(script)
    lora_config(script.peft)
    quantization_config(script.quantization)
    rows = training_rows(script, as_messages=False)

    columns = getattr(rows, "column_names", None)
    for reward in rewards:
        if callable(reward) and columns is not None:
            FunctionReward(reward).check_columns(columns)
    return plan(script, config, len(rows) if hasattr(rows, "__len__") else None)


def train(script: ScriptOptions, config: GRPOConfig) -> None:
    """Train what `script` names.

    Everything that can be wrong is checked before weights are loaded.
    """
    rewards = [find_reward(spec) for spec in reward_specs(script)]
    adapter = lora_config(script.peft)
    quantization = quantization_config(script.quantization)
    checkpoint = checkpoint_to_resume(script)

    init_kwargs: Any = config.model_init_kwargs or {}
    tokenizer = load_tokenizer(
        str(script.model),
        trust_remote_code=config.trust_remote_code,
        revision=init_kwargs.get("revision"),
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
        quantization_config=quantization,
        peft_config=adapter,
    )
    for callback in (ProgressCallback, PrinterCallback):
        trainer.remove_callback(callback)
    trainer.add_callback(ProgressLines(bar=not config.disable_tqdm))
    trainer.train(resume_from_checkpoint=checkpoint)
    finish(trainer, script, config)


def finish(trainer: gmpo.GRPOTrainer, script: ScriptOptions, config: GRPOConfig) -> None:
    """Leave the model, its card and the curves in output_dir, and say where everything is."""
    folder = Path(str(config.output_dir))
    trainer.save_model(str(folder))
    if trainer.is_world_process_zero():
        with warning_only("write the model card"):
            trainer.create_model_card(dataset_name=dataset_name(script))
        draw_curves(folder, script)
        print(what_is_where(folder, adapter=script.peft is not None))
    if config.push_to_hub:
        trainer.push_to_hub(dataset_name=dataset_name(script))


def draw_curves(folder: Path, script: ScriptOptions) -> None:
    """Draw the training curves, if there is something to draw and something to draw it with."""
    metrics = folder / "metrics.jsonl"
    if not metrics.exists() or importlib.util.find_spec("matplotlib") is None:
        return
    # Of a folder, its name is enough.
    model, dataset = Path(str(script.model)).name, Path(dataset_name(script)).name
    title = f"{model} on {dataset}, {script.algorithm.upper()}"
    with warning_only("draw the training curves"):
        training_curves(metrics, folder / "training_curves.png", title=title)


@contextlib.contextmanager
def warning_only(what: str) -> Iterator[None]:
    """Turn an error into a warning: the model is trained and saved by now."""
    try:
        yield
    except Exception as error:
        logger.warning("Could not %s (%s: %s).", what, type(error).__name__, error)


def dataset_name(script: ScriptOptions) -> str:
    """Return the dataset for the model card: of several files, the first."""
    return script.dataset if isinstance(script.dataset, str) else str((script.dataset or [""])[0])


def what_is_where(folder: Path, *, adapter: bool) -> str:
    """Return the files of a finished run, and the lines that load its model."""
    places = {
        "metrics": folder / "metrics.jsonl",
        "curves": folder / "training_curves.png",
        "completions": folder / "completions",
    }
    package, loader = "transformers", "AutoModelForCausalLM"
    if adapter:
        package, loader = "peft", "AutoPeftModelForCausalLM"

    lines = [f"model        {folder}"]
    lines += [f"{name:<13}{path}" for name, path in places.items() if path.exists()]
    lines += ["", f"from {package} import {loader}"]
    lines += [f'model = {loader}.from_pretrained("{folder}")']
    return "\n".join(lines)


# -- what the options mean -------------------------------------------------------------------------


def check_evaluation(script: ScriptOptions, config: GRPOConfig) -> None:
    """Refuse rows for evaluation that would never be used, and an evaluation without rows."""
    strategy = str(getattr(config.eval_strategy, "value", config.eval_strategy))
    if script.eval_dataset is not None and strategy == "no":
        raise ValueError(
            "eval_dataset is given, but eval_strategy is 'no'. Set eval_strategy to 'steps' or "
            "'epoch'."
        )
    if script.eval_dataset is None and strategy != "no":
        raise ValueError(
            f"eval_strategy={strategy!r} needs rows. Give --eval_dataset (it may be the same as "
            f"--dataset: its split {script.eval_dataset_split!r} is taken, or other entries of a "
            "task)."
        )


def training_rows(script: ScriptOptions, *, as_messages: bool) -> Any:
    """Return the rows to train on."""
    assert script.dataset is not None
    return load_rows(
        script.dataset,
        split=script.dataset_split,
        kwargs=script.dataset_kwargs,  # pyright: ignore[reportArgumentType] (text is read by now)
        prompt_column=script.prompt_column,
        system_prompt=script.system_prompt,
        as_messages=as_messages,
    )


def evaluation_rows(script: ScriptOptions, training: Any, *, as_messages: bool) -> Any:
    """Return the rows for evaluation, or None.  Says how many of them are trained on too."""
    if script.eval_dataset is None:
        return None

    kwargs: Any = script.eval_dataset_kwargs
    if script.eval_dataset == script.dataset:
        base: Any = script.dataset_kwargs
        if str(script.dataset).startswith(PREFIX):
            kwargs = evaluation_settings(base, kwargs)
        else:
            kwargs = {**(base or {}), **(kwargs or {})}
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


def wants_messages(script: ScriptOptions, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Return True if text prompts become messages."""
    if script.prompt_format == "auto":
        return getattr(tokenizer, "chat_template", None) is not None
    return script.prompt_format == "messages"


def reward_specs(script: ScriptOptions) -> list[str]:
    """Return the rewards asked for, or the verifier of the task."""
    if script.reward:
        return script.reward
    if str(script.dataset).startswith(PREFIX):
        return ["reasoning_gym"]
    raise ValueError(
        "There is no reward. Give --reward: a built-in name, file.py:function, or a reward model."
    )


def lora_config(options: Any) -> Any:
    """Return the peft config that the mapping `options` asks for; None stays None."""
    if options is None:
        return None
    try:
        import peft
    except ImportError as error:
        raise ImportError(
            f"The option peft needs an extra: pip install 'gmpo[peft]' ({error})."
        ) from None
    known = {field.name for field in fields(peft.LoraConfig) if field.init}
    refuse_unknown(options, known, "peft.LoraConfig")
    return peft.LoraConfig(**{"task_type": "CAUSAL_LM", **options})


def quantization_config(options: Any) -> Any:
    """Return the BitsAndBytesConfig that the mapping `options` asks for; None stays None."""
    if options is None:
        return None

    from transformers import BitsAndBytesConfig

    known = set(inspect.signature(BitsAndBytesConfig).parameters) - {"kwargs"}
    refuse_unknown(options, known, "transformers.BitsAndBytesConfig")
    return BitsAndBytesConfig(**options)


def refuse_unknown(options: Mapping[str, Any], known: set[str], owner: str) -> None:
    """Raise a ValueError for a key of `options` that `owner` doesn't know."""
    for name in options:
        if name not in known:
            raise ValueError(f"{owner} has no option {name!r}.{advice(str(name), known)}")


def checkpoint_to_resume(script: ScriptOptions) -> str | bool | None:
    """Return what `Trainer.train` takes: True for the last checkpoint, a folder, or None."""
    if script.resume is None:
        return None
    if script.resume == "latest":
        return True
    if not os.path.isdir(script.resume):
        raise FileNotFoundError(
            f"There is no checkpoint folder {script.resume!r}. --resume latest takes the last one."
        )
    if not os.path.isfile(os.path.join(script.resume, "trainer_state.json")):
        raise ValueError(
            f"{script.resume!r} is not a checkpoint: it has no trainer_state.json. Give a folder "
            "checkpoint-N, or --resume latest."
        )
    return script.resume
