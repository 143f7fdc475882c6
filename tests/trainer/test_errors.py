"""Bad input gets an error that says what was got and what to do."""

import inspect
import os

import pytest
from datasets import Dataset, IterableDataset

from gmpo.config import GMPOConfig, GRPOConfig
from gmpo.trainer import GMPOTrainer
from tests.tiny import tiny_model, tiny_tokenizer
from tests.trainer.conftest import PROMPTS, share_of_a


def rows(*prompts):
    return {"train_dataset": Dataset.from_list([{"prompt": prompt} for prompt in prompts])}


USER = [{"role": "user", "content": "a"}]
STREAM = IterableDataset.from_generator(lambda: iter(PROMPTS))

REFUSED = [
    ({"train_dataset": Dataset.from_list([{"text": "a"}] * 8)}, ValueError, "prompt.*text"),
    (rows("a", "", "b", "c"), ValueError, "empty"),
    (rows("a", "b"), ValueError, r"2 prompt\(s\).*needs 4"),
    (
        {**rows(*[USER] * 8), "processing_class": tiny_tokenizer(chat_template=False)},
        ValueError,
        "chat template",
    ),
    ({"reward_funcs": None}, ValueError, "no reward"),
    ({"reward_funcs": []}, ValueError, "no reward"),
    ({"reward_funcs": 3}, ValueError, "3|int"),
    ({"reward_weights": [1.0, 2.0]}, ValueError, "must match"),
    ({"model": "./nowhere/at-all"}, ValueError, "nowhere"),
    ({"model_init_kwargs": {"dtype": "float32"}}, ValueError, "model_init_kwargs"),
    ({"tools": [print]}, ValueError, "'tools' is not available yet"),
    ({"train_dataset": None}, ValueError, "train_dataset"),
    (
        {"train_dataset": STREAM, "dataloader_num_workers": 2},
        ValueError,
        "dataloader_num_workers=2 with an iterable",
    ),
    ({"eval_dataset": Dataset.from_list([{"text": "a"}])}, ValueError, "eval_dataset.*prompt"),
]


@pytest.mark.parametrize(
    ("changes", "error", "message"), REFUSED, ids=lambda value: str(value)[:50]
)
def test_bad_input_is_refused_with_what_was_got(make_trainer, changes, error, message):
    with pytest.raises(error, match=message):
        make_trainer(**changes).train()


def test_a_path_that_does_not_exist_is_refused_before_anything_is_loaded(make_trainer, monkeypatch):
    monkeypatch.setattr(
        "transformers.AutoModelForCausalLM.from_pretrained", lambda *a, **k: pytest.fail("loaded")
    )
    with pytest.raises(ValueError, match="nowhere"):
        make_trainer(model="./nowhere/at-all", processing_class=None)


def test_a_plain_grpo_config_is_refused_since_its_window_is_no_log_ratio(tmp_path):
    with pytest.raises(TypeError, match="GMPOConfig"):
        GMPOTrainer(
            tiny_model(),
            share_of_a,
            GRPOConfig(str(tmp_path)),
            PROMPTS,
            processing_class=tiny_tokenizer(),
        )


def test_a_config_whose_window_cannot_act_warns(make_trainer):
    with pytest.warns(UserWarning, match="steps_per_generation to several times"):
        make_trainer(steps_per_generation=1)


def test_text_and_message_rows_do_not_mix(make_trainer):
    mixed = IterableDataset.from_generator(lambda: iter([{"prompt": "a"}, {"prompt": USER}] * 8))
    with pytest.raises(ValueError, match="row 1"):
        make_trainer(train_dataset=mixed, shuffle_dataset=False).train()


def test_prompts_longer_than_the_context_are_refused_with_the_counts(make_trainer):
    with pytest.raises(ValueError, match=r"130.*128"):
        make_trainer(**rows(*[" ".join("a" * 130)] * 8)).train()


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda completions: [1.0], "judge.*1.*16"),
        (lambda completions: ["good"] * len(completions), "judge.*'good'"),
        (lambda completions: [float("inf")] * len(completions), "judge.*inf"),
    ],
)
def test_what_a_reward_may_not_answer_names_the_function(make_trainer, answer, message):
    def judge(completions, **columns):
        return answer(completions)

    with pytest.raises(ValueError, match=message):
        make_trainer(reward_funcs=judge).train()


def test_a_reward_that_raises_stops_the_run_with_its_own_error_and_leaves_a_checkpoint_that_goes_on(
    make_trainer,
):
    calls = []

    def judge(completions, **columns):
        calls.append(1)
        if len(calls) == 2:
            raise KeyError("the judge fell asleep")
        return share_of_a(completions)

    trainer = make_trainer(reward_funcs=judge, max_steps=4, num_generations=4)
    with pytest.raises(KeyError, match="fell asleep") as caught:
        trainer.train()
    notes = " ".join(caught.value.__notes__)
    assert "judge" in notes
    assert "What was learned in 2 steps" in notes
    folder = os.path.join(trainer.args.output_dir, "checkpoint-2")
    assert os.path.exists(os.path.join(folder, "trainer_state.json"))
    again = make_trainer(reward_funcs=judge, max_steps=4, num_generations=4)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 4


def test_resuming_skips_a_checkpoint_that_was_not_written_to_its_end(make_trainer):
    trainer = make_trainer(save_strategy="steps", save_steps=1, max_steps=3)
    trainer.train()
    os.remove(os.path.join(trainer.args.output_dir, "checkpoint-3", "trainer_state.json"))
    again = make_trainer(max_steps=3)
    again.train(resume_from_checkpoint=True)
    assert again.state.log_history[-1]["step"] == 3
    assert [entry["step"] for entry in again.state.log_history if "loss" in entry] == [1, 2, 3]


def test_resuming_where_there_is_nothing_says_so(make_trainer):
    with pytest.raises(ValueError, match="no whole checkpoint"):
        make_trainer().train(resume_from_checkpoint=True)


def test_without_args_the_folder_is_named_after_model_and_method(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    trainer = GMPOTrainer(
        tiny_model(max_position_embeddings=512),
        share_of_a,
        train_dataset=PROMPTS,
        processing_class=tiny_tokenizer(),
    )
    assert isinstance(trainer.args, GMPOConfig)
    assert trainer.args.output_dir == str(tmp_path / "model-GMPO")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "tokenizer",
            r"GMPOTrainer has no argument 'tokenizer'. It is called processing_class here.",
        ),
        ("beta", r"It is an option: args=GMPOConfig\(beta=...\)"),
        ("reward_fns", r"Did you mean 'reward_funcs'\?"),
    ],
)
def test_an_argument_that_does_not_exist_is_refused_with_what_to_use(name, message):
    with pytest.raises(TypeError, match=message):
        GMPOTrainer("somewhere", **{name: 1})


def test_the_signature_still_shows_the_arguments():
    assert list(inspect.signature(GMPOTrainer).parameters)[:4] == [
        "model",
        "reward_funcs",
        "args",
        "train_dataset",
    ]
