"""What runs in the peer's environment: the peer's own trainers, asked for losses and gradients.

Started by `benchmarks.peer.Worker`; knows nothing of gmpo.  A trainer is made once and gets each case's options as if
it had been made with them, since making one takes longer than a hundred cases.
"""

import copy
import functools
import json
import warnings
from collections.abc import Callable
from typing import Any

import torch
from datasets import Dataset
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig, GRPOTrainer
from trl.experimental.gmpo import GMPOConfig, GMPOTrainer

RENAMED = {"epsilon": "epsilon_low"}  # option -> the trainer's attribute


def serve(channel: Any, *, folder: str, max_completion_length: int) -> None:
    """Answer messages.

    Args:
        folder: A saved model with its tokenizer.
        max_completion_length: For all jobs.
    """
    warnings.filterwarnings("ignore")
    make = functools.partial(make_trainer, folder, max_completion_length=max_completion_length)
    jobs = {"losses": losses, "gradients": gradients}
    while (message := channel.receive()) is not None:
        jobs[message.pop("job")](make, **message)
        channel.send(done=True)


def make_trainer(folder: str, *, gmpo: bool, **options: Any) -> Any:
    config_class, trainer_class = (GMPOConfig, GMPOTrainer) if gmpo else (GRPOConfig, GRPOTrainer)
    config = config_class(
        f"{folder}/run",
        use_cpu=True,
        bf16=False,
        report_to="none",
        gradient_checkpointing=False,
        **options,
    )
    trainer = trainer_class(
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32),
        lambda completions, **_: [0.0] * len(completions),
        args=config,
        train_dataset=Dataset.from_dict({"prompt": ["a"]}),
        processing_class=AutoTokenizer.from_pretrained(folder),
    )
    trainer.model.train()
    return trainer


# -- many losses, from log-probs ---------------------------------------------------------------------------------------


def losses(make: Callable[..., Any], *, cases: str, tensors: str, out: str) -> None:
    """The loss of each case and its gradients in log-probs and entropies.

    Args:
        cases: JSON file, a list of {"member", "options", "micro_batches", "windows", "other_tokens", "other"}.
        tensors: Safetensors file with "{number}/{name}".
        out: Safetensors file to write, with "{number}/loss", "{number}/logps" and "{number}/entropy".
    """
    with open(cases) as file:
        listed = json.load(file)
    rows: list[dict[str, Tensor]] = [{} for _ in listed]
    for key, value in load_file(tensors).items():
        number, name = key.split("/")
        rows[int(number)][name] = value
    trainers = {gmpo: Programmable(make(gmpo=gmpo)) for gmpo in (False, True)}
    answers = {}
    for number, (case, values) in enumerate(zip(listed, rows, strict=True)):
        for name, value in (
            trainers[case["member"] == "gmpo"].loss_and_gradients(case, values).items()
        ):
            answers[f"{number}/{name}"] = value.contiguous()
    save_file(answers, out)


class Programmable:
    """A trainer whose options, generations and log-probs are given from outside; the rest is its own code."""

    def __init__(self, trainer: Any):
        self.trainer, self.args = trainer, trainer.args
        self.attributes = dict(vars(trainer))
        trainer._calculate_rewards = lambda inputs, *_: torch.zeros(len(inputs), 1)
        trainer._get_per_token_logps_and_entropies = self._scores
        trainer._generate = self._generate

    def loss_and_gradients(
        self, case: dict[str, Any], values: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        self.values, self.part = values, slice(None)
        self.leaves = {name: values[name].clone().requires_grad_() for name in ("logps", "entropy")}
        num_rows = len(values["advantages"])
        self._program(case, num_rows)
        inputs = self.trainer._generate_and_score_completions(
            [{"prompt": "a"} for _ in range(num_rows)]
        )
        inputs |= {"advantages": values["advantages"], "old_per_token_logps": values["old_logps"]}
        inputs.setdefault("sampling_per_token_logps", values["sampler_logps"])
        inputs["num_items_in_batch"] = inputs["num_items_in_batch"] + case["other_tokens"]
        size = num_rows // case["micro_batches"]
        total = torch.zeros((), dtype=torch.float64)
        for start in range(0, num_rows, size):
            self.part = slice(start, start + size)
            part = {k: v if v.dim() == 0 else v[self.part] for k, v in inputs.items()}
            loss = self.trainer.compute_loss(self.trainer.model, part)
            loss.backward()
            total += loss.detach()
        gradients = {
            k: torch.zeros_like(v) if v.grad is None else v.grad for k, v in self.leaves.items()
        }
        return {"loss": total, **gradients}

    def _program(self, case: dict[str, Any], num_rows: int) -> None:
        """Put the options where the trainer's constructor puts them."""
        trainer = self.trainer
        for name, value in self.attributes.items():
            if isinstance(value, bool | int | float | str | None):
                setattr(trainer, name, value)
        trainer.args = copy.copy(self.args)
        options = {"vllm_importance_sampling_correction": True, **case["options"], **case["other"]}
        for name, value in options.items():
            setattr(trainer.args, name, value)
            setattr(trainer, RENAMED.get(name, name), value)
        if trainer.args.epsilon_high is None:
            trainer.epsilon_high = trainer.args.epsilon
        trainer.use_vllm = options["vllm_importance_sampling_correction"]
        trainer._entropy_bonus_enabled = trainer.entropy_coef != 0.0
        trainer.ref_model = "reference"  # what `_scores` gets to see
        trainer.num_generations = num_rows
        trainer.current_gradient_accumulation_steps = case["micro_batches"]
        trainer.args.steps_per_generation = case["micro_batches"] * case["windows"]

    def _generate(self, prompts: list[Any]) -> tuple[Any, ...]:
        tokenizer = self.trainer.processing_class
        lengths = self.values["lengths"].tolist()
        last = [
            tokenizer.bos_token_id if cut else tokenizer.eos_token_id
            for cut in self.values["truncated"].tolist()
        ]
        ids = [[5] * (length - 1) + [end] for length, end in zip(lengths, last, strict=True)]
        written = [
            row[:length]
            for row, length in zip(self.values["mask"].int().tolist(), lengths, strict=True)
        ]
        reports = [
            row[:length]
            for row, length in zip(self.values["sampler_logps"].tolist(), lengths, strict=True)
        ]
        return [[4]] * len(ids), ids, written, ["b"] * len(ids), reports, {}, None, []

    def _scores(self, model: Any, *_: Any, **__: Any) -> tuple[Tensor, Tensor, None]:
        if torch.is_grad_enabled():
            return self.leaves["logps"][self.part], self.leaves["entropy"][self.part], None
        name = "ref_logps" if model == "reference" else "old_logps"
        return self.values[name], self.values["entropy"], None


# -- few losses, through a model ---------------------------------------------------------------------------------------


def gradients(
    make: Callable[..., Any], *, options: dict[str, Any], gmpo: bool, batch: str, out: str
) -> None:
    """The loss of a batch through the model, and the gradient of every parameter.

    Args:
        batch: Safetensors file with the peer's own input names.
        out: Safetensors file to write, with "loss" and a gradient by parameter name.
    """
    trainer = make(gmpo=gmpo, **options)
    trainer.current_gradient_accumulation_steps = 1
    loss = trainer.compute_loss(trainer.model, load_file(batch))
    loss.backward()
    answers = {name: p.grad for name, p in trainer.model.named_parameters() if p.grad is not None}
    save_file({**answers, "loss": loss.detach()}, out)
