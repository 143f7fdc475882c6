"""Trainings on iterable datasets with more than one pass."""

import pytest
from datasets import Dataset, IterableDataset

from gmpo.config import GMPOConfig
from gmpo.data.sampler import CollectionSize, StreamedRows
from gmpo.trainer import GMPOTrainer
from tests.tiny import tiny_model, tiny_tokenizer

EIGHT = [{"prompt": " ".join("abcdefgh"[i:])} for i in range(8)]


def stream_of(rows):
    return IterableDataset.from_generator(lambda: iter(rows))


def trainer(folder, dataset, **options):
    """One collection of 2 prompts for every micro-batch; the prompts that were sampled for are kept."""
    seen = []

    def reward(prompts, completions, **columns):
        seen.append(list(dict.fromkeys(prompts)))
        return [float(text.count("a")) for text in completions]

    config = GMPOConfig(
        str(folder),
        **{
            "per_device_train_batch_size": 8,
            "num_generations": 4,
            "max_completion_length": 4,
            "logging_steps": 1,
            "save_strategy": "no",
            "gradient_checkpointing": False,
            "disable_tqdm": True,
            "use_cpu": True,
            **options,
        },
    )
    run = GMPOTrainer(tiny_model(), reward, config, dataset, processing_class=tiny_tokenizer())
    return run, seen


@pytest.mark.parametrize("stop", [2, 6, 9, 13])
def test_a_resume_goes_on_with_the_prompts_that_come_next(tmp_path, stop):
    """A pass over 8 prompts is 4 steps, so that all but the first stop lie in a later pass."""
    whole, expected = trainer(tmp_path / "whole", stream_of(EIGHT), max_steps=16)
    whole.train()

    saving = {"save_strategy": "steps", "save_steps": stop}
    first, before = trainer(tmp_path / "cut", stream_of(EIGHT), max_steps=stop, **saving)
    first.train()
    second, after = trainer(tmp_path / "cut", stream_of(EIGHT), max_steps=16)
    second.train(resume_from_checkpoint=str(tmp_path / "cut" / f"checkpoint-{stop}"))
    assert before + after == expected


def test_a_pass_does_not_cut_a_window_of_accumulation_short(tmp_path):
    """Three collections in a pass, two in an optimizer step; nothing learned, so the gradients agree.

    The list's epochs end within a window, so the runs are compared where both have the same rows:
    a list of the same prompts twice has no pass that ends there.
    """
    options = {
        "max_steps": 3,
        "gradient_accumulation_steps": 2,
        "steps_per_generation": 1,
        "learning_rate": 0.0,
        "shuffle_dataset": False,
    }
    norms = []
    for dataset in (Dataset.from_list(EIGHT[:6] * 2), stream_of(EIGHT[:6])):
        run, _ = trainer(tmp_path, dataset, **options)
        run.train()
        norms.append([entry["grad_norm"] for entry in run.state.log_history if "loss" in entry])
    assert norms[1] == pytest.approx(norms[0], rel=1e-5)


def test_a_stream_too_small_for_one_collection_is_refused(tmp_path):
    run, _ = trainer(tmp_path, stream_of(EIGHT[:1]), max_steps=5)
    with pytest.raises(ValueError, match=r"1 prompt\(s\), but one collection needs 2"):
        run.train()


def test_a_stream_without_max_steps_is_refused_at_once(tmp_path):
    with pytest.raises(ValueError, match="max_steps=-1 with an iterable train_dataset"):
        trainer(tmp_path, stream_of(EIGHT))


def test_each_pass_of_a_stream_is_shuffled_afresh():
    class Reshuffled:
        def set_epoch(self, epoch):
            self.epoch = epoch

        def __iter__(self):
            return iter([{"prompt": f"{self.epoch}{letter}"} for letter in "abc"])

    collection = CollectionSize(group_size=1, rows=1, micro_steps=1)
    rows = StreamedRows(Reshuffled(), collection, ranks=1)
    read = [row["prompt"] for _, (_, _, row) in zip(range(5), rows, strict=False)]
    assert read == ["0a", "0b", "0c", "1a", "1b"]
