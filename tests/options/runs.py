"""Small runs that options can be felt in.

A scenario is a run of two optimizer steps at most.  What it leaves is kept as a `Run`; each distinct run is made once.
"""

import contextlib
import copy
import functools
import gc
import io
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import MixtralConfig, MixtralForCausalLM

from gmpo.trainer import GMPOTrainer, GRPOTrainer
from tests.tiny import WORDS, tiny_model, tiny_tokenizer
from tests.watch import collections_of

LETTERS = "abcdefgh"
ROWS = [{"prompt": " ".join(LETTERS[: 1 + i % 6]), "wanted": LETTERS[i % 8]} for i in range(16)]
MESSAGES = [{"prompt": [{"role": "user", "content": row["prompt"]}]} for row in ROWS]
CLOCKS = ("time", "_per_second", "memory/", "_runtime", "mem_")
BASE: dict[str, Any] = {
    "per_device_train_batch_size": 8,
    "num_generations": 4,
    "steps_per_generation": 2,
    "max_completion_length": 6,
    "max_steps": 2,
    "logging_steps": 1,
    "learning_rate": 1e-2,
    "save_strategy": "no",
    "gradient_checkpointing": False,
    "disable_tqdm": True,
    "use_cpu": True,
    "report_to": "none",
}


def first_letters(completions, **columns):
    """Early letters of the alphabet are worth more, and a long completion less."""
    return [
        sum(1 / (1 + ord(word[0])) for word in words(text)) - 0.01 * len(words(text))
        for text in completions
    ]


def even_words(completions, **columns):
    return [float(len(words(text)) % 2) for text in completions]


def words(completion: Any) -> list[str]:
    """Of a text, or of the only message."""
    return (completion if isinstance(completion, str) else completion[0]["content"]).split()


@dataclass
class Run:
    """What a run was, and what it left."""

    trainer: Any
    folder: Path
    start: dict[str, Tensor]  # weights before the first step
    collections: list[Any] = field(default_factory=list)  # in order, those of evaluations too
    calls: list[dict[str, Any]] = field(
        default_factory=list
    )  # what the reward function was called with
    forwards: list[dict[str, Any]] = field(
        default_factory=list
    )  # what the model was called with; tensors as shapes
    layer_passes: int = 0  # of the first layer, in training
    printed: str = ""
    evaluation: dict[str, float] = field(default_factory=dict)

    @property
    def args(self) -> Any:
        return self.trainer.args

    @property
    def logs(self) -> list[dict[str, float]]:
        """The logs of optimizer steps, without what a clock or the memory says."""
        return [
            without_clocks(entry) for entry in self.trainer.state.log_history if "loss" in entry
        ]

    @property
    def evaluations(self) -> list[dict[str, float]]:
        return [
            without_clocks(entry)
            for entry in self.trainer.state.log_history
            if "eval_loss" in entry
        ]


def without_clocks(entry: dict[str, float]) -> dict[str, float]:
    return {
        name: value for name, value in entry.items() if not any(clock in name for clock in CLOCKS)
    }


# -- scenarios ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scenario:
    """How a run is made: options and trainer arguments on top of the smallest run."""

    options: dict[str, Any] = field(default_factory=dict)
    arguments: Callable[[Path], dict[str, Any]] = (
        lambda folder: {}
    )  # makes them; may write into the folder
    cls: type = GMPOTrainer
    act: Callable[[Any], Any] = lambda trainer: trainer.train()
    around: Callable[[Any], Any] = lambda trainer: contextlib.nullcontext()  # while acting


def from_folder(folder: Path) -> dict[str, Any]:
    """Policy and tokenizer by path."""
    tiny_model(dtype=torch.bfloat16).save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    return {"model": str(folder / "model"), "processing_class": None}


def polite_tokenizer() -> Any:
    """One whose chat template has a keyword of its own."""
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% if polite %}{{ 'h ' }}{% endif %}" + tokenizer.chat_template
    return tokenizer


def mixture() -> MixtralForCausalLM:
    torch.manual_seed(0)
    return MixtralForCausalLM(
        MixtralConfig(
            vocab_size=len(WORDS),
            hidden_size=32,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            num_local_experts=4,
            max_position_embeddings=128,
            pad_token_id=0,
            eos_token_id=1,
            bos_token_id=None,
            initializer_range=0.2,
        )
    )


@contextlib.contextmanager
def drifted_sampler(trainer: Any) -> Iterator[None]:
    """The engine reports log-probs that are off by up to a nat, as an engine of its own arithmetic might."""
    engine, noise = trainer.stages.engine, torch.Generator().manual_seed(0)
    plain = engine.generate

    def generate(requests, sampling):
        groups = plain(requests, sampling)
        for completion in (completion for group in groups for completion in group):
            drift = (torch.rand(len(completion.logps), generator=noise) - 0.5) / 2
            completion.logps = (torch.tensor(completion.logps) + drift).tolist()
        return groups

    engine.generate = generate
    yield
    engine.generate = plain


def resumed(trainer: Any) -> None:
    """Two steps, of which the second starts from the checkpoint that the first left."""
    trainer.args.max_steps, total = 1, trainer.args.max_steps
    trainer.train()
    trainer.args.max_steps = total
    trainer.train(resume_from_checkpoint=True)


def evaluated(trainer: Any) -> Any:
    return trainer.evaluate()


EVALUATION = {"num_generations_eval": 2, "per_device_eval_batch_size": 4}
SCENARIOS: dict[str, Scenario] = {
    "gmpo": Scenario(),
    "grpo": Scenario({"loss_type": "grpo"}, cls=GRPOTrainer),
    "messages": Scenario(
        arguments=lambda _: {
            "train_dataset": Dataset.from_list(MESSAGES),
            "processing_class": polite_tokenizer(),
        }
    ),
    "two rewards": Scenario(arguments=lambda _: {"reward_funcs": [first_letters, even_words]}),
    "even": Scenario(
        arguments=lambda _: {
            "reward_funcs": lambda completions, **columns: [1.0] * len(completions)
        }
    ),
    "dropout": Scenario(arguments=lambda _: {"model": tiny_model(attention_dropout=0.5)}),
    "short context": Scenario(
        {"overlong_prompts": "drop"},
        arguments=lambda _: {"model": tiny_model(max_position_embeddings=9)},
    ),
    "half": Scenario(arguments=lambda _: {"model": tiny_model(dtype=torch.bfloat16)}),
    "mixture": Scenario(arguments=lambda _: {"model": mixture()}),
    "drifted": Scenario(around=drifted_sampler),
    "by path": Scenario(arguments=from_folder),
    "eval": Scenario(
        {"eval_strategy": "steps", "eval_steps": 1, **EVALUATION},
        arguments=lambda _: {"eval_dataset": Dataset.from_list(ROWS[:3])},
    ),
    "evaluate": Scenario(
        EVALUATION,
        arguments=lambda _: {
            "eval_dataset": Dataset.from_list(ROWS[:3]),
            "compute_metrics": lambda prediction: {"predictions": len(prediction.predictions)},
        },
        act=evaluated,
    ),
    "saving": Scenario({"save_strategy": "steps", "save_steps": 1}),
    "resumed": Scenario({"save_strategy": "steps", "save_steps": 1}, act=resumed),
    "built": Scenario(act=lambda trainer: None),
    "epochs": Scenario(
        {"max_steps": -1}, arguments=lambda _: {"train_dataset": Dataset.from_list(ROWS[:4])}
    ),
}


# -- running -----------------------------------------------------------------------------------------------------------


def build(
    scenario: Scenario,
    options: dict[str, Any],
    folder: Path,
    calls: list[dict[str, Any]] | None = None,
) -> Any:
    """The trainer of a scenario with further options; `calls` gets what its reward functions are called with."""
    keywords = {"output_dir": str(folder / "out"), **BASE, **scenario.options, **options}
    arguments = {
        "model": None,
        "reward_funcs": first_letters,
        "train_dataset": Dataset.from_list(ROWS),
        "processing_class": tiny_tokenizer(),
        **scenario.arguments(folder),
    }
    if arguments["model"] is None:
        arguments["model"] = tiny_model()
    rewards = arguments["reward_funcs"]
    rewards = rewards if isinstance(rewards, list) else [rewards]
    arguments["reward_funcs"] = [
        spied(reward, [] if calls is None else calls) for reward in rewards
    ]
    return scenario.cls(args=scenario.cls.config_class(**keywords), **arguments)


def spied(reward: Any, calls: list[dict[str, Any]]) -> Any:
    """A reward function that keeps what it is called with; anything else as it is."""
    if not callable(reward) or isinstance(reward, nn.Module):
        return reward

    @functools.wraps(reward)
    def spy(**columns):
        calls.append(columns)
        return reward(**columns)

    return spy


def run(name: str, **options: Any) -> Run:
    """The run of a scenario with these options, made once."""
    return _run(
        name, tuple(sorted((key, repr(value)) for key, value in options.items())), Options(options)
    )


class Options(dict):
    """Equal to every other one: what they hold is in the key beside them."""

    def __hash__(self) -> int:
        return 0

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Options)


@functools.cache
def _run(name: str, key: Any, options: Options) -> Run:
    return fresh_run(SCENARIOS[name], **options)


def fresh_run(scenario: Scenario, **options: Any) -> Run:
    folder = Path(tempfile.mkdtemp(prefix="gmpo-options-"))
    calls: list[dict[str, Any]] = []
    trainer = build(scenario, copy.deepcopy(dict(options)), folder, calls)
    result = Run(trainer, folder, start=weights_of(trainer.unwrapped_policy()), calls=calls)
    gc.freeze()  # accelerate collects garbage after each training, which takes longer than these runs
    with (
        recorded(trainer, result),
        scenario.around(trainer),
        contextlib.redirect_stdout(io.StringIO()) as printed,
    ):
        evaluation = scenario.act(trainer)
    result.printed = printed.getvalue()
    result.evaluation = evaluation if isinstance(evaluation, dict) else {}
    return result


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


@contextlib.contextmanager
def recorded(trainer: Any, result: Run) -> Iterator[None]:
    """Keep the collections, and what the model is called with."""

    def calling(module, args, keywords):
        shapes = {k: tuple(v.shape) if isinstance(v, Tensor) else v for k, v in keywords.items()}
        result.forwards.append({**shapes, "training": module.training})

    def passing(module, args):
        result.layer_passes += module.training

    result.collections = collections_of(trainer)
    model = trainer.unwrapped_policy().base_model
    handles = [
        model.register_forward_pre_hook(calling, with_kwargs=True),
        model.layers[0].input_layernorm.register_forward_pre_hook(passing),
    ]
    yield
    for handle in handles:
        handle.remove()
