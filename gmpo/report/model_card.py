"""The README.md of a trained model: its training and data, how to load and how to cite it."""

import importlib.metadata
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from huggingface_hub.utils import yaml_dump


@dataclass(frozen=True, slots=True)
class Method:
    """The words of a card about an algorithm."""

    title: str
    arxiv: str
    about: str
    bibtex: str


METHODS = {
    "gmpo": Method(
        "Geometric-Mean Policy Optimization (GMPO)",
        "2507.20673",
        "Each completion has one importance ratio: the geometric mean of its token ratios, clipped "
        "in log space.",
        """\
@article{zhao2025geometric,
  title   = {Geometric-Mean Policy Optimization},
  author  = {Zhao, Yuzhong and Liu, Yue and Liu, Junpeng and Chen, Jingye and Wu, Xun and Hao, Yaru
             and Lv, Tengchao and Huang, Shaohan and Cui, Lei and Ye, Qixiang and Wan, Fang
             and Wei, Furu},
  journal = {arXiv preprint arXiv:2507.20673},
  year    = {2025}
}""",
    ),
    "grpo": Method(
        "Group Relative Policy Optimization (GRPO)",
        "2402.03300",
        "Each completion's reward is taken relative to the rewards of the other completions of its "
        "prompt.",
        """\
@article{shao2024deepseekmath,
  title   = {DeepSeekMath: Pushing the Limits of Mathematical Reasoning in Open Language Models},
  author  = {Shao, Zhihong and Wang, Peiyi and Zhu, Qihao and Xu, Runxin and Song, Junxiao
             and Bi, Xiao and Zhang, Haowei and Zhang, Mingchuan and Li, Y. K. and Wu, Y.
             and Guo, Daya},
  journal = {arXiv preprint arXiv:2402.03300},
  year    = {2024}
}""",
    ),
}
VARIANTS = {  # loss types of the GRPO family with a separate paper
    "dr_grpo": ("Dr. GRPO", "2503.20783"),
    "dapo": ("DAPO", "2503.14476"),
    "cispo": ("CISPO", "2506.13585"),
    "sapo": ("SAPO", "2511.20347"),
    "vespo": ("VESPO", "2602.10693"),
}
OPTIONS = (  # shown where the settings have them
    "loss_type",
    "epsilon",
    "epsilon_high",
    "delta",
    "beta",
    "mean_power",
    "importance_sampling_level",
    "scale_rewards",
    "num_generations",
    "generation_batch_size",
    "steps_per_generation",
    "num_iterations",
    "max_completion_length",
    "temperature",
    "top_p",
    "top_k",
    "learning_rate",
    "lr_scheduler_type",
    "warmup_steps",
    "optim",
    "weight_decay",
    "max_grad_norm",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "max_steps",
    "num_train_epochs",
    "bf16",
    "seed",
)
FIGURES = re.compile(  # of the log, by name
    r"(eval_\w*?)?(reward|reward_std|rewards/.+/mean|completions/(mean_length|clipped_ratio)"
    r"|entropy|kl)"
)
PACKAGES = ("gmpo", "torch", "transformers", "accelerate", "datasets")


def model_card(
    *,
    algorithm: str,
    model_name: str,
    base_model: str | None = None,
    dataset_name: str | Sequence[str] | None = None,
    tags: Sequence[str] = (),
    args: object = None,
    log_history: Sequence[Mapping[str, Any]] = (),
    license: str | None = None,
    adapter: bool = False,
) -> str:
    """Return the text of a README.md, with its YAML head.

    Args:
        algorithm: "gmpo" or "grpo", in any case.
        model_name: Repository or folder; what the reader loads.
        base_model: Repository or folder that the training started from.  Folders stay out of the
            head.
        dataset_name: What it was trained on; hub repositories go into the head.
        tags: Beside "gmpo" and "grpo".
        args: The settings of the run; a list of harmless options is shown.
        log_history: The Trainer's; the last figure of each kind is shown.
        adapter: The repository holds a PEFT adapter, no whole model.
    """
    algorithm = algorithm.lower()
    method = METHODS[algorithm]
    datasets = [dataset_name] if isinstance(dataset_name, str) else list(dataset_name or ())
    head = {
        "library_name": "peft" if adapter else "transformers",
        "model_name": model_name,
        "base_model": base_model if is_hub_name(base_model) else None,
        "datasets": [name for name in datasets if is_hub_name(name)],
        "license": license,
        "tags": list(dict.fromkeys(["gmpo", *(["grpo"] if algorithm == "grpo" else []), *tags])),
    }
    variant = VARIANTS.get(getattr(args, "loss_type", "")) if algorithm == "grpo" else None
    parts = [
        "---\n" + yaml_dump({key: value for key, value in head.items() if value}) + "---",
        f"# {model_name}",
        introduction(method, base_model, datasets, variant),
        "## Use\n\n" + usage(model_name, adapter),
        section("Training", "option", settings_shown(args, algorithm)),
        section("Last figures", "figure", last_figures(log_history)),
        section("Versions", "package", {name: version(name) for name in PACKAGES}),
        f"## Citation\n\n```bibtex\n{method.bibtex}\n```",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def introduction(
    method: Method, base_model: str | None, datasets: Sequence[str], variant: tuple[str, str] | None
) -> str:
    """Return two sentences: from what, on what, by which method; and what that method is."""
    start = f" from {link(base_model)}" if base_model else ""
    data = f" on {' and '.join(link(name, 'datasets/') for name in datasets)}" if datasets else ""
    loss = f", with the loss of {variant[0]} ({paper(variant[1])})" if variant else ""
    how = f"{method.title} ({paper(method.arxiv)}){loss}"
    return f"This model was trained{start}{data} by {how}, with gmpo. {method.about}"


def paper(arxiv: str) -> str:
    return f"[arXiv:{arxiv}](https://arxiv.org/abs/{arxiv})"


def usage(model_name: str, adapter: bool) -> str:
    """Return code that loads the model."""
    name = "AutoPeftModelForCausalLM" if adapter else "AutoModelForCausalLM"
    imports = f"from peft import {name}\nfrom transformers import AutoTokenizer"
    return (
        "```python\n"
        f"{imports if adapter else f'from transformers import {name}, AutoTokenizer'}\n\n"
        f'model = {name}.from_pretrained("{model_name}")\n'
        f'tokenizer = AutoTokenizer.from_pretrained("{model_name}")\n'
        "```"
    )


def settings_shown(args: object, algorithm: str) -> dict[str, Any]:
    """Return the options of `args` that a reader wants to know, without unset ones."""
    shown = {name: getattr(args, name) for name in OPTIONS if getattr(args, name, None) is not None}
    if algorithm == "gmpo":
        shown.pop("loss_type", None)
    if shown.get("max_steps", 0) > 0:
        shown.pop("num_train_epochs", None)
    else:
        shown.pop("max_steps", None)
    return {name: getattr(value, "value", value) for name, value in shown.items()}


def last_figures(log_history: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Return the last logged value of each figure worth showing."""
    figures: dict[str, str] = {}
    for record in log_history:
        for name, value in record.items():
            if FIGURES.fullmatch(name) and isinstance(value, int | float):
                figures[name] = (
                    f"{value:.4g} (step {record['step']})" if "step" in record else f"{value:.4g}"
                )
    return dict(sorted(figures.items()))


def section(title: str, kind: str, values: Mapping[str, Any]) -> str:
    """Return a heading and a table of names and values, or nothing."""
    lines = [f"| {name} | {value} |" for name, value in values.items() if value is not None]
    return (
        "\n".join([f"## {title}", "", f"| {kind} | value |", "|---|---|", *lines]) if lines else ""
    )


def is_hub_name(name: str | None) -> bool:
    """Return whether `name` can be a hub repository: name or owner/name, and no path here."""
    return (
        name is not None
        and re.fullmatch(r"[\w.-]+/[\w.-]+|[\w-]+", name) is not None
        and not os.path.exists(name)
    )


def link(name: str, kind: str = "") -> str:
    """Return a link to the hub, or the last part of a local path: the rest helps nobody else."""
    if is_hub_name(name):
        return f"[{name}](https://huggingface.co/{kind}{name})"
    return f"`{os.path.basename(os.path.normpath(name))}`"


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def write_model_card(folder: str, *, model_name: str | None, **facts: Any) -> None:
    """Write `model_card` to README.md in `folder`.

    Args:
        folder: Of the run; made if it is missing.
        model_name: None takes the folder's name.
        facts: What else `model_card` takes.
    """
    folder = os.path.abspath(folder)
    text = model_card(model_name=model_name or os.path.basename(folder), **facts)
    os.makedirs(folder, exist_ok=True)
    with open(os.path.join(folder, "README.md"), "w", encoding="utf-8") as file:
        file.write(text)
