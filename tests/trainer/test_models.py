"""What may be trained, how, and what is left on disk."""

import os

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

from gmpo.trainer import GMPOTrainer
from tests.tiny import tiny_model, tiny_tokenizer
from tests.trainer.conftest import PROMPTS

LORA = {
    "r": 4,
    "target_modules": ["q_proj", "v_proj"],
    "task_type": "CAUSAL_LM",
    "lora_dropout": 0.0,
}


def rewards_of(trainer):
    return [entry["reward"] for entry in trainer.state.log_history if "reward" in entry]


def test_adapters_learn_and_leave_the_base_bitwise_as_it_was(make_trainer):
    before = tiny_model().state_dict()
    options = {"max_steps": 40, "steps_per_generation": 4, "learning_rate": 3e-2}
    trainer = make_trainer(peft_config=LoraConfig(**LORA), **options)
    trainer.train()
    assert sum(rewards_of(trainer)[-2:]) > 1.5 * sum(rewards_of(trainer)[:2])
    after = trainer.model.get_base_model().state_dict()
    for name, value in before.items():
        found = after.get(name, after.get(name.replace(".weight", ".base_layer.weight")))
        assert torch.equal(found, value), name


def test_under_adapters_the_reference_is_the_base_and_the_kl_starts_at_zero(make_trainer):
    trainer = make_trainer(peft_config=LoraConfig(**LORA), beta=0.1, learning_rate=3e-2)
    trainer.train()
    kl = [entry["kl"] for entry in trainer.state.log_history if "kl" in entry]
    assert kl[0] == pytest.approx(0.0, abs=1e-6)
    assert kl[-1] > 1e-5


def test_the_folder_of_a_trained_adapter_is_trained_on(make_trainer, tmp_path):
    tiny_model().save_pretrained(tmp_path / "base")
    options = {"learning_rate": 3e-2, "beta": 0.1, "processing_class": None}
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    first = make_trainer(model=str(tmp_path / "base"), peft_config=LoraConfig(**LORA), **options)
    first.train()
    first.save_model(str(tmp_path / "adapter"))

    second = make_trainer(model=str(tmp_path / "adapter"), **options)
    for name, parameter in second.model.named_parameters():
        assert torch.equal(parameter, first.model.get_parameter(name)), name
    second.train()
    kl = [entry["kl"] for entry in second.state.log_history if "kl" in entry]
    assert kl[0] == pytest.approx(0.0, abs=1e-6)  # from the adapter as given, not from its base
    assert kl[-1] > 1e-6


def test_a_peft_model_without_trainable_weights_is_refused(make_trainer):
    model = get_peft_model(tiny_model(), LoraConfig(**LORA)).requires_grad_(False)
    with pytest.raises(ValueError, match="is_trainable"):
        make_trainer(model=model)


def test_gradient_checkpointing_changes_no_weight(make_trainer, weights):
    results = []
    for on in (False, True):
        trainer = make_trainer(model=tiny_model(dtype=torch.float64), gradient_checkpointing=on)
        trainer.train()
        results.append(weights(trainer.model))
    for name, value in results[0].items():
        torch.testing.assert_close(results[1][name], value, rtol=1e-9, atol=1e-12)


def test_bfloat16_trains_close_to_float32(make_trainer):
    losses = {}
    for bf16 in (False, True):
        trainer = make_trainer(bf16=bf16, max_steps=1, beta=0.1)
        trainer.train()
        losses[bf16] = trainer.state.log_history[0]
    assert losses[True]["entropy"] == pytest.approx(losses[False]["entropy"], rel=0.05)
    assert losses[True]["grad_norm"] > 0


def test_what_is_saved_loads_in_transformers_and_gives_the_same_logits(make_trainer, tmp_path):
    trainer = make_trainer(max_steps=2)
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    ids = torch.tensor([[5, 6, 7]])
    torch.testing.assert_close(loaded(ids).logits, trainer.model.eval()(ids).logits)
    assert AutoTokenizer.from_pretrained(tmp_path / "saved").decode([5, 6]) == "a b"


def test_a_model_is_trained_from_its_path_in_float32_unless_told(make_trainer, tmp_path):
    tiny_model(dtype=torch.bfloat16).save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    trainer = make_trainer(model=str(tmp_path / "model"), processing_class=None)
    assert trainer.model.dtype == torch.float32
    half = make_trainer(model=str(tmp_path / "model"), model_init_kwargs={"dtype": "bfloat16"})
    assert half.model.dtype == torch.bfloat16


def test_the_model_card_names_method_paper_and_data(make_trainer):
    trainer = make_trainer(max_steps=1)
    trainer.train()
    trainer.create_model_card(model_name="counter", dataset_name="me/letters", tags=["tiny"])
    with open(os.path.join(trainer.args.output_dir, "README.md"), encoding="utf-8") as file:
        text = file.read()
    for part in (
        "GMPO",
        "Geometric-Mean Policy Optimization",
        "2507.20673",
        "me/letters",
        "counter",
        "tiny",
    ):
        assert part in text, part
    assert "DeepSeekMath" not in text


@pytest.mark.parametrize(
    "schedule", ["linear", "cosine", "constant", "constant_with_warmup", "polynomial"]
)
def test_every_schedule_moves_the_learning_rate_its_way(make_trainer, schedule):
    trainer = make_trainer(lr_scheduler_type=schedule, warmup_steps=2, learning_rate=1e-3)
    trainer.train()
    rates = [entry["learning_rate"] for entry in trainer.state.log_history if "loss" in entry]
    if schedule == "constant":
        assert rates == [1e-3] * 4
    else:
        assert rates[0] < rates[1]
        assert (rates[-1] == 1e-3) == (schedule == "constant_with_warmup")


def test_the_users_optimizer_and_callbacks_are_used(make_trainer):
    model = tiny_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    steps = []

    class Count(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            steps.append(state.global_step)

    trainer = make_trainer(model=model, optimizers=(optimizer, None), callbacks=[Count()])
    trainer.train()
    assert trainer.optimizer.optimizer is optimizer
    assert steps == [1, 2, 3, 4]


def test_a_synced_reference_moves_to_the_policy_and_without_sync_it_stays(make_trainer, weights):
    moved = {}
    for sync in (False, True):
        options = {"ref_model_sync_steps": 2, "ref_model_mixup_alpha": 1.0} if sync else {}
        trainer = make_trainer(beta=0.1, sync_ref_model=sync, **options)
        trainer.train()
        moved[sync] = (weights(trainer.reference.model), weights(trainer.model))
    start = weights(tiny_model())
    for name, value in start.items():
        assert torch.equal(moved[False][0][name], value)
        torch.testing.assert_close(moved[True][0][name], moved[True][1][name])


def test_temperature_scales_what_is_scored(make_trainer):
    entropies = []
    for temperature in (0.5, 1.0):
        trainer = make_trainer(temperature=temperature, max_steps=1)
        trainer.train()
        entropies.append(trainer.state.log_history[0]["entropy"])
    assert entropies[0] < entropies[1]


def test_disabling_dropout_makes_scoring_repeatable(make_trainer):
    trainer = make_trainer(model=tiny_model(attention_dropout=0.5), disable_dropout=True)
    assert (
        trainer.model.config.attention_dropout == 0.0
        or trainer.model.model.layers[0].self_attn.attention_dropout == 0.0
    )


def test_the_public_example_runs_with_the_import_line_changed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny_model().save_pretrained("model")
    tiny_tokenizer().save_pretrained("model")

    def reward_num_unique_letters(completions, **kwargs):
        return [float(len(set(content))) for content in completions]

    from gmpo.config import GMPOConfig

    trainer = GMPOTrainer(
        model="model",
        reward_funcs=reward_num_unique_letters,
        args=GMPOConfig(
            output_dir="out", max_steps=1, steps_per_generation=2, max_completion_length=16
        ),
        train_dataset=PROMPTS,
    )
    trainer.train()
    assert trainer.state.global_step == 1
