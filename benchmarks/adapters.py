"""SmolLM2 trained whole and with LoRA adapters on the same prompts: both learn, and the base stays bitwise as it is.

    python -m benchmarks.adapters [--model FOLDER] [--steps 12]

The reward is the share of a completion's characters that are digits: the model, which answers in sentences, learns
within a few steps to answer with a number.
"""

import hashlib
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks import compare

RATES = {"whole model": 2e-5, "adapters": 1e-3}
LORA = {
    "r": 16,
    "lora_alpha": 32,
    "target_modules": "all-linear",
    "task_type": "CAUSAL_LM",
    "lora_dropout": 0.0,
}
EDGE = 3  # collections that the first and the last reward are means of


def main() -> None:
    options = compare.model_options(__doc__)
    options.add_argument("--steps", type=int, default=12)
    args = options.parse_args()
    folder = compare.model_folder(args)
    rewards = {
        name: trained(folder, adapters=name == "adapters", steps=args.steps)[0] for name in RATES
    }
    columns = {
        "trained": lambda name: name,
        "reward, first collections": lambda name: f"{first_and_last(rewards[name])[0]:.2f}",
        "last": lambda name: f"{first_and_last(rewards[name])[1]:.2f}",
    }
    title = f"{args.steps} optimizer steps of 32 completions; the mean reward of {EDGE} collections at each end."
    compare.report("adapters", title, compare.table(list(RATES), columns), args)


def trained(folder: Path, *, adapters: bool, steps: int) -> tuple[list[float], Any]:
    """Mean reward of each collection, and the model.

    Raises:
        AssertionError: If adapters were trained and a weight of the base is another one than before.
    """
    from datasets import Dataset

    from gmpo.config import GMPOConfig
    from gmpo.trainer import GMPOTrainer

    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    before = fingerprints(model)
    with tempfile.TemporaryDirectory() as output:
        trainer = GMPOTrainer(
            model,
            share_of_digits,
            args=GMPOConfig(
                output,
                max_steps=steps,
                num_generations=16,
                per_device_train_batch_size=32,
                max_completion_length=6,
                learning_rate=RATES["adapters" if adapters else "whole model"],
                lr_scheduler_type="constant",
                logging_steps=1,
                save_strategy="no",
                gradient_checkpointing=False,
                disable_tqdm=True,
                steps_per_generation=2,
            ),
            train_dataset=Dataset.from_list([{"prompt": question(n)} for n in range(64)]),
            processing_class=AutoTokenizer.from_pretrained(folder),
            peft_config=lora() if adapters else None,
        )
        trainer.train()
    after = fingerprints(trainer.model.get_base_model() if adapters else trainer.model)
    assert (before == after) == adapters, (
        "the base has changed" if adapters else "nothing was trained"
    )
    return [
        entry["reward"] for entry in trainer.state.log_history if "reward" in entry
    ], trainer.model


def question(number: int) -> list[dict[str, str]]:
    return [{"role": "user", "content": f"What is {number % 8 + 1} + {number // 8 + 1}?"}]


def share_of_digits(completions: Sequence[Any], **columns: Any) -> list[float]:
    texts = [completion[0]["content"] for completion in completions]
    return [sum(map(str.isdigit, text)) / max(1, len(text)) for text in texts]


def lora() -> Any:
    from peft import LoraConfig

    return LoraConfig(**LORA)


def fingerprints(model: Any) -> dict[str, str]:
    """Return a hash of every weight that is not an adapter's, by the name that it has without adapters."""
    return {
        name.replace(".base_layer", ""): hashlib.sha256(
            value.contiguous().numpy().tobytes()
        ).hexdigest()
        for name, value in model.state_dict().items()
        if "lora_" not in name
    }


def first_and_last(rewards: Sequence[float]) -> tuple[float, float]:
    return sum(rewards[:EDGE]) / EDGE, sum(rewards[-EDGE:]) / EDGE


if __name__ == "__main__":
    main()
