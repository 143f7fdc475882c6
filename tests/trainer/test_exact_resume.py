"""A run that is killed and resumed equals the uninterrupted one to the bit."""

import random

import numpy
import pytest
import torch
from datasets import Dataset, IterableDataset
from peft import LoraConfig

from tests.tiny import tiny_model
from tests.trainer.conftest import PROMPTS, share_of_a
from tests.trainer.runs import KillAt, Killed, differences, outcome

LONG = Dataset.from_list([{"prompt": " ".join("abcdefgh"[: 1 + i % 7])} for i in range(32)])
RUN = {
    "train_dataset": LONG,
    "steps_per_generation": 4,
    "max_steps": 8,
    "save_strategy": "steps",
    "save_steps": 1,
    "learning_rate": 1e-2,
    "log_completions": True,
    "num_completions_to_print": 1,
    "report_to": "none",
}
MOVING = {
    "beta": 0.3,
    "sync_ref_model": True,
    "ref_model_sync_steps": 2,
    "ref_model_mixup_alpha": 0.5,
}
LORA = {"r": 4, "target_modules": "all-linear"}


def noisy(completions, **columns):
    draws = [random.random() + numpy.random.rand() + float(torch.rand(())) for _ in completions]
    return [a + b for a, b in zip(share_of_a(completions), draws, strict=True)]


def rare(completions, **columns):
    return [float("a" in text) for text in completions]


CASES = {
    "several steps per collection": {},
    "num_iterations": {"num_iterations": 2, "steps_per_generation": 2},
    "later epochs": {"train_dataset": PROMPTS, "steps_per_generation": 2, "num_generations": 2},
    "gradient accumulation": {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 4},
    "first pass of a stream": {
        "train_dataset": IterableDataset.from_generator(lambda: iter(list(LONG)))
    },
    "later passes of a stream": {
        "train_dataset": IterableDataset.from_generator(lambda: iter(list(LONG)[:8])),
        "steps_per_generation": 2,
    },
    "LoRA": {"peft_config": LoraConfig(**LORA, init_lora_weights=False)},
    "moving reference": MOVING,
    "moving reference of an adapter": {**MOVING, "peft_config": LoraConfig(**LORA)},
    "resample": {
        "zero_signal_groups": "resample",
        "reward_funcs": rare,
        "steps_per_generation": 2,
        "num_generations": 2,
    },
    "adaptive entropy": {
        "use_adaptive_entropy": True,
        "entropy_coef": 0.1,
        "entropy_coef_delta": 0.05,
        "entropy_target": 10.0,
    },
    "random rewards": {"reward_funcs": noisy},
    "log lines of 5 steps": {"logging_steps": 5},
    "evaluation in between": {
        "eval_dataset": PROMPTS,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "per_device_eval_batch_size": 8,
        "eval_on_start": True,
    },
    "saved token sets": {"top_k": 5, "logps_support": "sampled"},
    "sequence-level correction": {"vllm_importance_sampling_correction": True, "beta": 0.1},
    "cosine schedule": {"lr_scheduler_type": "cosine", "warmup_steps": 3},
}


def model_with_dropout():
    model = tiny_model(attention_dropout=0.2)
    return model.train()


def killed_and_resumed(make_trainer, options, kills):
    """Train in one folder, killed at each of `kills` in turn; return the trainer that ended."""
    for number, (event, step) in enumerate(kills):
        run = make_trainer(**options, callbacks=[KillAt(event, step)])
        with pytest.raises(Killed):
            run.train(resume_from_checkpoint=number > 0)
    last = make_trainer(**options)
    last.train(resume_from_checkpoint=True)
    return last


KILLS = [
    ("on_save", 2),  # within the first collection
    ("on_optimizer_step", 5),  # the weights have moved, and the step is not counted yet
]


@pytest.mark.parametrize("case", CASES)
def test_killed_runs_equal_the_uninterrupted_one(make_trainer, tmp_path, case):
    options = {**RUN, **CASES[case]}
    whole = make_trainer(**options, output_dir=str(tmp_path / "whole"))
    whole.train()
    resumed = killed_and_resumed(
        make_trainer, {**options, "output_dir": str(tmp_path / "killed")}, KILLS
    )
    assert differences(outcome(whole), outcome(resumed)) == []


def test_killed_runs_with_dropout_equal_the_uninterrupted_one(make_trainer, tmp_path):
    whole = make_trainer(**RUN, model=model_with_dropout(), output_dir=str(tmp_path / "whole"))
    whole.train()
    folder = str(tmp_path / "killed")
    for number, (event, step) in enumerate(KILLS):
        kill = KillAt(event, step)
        run = make_trainer(**RUN, model=model_with_dropout(), output_dir=folder, callbacks=[kill])
        with pytest.raises(Killed):
            run.train(resume_from_checkpoint=number > 0)
    resumed = make_trainer(**RUN, model=model_with_dropout(), output_dir=folder)
    resumed.train(resume_from_checkpoint=True)
    assert differences(outcome(whole), outcome(resumed)) == []


def test_a_kill_between_a_step_and_its_log_line_loses_nothing(make_trainer, tmp_path):
    whole = make_trainer(**RUN, output_dir=str(tmp_path / "whole"))
    whole.train()
    options = {**RUN, "output_dir": str(tmp_path / "killed")}
    kills = [("on_step_begin", 4), ("on_step_end", 6), ("on_log", 7)]
    resumed = killed_and_resumed(make_trainer, options, kills)
    assert differences(outcome(whole), outcome(resumed)) == []


def test_skipped_steps_and_smaller_chunks_outlive_a_resume(make_trainer):
    learner = make_trainer().stages.learner
    learner.memory.max_tokens, learner.nonfinite_steps.num_skipped = 96, 3
    other = make_trainer().stages.learner
    other.load_state_dict(learner.state_dict())
    assert (other.memory.max_tokens, other.nonfinite_steps.num_skipped) == (96, 3)
