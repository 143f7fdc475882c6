"""Prompts that are too long are found before training, named as the dataset numbers them."""

import logging

import pytest
from datasets import Dataset, load_from_disk

from gmpo.config import GMPOConfig
from gmpo.rollout.prompts.encoder import PromptEncoder
from gmpo.rollout.prompts.lengths import fitting
from gmpo.rollout.settings import RolloutSettings
from gmpo.trainer import GMPOTrainer
from tests.tiny import tiny_model, tiny_tokenizer

TEXTS = ["a b", "a " * 40, "c", "b " * 30]  # the tokenizer makes a token of each word


def encoder(overlong: str, tokenizer=None) -> PromptEncoder:
    """An encoder whose prompts may have 24 tokens."""
    settings = RolloutSettings(max_completion_length=4, overlong_prompts=overlong)
    return PromptEncoder(
        tokenizer or tiny_tokenizer(), settings, eos=(1,), pad=0, context_length=28
    )


def dataset() -> Dataset:
    return Dataset.from_dict({"prompt": TEXTS})


def test_prompts_that_are_too_long_are_counted_and_the_first_is_named():
    message = "data: 2 of 4 prompts are too long. The first is the prompt of row 1 with 40 tokens"
    with pytest.raises(ValueError, match=message):
        fitting(dataset(), encoder("error"), name="data")


def test_prompts_that_are_too_long_are_dropped_and_told(caplog):
    with caplog.at_level(logging.WARNING):
        kept = fitting(dataset(), encoder("drop"))
    assert kept["prompt"][:] == ["a b", "c"]
    assert "2 of 4 prompts are too long" in caplog.text
    as_list = fitting([{"prompt": text} for text in TEXTS], encoder("drop"))
    assert [as_list[number]["prompt"] for number in range(len(as_list))] == ["a b", "c"]


def test_a_stream_drops_prompts_as_they_come():
    stream = fitting(dataset().to_iterable_dataset(), encoder("drop"))
    assert [row["prompt"] for row in stream] == ["a b", "c"]


def test_a_dataset_of_overlong_prompts_only_is_refused():
    with pytest.raises(ValueError, match="1 of 1 prompts are too long"):
        fitting(Dataset.from_dict({"prompt": ["a " * 40]}), encoder("drop"))


def test_prompts_that_will_be_cut_need_no_look():
    given = dataset()
    assert fitting(given, encoder("truncate_left")) is given


def test_a_template_that_refuses_a_prompt_says_so_before_training():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('no system') if messages[0].role == 'system' }}"
    rows = [{"prompt": [{"role": role, "content": "a"}]} for role in ("user", "system")]
    with pytest.raises(ValueError, match=r"train_dataset: .*template refuses the prompt of row 1"):
        fitting(Dataset.from_list(rows), encoder("error", tokenizer))


class Counting(PromptEncoder):
    """An encoder that keeps which rows it measured."""

    def overlong_tokens(self, row, number):
        self.__dict__.setdefault("measured", []).append(number)
        return super().overlong_tokens(row, number)


def test_a_dataset_on_disk_is_measured_once(tmp_path):
    dataset().save_to_disk(tmp_path / "data")
    measured = []
    for _ in range(2):
        one = encoder("drop")
        one.__class__ = Counting
        stored = load_from_disk(str(tmp_path / "data"))
        assert fitting(stored, one)["prompt"][:] == ["a b", "c"]
        measured.append(one.__dict__.get("measured", []))
    assert measured == [[0, 1, 2, 3], []]


def test_training_begins_only_with_prompts_that_fit(tmp_path):
    args = GMPOConfig(
        str(tmp_path), per_device_train_batch_size=2, num_generations=2, max_completion_length=100,
        use_cpu=True, report_to="none",
    )  # fmt: skip
    with pytest.raises(
        ValueError, match=r"train_dataset: 1 of 2 .*row 1 with 40 tokens.*leaves 28"
    ):
        GMPOTrainer(
            tiny_model(), lambda completions, **kwargs: [0.0] * len(completions), args=args,
            train_dataset=Dataset.from_dict({"prompt": TEXTS[:2]}),
            processing_class=tiny_tokenizer(),
        )  # fmt: skip


def test_the_row_of_a_collection_is_named_by_its_dataset_index(tmp_path):
    """Errors that come while training name the row of the dataset, not of the collection."""
    rows = Dataset.from_dict({"prompt": ["a", "b", "c", "d"]})

    def broken(batch):
        return {"prompt": ["" if text == "d" else text for text in batch["prompt"]]}

    args = GMPOConfig(
        str(tmp_path), per_device_train_batch_size=4, num_generations=2, max_completion_length=2,
        shuffle_dataset=False, use_cpu=True, report_to="none",
    )  # fmt: skip
    trainer = GMPOTrainer(
        tiny_model(), lambda completions, **kwargs: [0.0] * len(completions), args=args,
        train_dataset=rows.with_transform(broken), processing_class=tiny_tokenizer(),
    )  # fmt: skip
    with pytest.raises(ValueError, match="prompt of row 3 is empty"):
        trainer.train()


def test_a_set_given_to_evaluate_or_predict_loses_overlong_prompts_too(tmp_path):
    args = GMPOConfig(
        str(tmp_path), per_device_eval_batch_size=2, num_generations=2, max_completion_length=100,
        overlong_prompts="drop", use_cpu=True, report_to="none",
    )  # fmt: skip
    trainer = GMPOTrainer(
        tiny_model(), lambda completions, **kwargs: [0.0] * len(completions), args=args,
        processing_class=tiny_tokenizer(),
    )  # fmt: skip
    assert trainer.evaluate(dataset())["eval_reward"] == 0.0
    assert len(trainer.predict(dataset()).predictions) == 4  # two for each of two prompts
