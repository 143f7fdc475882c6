"""Combinations that an objective can't use are refused with the option, what was got and what to do."""

from dataclasses import dataclass

import pytest

from gmpo.objective.check import check_objective, questionable_options
from gmpo.objective.family import FAMILY
from gmpo.objective.objective import objective_from
from gmpo.objective.settings import LOSS_TYPES, ObjectiveSettings
from gmpo.option import option

SEQUENCE = {"importance_sampling_level": "sequence"}

# algorithm, options, words that the message holds
REFUSED = [
    ("gmpo", {"loss_type": "grpo"}, ["loss_type='grpo'", "GRPOTrainer"]),
    ("gmpo", {"loss_type": "cispo"}, ["loss_type='cispo'", "GRPOTrainer"]),
    ("grpo", {"loss_type": "gmpo"}, ["loss_type='gmpo'", "GMPOTrainer"]),
    ("gmpo", {"sapo_temperature_neg": 2.0}, ["sapo_temperature_neg=2.0", "1.05", "sapo"]),
    ("grpo", {"sapo_temperature_pos": 2.0}, ["sapo_temperature_pos=2.0", "sapo"]),
    ("gmpo", {"vespo_k_pos": 1.0}, ["vespo_k_pos=1.0", "vespo"]),
    ("grpo", {"loss_type": "sapo", "vespo_lambda_neg": 1.0}, ["vespo_lambda_neg=1.0", "vespo"]),
    ("grpo", {"mean_power": 1.0}, ["mean_power=1.0", "gmpo"]),
    ("grpo", {"mean_power_final": 0.0}, ["mean_power_final=0.0", "gmpo"]),
    (
        "gmpo",
        {"mean_power": 1.0, **SEQUENCE},
        ["mean_power=1.0", "importance_sampling_level='sequence'"],
    ),
    (
        "gmpo",
        {"mean_power_final": 1.0, **SEQUENCE},
        ["mean_power_final=1.0", "importance_sampling_level='sequence'"],
    ),
    ("gmpo", {"mean_power": float("nan")}, ["mean_power=nan", "finite"]),
    ("gmpo", {"mean_power_final": float("inf")}, ["mean_power_final=inf", "finite"]),
    ("gmpo", {"off_policy_mask_threshold": float("nan")}, ["off_policy_mask_threshold=nan"]),
    ("gmpo", {"epsilon": 0.4, "delta": 0.3}, ["delta=0.3", "epsilon_high = 0.4"]),
    (
        "gmpo",
        {"epsilon": 0.1, "epsilon_high": 0.5, "delta": 0.4},
        ["delta=0.4", "epsilon_high = 0.5"],
    ),
    ("grpo", {"delta": 1.1}, ["delta=1.1", "1 + epsilon_high = 1.2"]),
    ("grpo", {"epsilon_high": 0.5, "delta": 1.4}, ["delta=1.4", "1.5"]),
    ("grpo", {"loss_type": "cispo", "epsilon_high": 5.0, "delta": 9.0}, ["delta=9.0", "gmpo"]),
    ("grpo", {"loss_type": "sapo", "delta": 9.0}, ["delta=9.0"]),
    ("grpo", {"loss_type": "vespo", "delta": 9.0}, ["delta=9.0"]),
    ("grpo", {"loss_type": "sapo", "epsilon": 0.3}, ["epsilon=0.3"]),
    ("grpo", {"loss_type": "vespo", "epsilon_high": 0.3}, ["epsilon_high=0.3"]),
    ("grpo", {"loss_type": "cispo"}, ["epsilon_high=None", "cispo", "epsilon_high=5.0"]),
    (
        "grpo",
        {"loss_type": "cispo", "epsilon_high": 0.28},
        ["epsilon_high=0.28", "epsilon_high=5.0"],
    ),
    ("grpo", {"loss_type": "cispo", "epsilon_high": 5.0, "epsilon": 0.1}, ["epsilon=0.1"]),
    ("grpo", {"loss_type": "vespo", **SEQUENCE}, ["importance_sampling_level='sequence'", "vespo"]),
    (
        "grpo",
        {"loss_type": "vespo", "vllm_importance_sampling_mode": "geometric_mask"},
        ["geometric_mask", "vespo", "token_*"],
    ),
    (
        "gmpo",
        {"vllm_importance_sampling_clip_min": 3.0},
        ["vllm_importance_sampling_clip_min=3.0", "vllm_importance_sampling_clip_max=3.0"],
    ),
    (
        "gmpo",
        {"vllm_importance_sampling_clip_min": 2.0, "vllm_importance_sampling_cap": 1.5},
        ["vllm_importance_sampling_clip_min=2.0", "1.5"],
    ),
    (
        "gmpo",
        {
            "vllm_importance_sampling_mode": "token_truncate",
            "vllm_importance_sampling_clip_max": None,
        },
        ["token_truncate", "vllm_importance_sampling_clip_max"],
    ),
    (
        "gmpo",
        {
            "vllm_importance_sampling_correction": False,
            "vllm_importance_sampling_mode": "token_mask",
        },
        ["vllm_importance_sampling_mode='token_mask'", "vllm_importance_sampling_correction"],
    ),
    ("gmpo", {"use_bias_correction_kl": True}, ["use_bias_correction_kl=True", "beta"]),
    ("gmpo", {"entropy_target": 0.5}, ["entropy_target=0.5", "use_adaptive_entropy"]),
    ("gmpo", {"entropy_coef_max": 0.5}, ["entropy_coef_max=0.5", "use_adaptive_entropy"]),
    ("gmpo", {"entropy_coef": float("inf")}, ["entropy_coef=inf"]),
    (
        "gmpo",
        {"use_adaptive_entropy": True, "entropy_coef_min": 0.5, "entropy_coef_max": 0.1},
        ["entropy_coef_min=0.5", "entropy_coef_max=0.1"],
    ),
]

ACCEPTED = [
    ("gmpo", {}),
    ("gmpo", {"loss_type": "gmpo"}),
    ("gmpo", {"loss_type": "dapo"}),
    ("gmpo", {"epsilon": 0.4, "epsilon_high": 0.6, "delta": 0.6}),
    ("gmpo", {"mean_power": -1.0, "mean_power_final": 1.0}),
    ("gmpo", SEQUENCE),
    *[("grpo", {"loss_type": name}) for name in FAMILY if name not in ("gmpo", "cispo")],
    ("grpo", {"delta": 1.2}),
    ("grpo", {"loss_type": "cispo", "epsilon_high": 5.0, **SEQUENCE}),
    ("grpo", {"loss_type": "sapo", "sapo_temperature_neg": 2.0, **SEQUENCE}),
    (
        "grpo",
        {
            "loss_type": "vespo",
            "vespo_k_pos": 1.0,
            "vllm_importance_sampling_mode": "token_truncate",
        },
    ),
    (
        "gmpo",
        {"vllm_importance_sampling_mode": "token_mask", "vllm_importance_sampling_clip_max": None},
    ),
    (
        "gmpo",
        {
            "vllm_importance_sampling_mode": "geometric_mask",
            "vllm_importance_sampling_clip_min": 0.9,
        },
    ),
    ("gmpo", {"vllm_importance_sampling_correction": False}),
    ("gmpo", {"use_bias_correction_kl": True, "beta": 0.1}),
    ("gmpo", {"entropy_coef": 0.1}),
    ("gmpo", {"use_adaptive_entropy": True, "entropy_target": 0.5, "entropy_coef_max": 0.1}),
]


@pytest.mark.parametrize(("algorithm", "options", "words"), REFUSED, ids=str)
def test_combination_is_refused_with_the_reason(algorithm, options, words):
    with pytest.raises(ValueError) as refusal:
        check_objective(ObjectiveSettings(**options), algorithm=algorithm)
    assert all(word in str(refusal.value) for word in words), str(refusal.value)


@pytest.mark.parametrize(("algorithm", "options"), ACCEPTED, ids=str)
def test_combination_is_accepted(algorithm, options):
    check_objective(ObjectiveSettings(**options), algorithm=algorithm)


def test_no_objective_is_made_from_what_is_refused():
    with pytest.raises(ValueError, match="cispo"):
        objective_from(ObjectiveSettings(loss_type="cispo"), algorithm="grpo")


def test_the_defaults_are_those_of_the_settings_own_class():
    @dataclass
    class LogSpace(ObjectiveSettings):
        epsilon: float = option(0.4, "GMPO's window.")

    check_objective(LogSpace(loss_type="sapo"), algorithm="grpo")
    with pytest.raises(ValueError, match=r"epsilon=0\.2"):
        check_objective(LogSpace(loss_type="sapo", epsilon=0.2), algorithm="grpo")


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_a_ratio_per_completion_weighed_by_tokens_is_questioned(loss_type):
    """GSPO weighs completions alike: of rows of 1 and 8 tokens, half the gradient is each one's."""
    level = {} if loss_type == "vespo" else {"importance_sampling_level": "sequence"}
    settings = ObjectiveSettings(loss_type=loss_type, **level)
    found = questionable_options(settings, algorithm="grpo")
    questioned = loss_type in ("bnpo", "dr_grpo", "dapo", "cispo")
    assert bool(found) == questioned
    if questioned:
        assert "GSPO" in found[0] and "loss_type='grpo'" in found[0]


def test_luspo_with_ratios_of_tokens_is_questioned():
    (found,) = questionable_options(ObjectiveSettings(loss_type="luspo"), algorithm="grpo")
    assert "importance_sampling_level='sequence'" in found


def test_gmpo_at_the_sequence_level_is_not_questioned():
    settings = ObjectiveSettings(importance_sampling_level="sequence")
    assert questionable_options(settings, algorithm="gmpo") == []
    assert questionable_options(ObjectiveSettings(), algorithm="grpo") == []
