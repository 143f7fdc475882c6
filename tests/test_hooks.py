"""Methods of a subclass: those that act, and those that are refused because nothing would call them."""

from pathlib import Path

import pytest
import torch
from datasets import Dataset
from transformers import Trainer

import gmpo
from gmpo.config import GMPOConfig
from gmpo.hooks import HOOKS, NEVER_CALLED
from gmpo.trainer import GMPOTrainer, GRPOTrainer
from tests.tiny import tiny_model, tiny_tokenizer

ROWS = Dataset.from_list([{"prompt": " ".join("abcdefgh"[: 1 + i % 6])} for i in range(8)])


def letters(completions, **columns):
    return [float(text.count("a") - text.count("b")) for text in completions]


def build(cls, folder, *, reward=letters, rows=ROWS, **options):
    config = GMPOConfig(
        str(folder),
        **{
            "per_device_train_batch_size": 8,
            "num_generations": 4,
            "num_generations_eval": 2,
            "per_device_eval_batch_size": 4,
            "steps_per_generation": 2,
            "max_completion_length": 5,
            "max_steps": 2,
            "logging_steps": 1,
            "learning_rate": 1e-2,
            "save_strategy": "no",
            "gradient_checkpointing": False,
            "disable_tqdm": True,
            "use_cpu": True,
            **options,
        },
    )
    return cls(
        tiny_model(),
        reward,
        config,
        rows,
        eval_dataset=rows if isinstance(rows, list) else rows.select(range(3)),
        processing_class=tiny_tokenizer(),
    )


def weights(trainer):
    return {name: value.detach().clone() for name, value in trainer.model.named_parameters()}


def logs_of(trainer):
    return [entry for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("name", NEVER_CALLED)
def test_a_method_that_nothing_calls_is_refused_with_what_to_use(name):
    with pytest.raises(TypeError, match=rf"Mine\.{name} would never be called") as caught:
        type("Mine", (GMPOTrainer,), {name: lambda self: None})
    assert NEVER_CALLED[name] in str(caught.value)


def test_the_hooks_are_documented():
    page = Path(gmpo.__file__).parents[1].joinpath("docs", "extending.md").read_text("utf-8")
    for name, meaning in HOOKS.items():
        assert f"| `{name}` | {meaning} |" in page


def test_a_method_of_a_mixin_is_refused_too():
    class Mixin:
        def _compute_loss(self, model, inputs):
            return 0.0

    with pytest.raises(TypeError, match="_compute_loss would never be called"):
        type("Mine", (Mixin, GRPOTrainer), {})


def test_refused_methods_are_those_that_no_run_calls(tmp_path, monkeypatch):
    def called(*arguments, **keywords):
        raise AssertionError("it is called")

    for name in NEVER_CALLED:
        if hasattr(Trainer, name):
            monkeypatch.setattr(Trainer, name, called)
    trainer = build(GMPOTrainer, tmp_path, eval_strategy="steps", eval_steps=1)
    trainer.train()
    trainer.predict(ROWS)


@pytest.mark.parametrize("name", HOOKS)
def test_an_overridden_hook_acts(tmp_path, name):
    calls = []

    def spy(self, *arguments, **keywords):
        calls.append(name)
        return getattr(GMPOTrainer, name)(self, *arguments, **keywords)

    trainer = build(type("Mine", (GMPOTrainer,), {name: spy}), tmp_path)
    trainer.train()
    trainer.evaluate()
    trainer.predict(ROWS)
    trainer.save_model(str(tmp_path / "saved"))
    trainer.create_model_card()
    assert calls


class Same(GMPOTrainer):
    def compute_loss(self, model, inputs, **keywords):
        return super().compute_loss(model, inputs, **keywords)


class Doubled(GMPOTrainer):
    def compute_loss(self, model, inputs, **keywords):
        return 2 * super().compute_loss(model, inputs, **keywords)


def test_an_override_that_changes_nothing_makes_the_same_updates(tmp_path):
    """Adaptive entropy too, whose controller counts what the loss has seen."""
    options = {
        "entropy_coef": 0.1,
        "use_adaptive_entropy": True,
        "entropy_target": 5.0,
        "eval_strategy": "steps",
        "eval_steps": 1,
    }
    plain, same = (build(cls, tmp_path, **options) for cls in (GMPOTrainer, Same))
    plain.train()
    same.train()
    for name, value in weights(plain).items():
        torch.testing.assert_close(weights(same)[name], value, rtol=1e-5, atol=1e-7)
    for ours, theirs in zip(logs_of(plain), logs_of(same), strict=True):
        for name in ("loss", "grad_norm", "entropy", "rho/positive/mean"):
            assert theirs[name] == pytest.approx(ours[name], rel=1e-4), name
    evaluations = [
        [entry for entry in run.state.log_history if "eval_loss" in entry] for run in (plain, same)
    ]
    for ours, theirs in zip(*evaluations, strict=True):
        for name in ("eval_loss", "eval_entropy", "eval_reward"):
            assert theirs[name] == pytest.approx(ours[name], rel=1e-4, abs=1e-7), name
    assert len(evaluations[0]) == 2


def test_an_overridden_loss_is_what_is_trained_on(tmp_path):
    """Twice the loss is twice the gradient, and SGD moves twice as far."""
    options = {
        "optim": "sgd",
        "max_grad_norm": 0.0,
        "max_steps": 1,
        "lr_scheduler_type": "constant",
        "entropy_coef": 0.1,  # without it, the first loss is 0 but for rounding
    }
    start = weights(build(GMPOTrainer, tmp_path))
    moves = []
    for cls in (GMPOTrainer, Doubled):
        trainer = build(cls, tmp_path, **options)
        trainer.train()
        moves.append({name: value - start[name] for name, value in weights(trainer).items()})
        moves[-1]["loss"] = torch.tensor(logs_of(trainer)[0]["loss"])
    for name, move in moves[0].items():
        torch.testing.assert_close(moves[1][name], 2 * move, rtol=1e-3, atol=1e-6)
    assert moves[0]["loss"] != 0


def test_a_loss_that_is_set_on_the_trainer_is_trained_on_too(tmp_path):
    trainer = build(GMPOTrainer, tmp_path, max_steps=1)
    calls = []

    def counted(model, inputs, **keywords):
        calls.append(inputs)
        return GMPOTrainer.compute_loss(trainer, model, inputs, **keywords)

    trainer.compute_loss = counted
    trainer.train()
    assert calls


@pytest.mark.parametrize("loss", [None, (torch.zeros(()), {}), torch.zeros(2)])
def test_an_overridden_loss_that_is_no_scalar_is_told(tmp_path, loss):
    trainer = build(type("Mine", (GMPOTrainer,), {"compute_loss": lambda *_: loss}), tmp_path)
    with pytest.raises(TypeError, match=r"compute_loss returned .*Return the loss, a scalar"):
        trainer.train()


def test_predict_gives_completions_rewards_and_figures(tmp_path):
    trainer = build(GMPOTrainer, tmp_path)
    output = trainer.predict(ROWS.select(range(3)))
    assert output.predictions.shape[0] == output.label_ids.shape[0] == 3 * 2
    texts = [
        trainer.processing_class.decode(ids[ids >= 2], skip_special_tokens=True)
        for ids in output.predictions
    ]
    assert output.label_ids[:, 0].tolist() == letters(texts)
    assert output.metrics["test_reward"] == pytest.approx(output.label_ids.mean())
    assert {"test_loss", "test_entropy"} <= output.metrics.keys()


def test_columns_that_are_dropped_are_dropped_in_evaluation_too(tmp_path):
    seen = []

    def spying(completions, **columns):
        seen.append(set(columns))
        return [0.0] * len(completions)

    rows = ROWS.map(lambda row: {"answer": "a", "chat_template_kwargs": {"polite": True}})
    for dataset in (rows, rows.to_list()):
        trainer = build(
            GMPOTrainer,
            tmp_path,
            reward=spying,
            rows=dataset,
            remove_unused_columns=True,
            max_steps=1,
        )
        trainer.train()
        trainer.evaluate()
    assert len(seen) >= 4
    for columns in seen:
        assert "answer" not in columns and "chat_template_kwargs" in columns
