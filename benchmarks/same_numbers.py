"""Seeded runs of eight steps, told apart to the bit: what a change of the code's shape must leave as it was.

    python -m benchmarks.same_numbers --write before.json     # on the code before
    python -m benchmarks.same_numbers --compare before.json   # on the code after: names the runs that differ

Every objective, layout and engine that runs here trains the same tiny model, with float32 and one thread.  A run is its
losses and gradient norms, as hexadecimal floats, and a digest of the trained weights.
"""

import argparse
import hashlib
import json
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers.trainer_callback import PrinterCallback, TrainerCallback
from transformers.utils import logging as transformers_logging

from gmpo.config import GMPOConfig, GRPOConfig
from gmpo.trainer import GMPOTrainer, GRPOTrainer
from tests.tiny import tiny_model, tiny_tokenizer

PROMPTS = Dataset.from_list([{"prompt": " ".join("abcdefgh"[: 1 + i % 6])} for i in range(16)])
STEPS = 8

OBJECTIVES: dict[str, dict[str, Any]] = {
    "gmpo": {},
    "gmpo sequence": {"importance_sampling_level": "sequence"},
    "gmpo power mean": {"mean_power": 0.5, "mean_power_final": -0.5},
    "gmpo entropy": {"entropy_coef": 0.01, "top_entropy_quantile": 0.5},
    "gmpo reference": {"beta": 0.04, "sync_ref_model": True, "ref_model_sync_steps": 2},
    "gmpo passes": {"num_iterations": 2, "gradient_accumulation_steps": 2},
    "gmpo resample": {"zero_signal_groups": "resample"},
    "gmpo chunks": {"max_tokens_per_chunk": 40},
    "grpo": {"loss_type": "grpo"},
    "gspo": {"loss_type": "grpo", "importance_sampling_level": "sequence"},
    "bnpo": {"loss_type": "bnpo"},
    "dr_grpo": {"loss_type": "dr_grpo"},
    "dapo": {"loss_type": "dapo"},
    "luspo": {"loss_type": "luspo", "importance_sampling_level": "sequence"},
    "cispo": {"loss_type": "cispo", "epsilon_high": 5.0},
    "sapo": {"loss_type": "sapo"},
    "vespo": {"loss_type": "vespo"},
}
LAYOUTS = ("padded", "packed", "shared_prefix")
ENGINES: dict[str, dict[str, Any]] = {
    "shared_prefix": {"generation_engine": "shared_prefix"},
    "shared_prefix top_k": {"generation_engine": "shared_prefix", "top_k": 5, "top_p": 0.9},
    "generate": {"generation_engine": "generate"},
    "continuous": {"use_transformers_continuous_batching": True},
}


class Recorder(TrainerCallback):
    """Keeps the loss and gradient norm of every step."""

    def __init__(self) -> None:
        self.figures: list[str] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Note a step's figures in full precision."""
        if logs and "loss" in logs:
            self.figures.append(f"{float(logs['loss']).hex()} {float(logs['grad_norm']).hex()}")


def runs() -> dict[str, dict[str, Any]]:
    """Return the options of each run by its name."""
    named = {f"objective {name}": options for name, options in OBJECTIVES.items()}
    named |= {f"layout {name}": {"batch_layout": name, "num_iterations": 2} for name in LAYOUTS}
    named |= {f"engine {name}": options for name, options in ENGINES.items()}
    return named


def train(options: dict[str, Any]) -> dict[str, Any]:
    """Train the tiny model and return its figures and a digest of its weights."""
    is_grpo = "loss_type" in options
    trainer_class = GRPOTrainer if is_grpo else GMPOTrainer
    config_class = GRPOConfig if is_grpo else GMPOConfig
    recorder = Recorder()

    with tempfile.TemporaryDirectory() as folder:
        config = config_class(
            folder,
            per_device_train_batch_size=8,
            num_generations=4,
            steps_per_generation=2,
            max_completion_length=8,
            max_steps=STEPS,
            logging_steps=1,
            learning_rate=1e-2,
            save_strategy="no",
            gradient_checkpointing=False,
            disable_tqdm=True,
            report_to=[],
            use_cpu=True,
            **options,
        )
        trainer = trainer_class(
            tiny_model(),
            share_of_a,
            config,
            PROMPTS,
            processing_class=tiny_tokenizer(),
            callbacks=[recorder],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()

    digest = hashlib.sha256()
    for name, tensor in sorted(trainer.unwrapped_policy().state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.contiguous().numpy().tobytes())
    return {"steps": recorder.figures, "weights": digest.hexdigest()}


def share_of_a(completions: list[str], **columns: Any) -> list[float]:
    """Return the share of words that are "a"."""
    return [text.split().count("a") / max(1, len(text.split())) for text in completions]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    action = parser.add_mutually_exclusive_group(required=True)
    action.add_argument("--write", type=Path, help="where to keep the figures")
    action.add_argument("--compare", type=Path, help="figures that --write kept")
    arguments = parser.parse_args()

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    transformers_logging.set_verbosity_error()
    found = {name: train(options) for name, options in runs().items()}

    if arguments.write:
        arguments.write.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        print(f"{len(found)} runs of {STEPS} steps are in {arguments.write}")
        return

    expected = json.loads(arguments.compare.read_text(encoding="utf-8"))
    different = [name for name in expected if expected[name] != found.get(name)]
    for name in different:
        print(f"DIFFERENT: {name}")
    print(f"{len(expected) - len(different)} of {len(expected)} runs are the same to the bit")
    sys.exit(bool(different))


if __name__ == "__main__":
    main()
