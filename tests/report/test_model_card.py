from types import SimpleNamespace

import pytest
import yaml

from gmpo.report.model_card import model_card


def head_of(card):
    return yaml.safe_load(card.split("---\n")[1])


def test_a_gmpo_card_names_gmpo_and_its_paper_and_never_grpo():
    card = model_card(
        algorithm="GMPO", model_name="me/solver", base_model="HuggingFaceTB/SmolLM2-135M-Instruct"
    )
    assert "Geometric-Mean Policy Optimization" in card
    assert "https://arxiv.org/abs/2507.20673" in card
    assert "journal = {arXiv preprint arXiv:2507.20673}" in card
    assert "GRPO" not in card
    assert "grpo" not in card


def test_a_card_of_the_family_cites_grpo_and_the_variant():
    card = model_card(
        algorithm="GRPO", model_name="me/solver", args=SimpleNamespace(loss_type="dr_grpo")
    )
    assert "https://arxiv.org/abs/2402.03300" in card
    assert "with the loss of Dr. GRPO ([arXiv:2503.20783]" in card
    assert "2507.20673" not in card
    assert head_of(card)["tags"] == ["gmpo", "grpo"]


def test_the_head_is_what_the_hub_reads():
    card = model_card(
        algorithm="gmpo",
        model_name="me/solver",
        base_model="HuggingFaceTB/SmolLM2-135M-Instruct",
        dataset_name=["openai/gsm8k", "reasoning_gym:chain_sum"],
        tags=["gmpo", "maths"],
        license="apache-2.0",
    )
    assert head_of(card) == {
        "library_name": "transformers",
        "model_name": "me/solver",
        "base_model": "HuggingFaceTB/SmolLM2-135M-Instruct",
        "datasets": ["openai/gsm8k"],
        "license": "apache-2.0",
        "tags": ["gmpo", "maths"],
    }
    assert (
        "on [openai/gsm8k](https://huggingface.co/datasets/openai/gsm8k) "
        "and `reasoning_gym:chain_sum`" in card
    )


def test_local_folders_stay_private(tmp_path):
    base = tmp_path / "models" / "tiny"
    base.mkdir(parents=True)
    card = model_card(
        algorithm="gmpo",
        model_name="run",
        base_model=str(base),
        dataset_name=str(tmp_path / "rows.jsonl"),
    )
    assert str(tmp_path) not in card
    assert "`tiny`" in card
    assert "`rows.jsonl`" in card
    assert {"base_model", "datasets"}.isdisjoint(head_of(card))


def test_a_folder_here_is_no_repository_on_the_hub(tmp_path, monkeypatch):
    (tmp_path / "runs" / "first").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert "base_model" not in head_of(
        model_card(algorithm="gmpo", model_name="run", base_model="runs/first")
    )
    assert (
        head_of(model_card(algorithm="gmpo", model_name="run", base_model="org/first"))[
            "base_model"
        ]
        == "org/first"
    )


def test_options_are_shown_but_never_a_token():
    args = SimpleNamespace(
        epsilon=0.4,
        epsilon_high=None,
        loss_type="dapo",
        hub_token="hf_secret",
        max_steps=-1,
        num_train_epochs=3.0,
        lr_scheduler_type=SimpleNamespace(value="constant"),
        mean_power=0.0,
    )
    card = model_card(algorithm="gmpo", model_name="run", args=args)
    assert "| epsilon | 0.4 |" in card
    assert "| mean_power | 0.0 |" in card
    assert "| lr_scheduler_type | constant |" in card
    assert "| num_train_epochs | 3.0 |" in card
    assert not any(word in card for word in ("hf_secret", "epsilon_high", "max_steps", "loss_type"))


def test_the_last_figure_of_each_kind_is_shown_with_its_step():
    history = [
        {"step": 10, "reward": 0.25, "entropy": 1.5, "loss": 0.1},
        {"step": 20, "reward": 0.75, "rewards/exact/mean": 0.5, "completions/mean_length": 31.5},
        {"step": 20, "eval_reward": 0.625, "eval_runtime": 3.0},
        {"step": 20, "train_runtime": 99.0},
    ]
    card = model_card(algorithm="gmpo", model_name="run", log_history=history)
    table = [line for line in card.splitlines() if line.startswith("|") and "(step" in line]
    assert table == [
        "| completions/mean_length | 31.5 (step 20) |",
        "| entropy | 1.5 (step 10) |",
        "| eval_reward | 0.625 (step 20) |",
        "| reward | 0.75 (step 20) |",
        "| rewards/exact/mean | 0.5 (step 20) |",
    ]


@pytest.mark.parametrize(
    ("adapter", "library", "loader"),
    [(False, "transformers", "AutoModelForCausalLM"), (True, "peft", "AutoPeftModelForCausalLM")],
)
def test_the_code_that_loads_fits_what_was_saved(adapter, library, loader):
    card = model_card(algorithm="gmpo", model_name="me/solver", adapter=adapter)
    assert head_of(card)["library_name"] == library
    assert f"from {library} import {loader}" in card
    assert f'{loader}.from_pretrained("me/solver")' in card
