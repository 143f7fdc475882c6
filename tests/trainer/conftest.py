"""A trainer around the tiny model."""

import pytest
from datasets import Dataset

from gmpo.config import GMPOConfig
from gmpo.trainer import GMPOTrainer
from tests.tiny import tiny_model, tiny_tokenizer

PROMPTS = Dataset.from_list(
    [{"prompt": " ".join("abcdefgh"[: 1 + i % 6]), "wanted": "a"} for i in range(16)]
)


def share_of_a(completions, **columns):
    return [text.split().count("a") / max(1, len(text.split())) for text in completions]


@pytest.fixture
def make_trainer(tmp_path):
    """Give `trainer_maker` a folder."""
    return trainer_maker(tmp_path)


def trainer_maker(tmp_path):
    """Return a function that builds a GMPOTrainer (or `cls`) with small sizes.

    Keywords of the trainer and of the config may be mixed.
    """

    def make(*, cls=GMPOTrainer, config_class=None, **keywords):
        config_class = config_class or cls.config_class or GMPOConfig
        names = set(config_class.__dataclass_fields__)
        options = {
            "output_dir": str(tmp_path / "out"),
            "per_device_train_batch_size": 8,
            "num_generations": 4,
            "steps_per_generation": 2,
            "max_completion_length": 6,
            "max_steps": 4,
            "logging_steps": 1,
            "learning_rate": 1e-3,
            "save_strategy": "no",
            "gradient_checkpointing": False,
            "disable_tqdm": True,
            "use_cpu": True,
            **{name: keywords.pop(name) for name in list(keywords) if name in names},
        }
        arguments = {
            "model": tiny_model(),
            "reward_funcs": share_of_a,
            "train_dataset": PROMPTS,
            "processing_class": tiny_tokenizer(),
            **keywords,
        }
        return cls(args=config_class(**options), **arguments)

    return make


@pytest.fixture
def weights():
    """A copy of a model's parameters, by name."""
    return lambda model: {name: p.detach().clone() for name, p in model.named_parameters()}
