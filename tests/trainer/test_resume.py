"""A resumed run ends where the uninterrupted one did."""

from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file

SAVING = {
    "save_strategy": "steps",
    "save_steps": 4,
    "max_steps": 8,
    "steps_per_generation": 2,
    "learning_rate": 1e-2,
}
CASES = {
    "plain": {},
    "moving reference": {
        "beta": 0.3,
        "sync_ref_model": True,
        "ref_model_sync_steps": 1,
        "ref_model_mixup_alpha": 0.5,
    },
    "moving reference of an adapter": {
        "beta": 0.3,
        "sync_ref_model": True,
        "ref_model_sync_steps": 1,
        "ref_model_mixup_alpha": 0.5,
        "peft_config": LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False),
    },
    "adaptive entropy": {
        "use_adaptive_entropy": True,
        "entropy_coef": 0.1,
        "entropy_coef_delta": 0.05,
        "entropy_target": 10.0,
    },
}


@pytest.mark.parametrize("case", CASES)
def test_a_resumed_run_ends_where_the_uninterrupted_one_did(make_trainer, weights, case):
    torch.manual_seed(0)
    run = make_trainer(**SAVING, **CASES[case])
    run.train()
    again = make_trainer(**SAVING, **CASES[case])
    again.train(resume_from_checkpoint=f"{run.args.output_dir}/checkpoint-4")
    expected = weights(run.model)
    assert all(torch.equal(value, expected[name]) for name, value in weights(again.model).items())


def test_a_checkpoint_holds_no_pickle_of_ours(make_trainer):
    run = make_trainer(
        **SAVING | {"save_steps": 6, "steps_per_generation": 4}, **CASES["moving reference"]
    )
    run.train()
    folder = f"{run.args.output_dir}/checkpoint-6"
    assert {file.name for file in Path(folder).glob("gmpo*")} == {
        "gmpo_manifest.json",
        "gmpo_state.json",
        "gmpo_state.safetensors",
        "gmpo_rank_0.json",
        "gmpo_rank_0.safetensors",
    }
    names = {f"reference.{name}" for name, _ in run.model.named_parameters()}
    assert load_file(f"{folder}/gmpo_state.safetensors").keys() == names
