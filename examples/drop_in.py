"""A script written for TRL, of which only the import line is changed.  Under a minute on a CPU.

python examples/drop_in.py MODEL        a name or folder; after `make demo`:
                                        .cache/SmolLM2-135M-Instruct
"""

import sys

from datasets import Dataset

# from trl.experimental.gmpo import GMPOConfig, GMPOTrainer
from gmpo import GMPOConfig, GMPOTrainer

TOPICS = ["the sea", "a train", "winter", "bread", "the moon", "a bicycle", "music", "rain"]


def reward_short(completions, **kwargs):
    """Return minus the number of words."""
    return [-float(len(completion[0]["content"].split())) for completion in completions]


def main(model: str) -> None:
    dataset = Dataset.from_list(
        [{"prompt": [{"role": "user", "content": f"Write about {t}."}]} for t in TOPICS]
    )
    training_args = GMPOConfig(
        output_dir="runs/drop_in",
        per_device_train_batch_size=4,
        num_generations=4,
        steps_per_generation=2,  # the clip window can act at the second step of a collection
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
    if len(sys.argv) != 2:
        sys.exit("Give one name or folder of a model: python examples/drop_in.py MODEL")
    main(sys.argv[1])
