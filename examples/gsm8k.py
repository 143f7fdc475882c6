"""GMPO on GSM8K, grade-school word problems, from Python.  examples/gsm8k.yaml is the same run.

    python -m examples.gsm8k                                       one GPU
    torchrun --nproc_per_node 4 -m examples.gsm8k                  four
    python -m examples.gsm8k --model Qwen/Qwen2.5-1.5B-Instruct --output runs/1.5b

Model and dataset come from the hub.  The sizes are meant for one GPU of 24 GB and a model of 0.5B;
docs/memory.md tells how to find others.
"""

import argparse
from collections.abc import Sequence

from datasets import Dataset, load_dataset

from gmpo import GMPOConfig, GMPOTrainer

SYSTEM_PROMPT = "Reason step by step. Put your final answer, a number, after ####."


def problems(split: str) -> Dataset:
    """Return rows with a `prompt` as messages and the gold `answer`, which ends in "#### 72"."""
    rows = load_dataset("openai/gsm8k", "main", split=split)

    def as_messages(row: dict[str, str]) -> dict[str, list[dict[str, str]]]:
        return {
            "prompt": [
                {"role": "system", "content": SYSTEM_PROMPT},
                {"role": "user", "content": row["question"]},
            ]
        }

    return rows.map(as_messages, remove_columns="question")


def config(output: str, **overrides: object) -> GMPOConfig:
    """Return the options of the run."""
    options = {
        # A collection has 32 prompts with 8 completions each; 4 optimizer steps of 64 completions
        # train on it, so that GMPO's window can act from the second on.
        "num_generations": 8,
        "per_device_train_batch_size": 64,
        "steps_per_generation": 4,
        "max_completion_length": 512,
        # Memory: at most so many tokens in one forward pass, with the same update.
        "max_tokens_per_chunk": 8192,
        # Learning: the paper's rate, constant.
        "learning_rate": 1e-6,
        "lr_scheduler_type": "constant",
        "max_steps": 400,
        # Watching: 200 held-out problems every 50 steps.
        "eval_strategy": "steps",
        "eval_steps": 50,
        "num_generations_eval": 1,
        "per_device_eval_batch_size": 64,
        "logging_steps": 1,
        "save_steps": 100,
        "log_completions": True,
        "num_completions_to_print": 2,
    }
    return GMPOConfig(output, **{**options, **overrides})


def main(arguments: Sequence[str] | None = None, **overrides: object) -> None:
    """Train, and leave the model in the output folder."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--model", default="Qwen/Qwen2.5-0.5B-Instruct")
    parser.add_argument("--output", default="runs/gsm8k")
    options = parser.parse_args(arguments)

    trainer = GMPOTrainer(
        model=options.model,
        reward_funcs="number_match",  # the last number of the completion equals the gold one
        args=config(options.output, **overrides),
        train_dataset=problems("train"),
        eval_dataset=problems("test[:200]"),
    )
    trainer.train()
    trainer.save_model(options.output)


if __name__ == "__main__":
    main()
