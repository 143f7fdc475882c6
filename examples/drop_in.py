"""A script written for TRL, of which only the import line is changed.  Under a minute on a CPU.

python examples/drop_in.py MODEL        (a folder or a name; after `make demo`: .cache/SmolLM2-135M-Instruct)
"""

import sys

from datasets import Dataset

# from trl.experimental.gmpo import GMPOConfig, GMPOTrainer
from gmpo.config import GMPOConfig
from gmpo.trainer import GMPOTrainer

TOPICS = ["the sea", "a train", "winter", "bread", "the moon", "a bicycle", "music", "rain"]


def reward_short(completions, **kwargs):
    """Higher for fewer words, up to 0."""
    return [-float(len(completion[0]["content"].split())) for completion in completions]


def main(model: str) -> None:
    dataset = Dataset.from_list(
        [{"prompt": [{"role": "user", "content": f"Write about {t}."}]} for t in TOPICS]
    )
    training_args = GMPOConfig(
        output_dir="runs/drop_in",
        per_device_train_batch_size=4,
        num_generations=4,
        steps_per_generation=2,  # two optimizer steps per collection: at the second, the clip window can act
        max_completion_length=16,
        max_steps=2,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
    )
    trainer = GMPOTrainer(
        model=model, reward_funcs=reward_short, args=training_args, train_dataset=dataset
    )
    trainer.train()


if __name__ == "__main__":
    main(sys.argv[1])
