"""What people get wrong first is told before weights are loaded, in words that help."""

from pathlib import Path

import pytest
from datasets import Dataset, DatasetDict

from gmpo.config import GMPOConfig
from gmpo.trainer import GMPOTrainer
from tests.tiny import tiny_model, tiny_tokenizer


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("per_device_train_batch_size", 0),
        ("gradient_accumulation_steps", 0),
        ("learning_rate", -1.0),
        ("learning_rate", float("nan")),
        ("weight_decay", -0.1),
        ("max_grad_norm", -1.0),
        ("seed", -1),
        ("temperature", float("inf")),
    ],
)
def test_inherited_numbers_have_a_range_too(tmp_path, option, value):
    with pytest.raises(ValueError, match=f"^{option}={value!r} is out of range: it must be "):
        GMPOConfig(str(tmp_path), **{option: value})


def test_options_that_are_gone_say_what_to_do_instead():
    with pytest.raises(
        ValueError, match=r"no option 'max_prompt_length'. .*: overlong_prompts says"
    ):
        GMPOConfig("out", max_prompt_length=512)


def test_a_reward_that_needs_a_missing_column_is_refused_at_once(make_trainer):
    def graded(completions, answer):
        return [0.0] * len(completions)

    with pytest.raises(
        ValueError, match=r"'graded' needs 'answer', which the dataset does not have.*wanted"
    ):
        make_trainer(reward_funcs=graded)


def test_a_column_that_is_dropped_is_a_missing_one(make_trainer):
    def graded(completions, wanted):
        return [0.0] * len(completions)

    make_trainer(reward_funcs=graded)
    with pytest.raises(ValueError, match="needs 'wanted'"):
        make_trainer(reward_funcs=graded, remove_unused_columns=True)


def test_a_dict_of_splits_is_no_training_set(make_trainer):
    splits = DatasetDict(train=Dataset.from_list([{"prompt": "a"}]))
    with pytest.raises(
        ValueError, match=r"train_dataset is a dict of datasets \('train'\). Pass one .*\['train'\]"
    ):
        make_trainer(train_dataset=splits)


def test_an_empty_training_set_is_called_empty(make_trainer):
    with pytest.raises(ValueError, match="train_dataset is empty"):
        make_trainer(train_dataset=Dataset.from_list([]))


def test_a_model_is_a_name_a_path_or_a_model(make_trainer, tmp_path):
    with pytest.raises(
        TypeError, match=r"model=None \(NoneType\) is neither a name or path nor a model"
    ):
        make_trainer(model=None)
    tiny_model().save_pretrained(tmp_path / "tiny")
    tiny_tokenizer().save_pretrained(tmp_path / "tiny")
    assert make_trainer(model=Path(tmp_path / "tiny")).model.config.hidden_size == 32


def test_a_dict_is_no_config():
    with pytest.raises(TypeError, match=r"GMPOTrainer needs a GMPOConfig, got a dict\.$"):
        GMPOTrainer(tiny_model(), lambda completions: completions, {"learning_rate": 1.0})


def test_a_chat_template_that_refuses_a_prompt_is_named_with_it(make_trainer):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    rows = [{"prompt": [{"role": "user", "content": "a b"}]}] * 8
    with pytest.raises(
        ValueError, match=r"template refuses the prompt of row 0.*'a b'.*roles must alternate"
    ):
        make_trainer(processing_class=tokenizer, train_dataset=Dataset.from_list(rows))
