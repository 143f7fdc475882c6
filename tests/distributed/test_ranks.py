"""Two ranks make the update that one rank makes, whether their weights are copies or sharded."""

import math
import warnings

import pytest
import torch
from peft import LoraConfig

from tests.distributed.runs import (
    KINDS,
    assert_same_training,
    marked,
    result_of,
    trainer,
    with_two_ranks,
)

CASES = {
    "plain": {},
    "reference": {"beta": 0.1},
    "moving reference": {
        "beta": 0.1,
        "sync_ref_model": True,
        "ref_model_sync_steps": 1,
        "ref_model_mixup_alpha": 0.5,
    },
    "resampling": {"zero_signal_groups": "resample", "gradient_accumulation_steps": 1},
    "resampling while the other rank rests": {  # groups of 2, one of four or so is silent
        "zero_signal_groups": "resample",
        "gradient_accumulation_steps": 1,
        "num_generations": 2,
    },
    "chunks": {"max_tokens_per_chunk": 12},
    "entropy selection": {"top_entropy_quantile": 0.5, "gradient_accumulation_steps": 1},
    "a group over both ranks": {"num_generations": 16},
    "token aggregate": {"loss_type": "dapo"},
    "adapter": {
        "peft_config": LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    },
    "evaluation whose last batch leaves a rank empty": {
        "eval_strategy": "steps",
        "eval_steps": 1,
        "num_generations_eval": 2,
        "include_for_metrics": ["inputs"],
    },
}
ADAPTER, MOVING = CASES["adapter"], CASES["moving reference"]
IN_THE_HEAD = {
    "peft_config": LoraConfig(r=4, target_modules=["q_proj", "lm_head"], init_lora_weights=False)
}
WHOLE_AFTERWARDS = {
    "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"],
    "reshard_after_forward": False,
}
RECOMPUTED = {
    "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"],
    "activation_checkpointing": True,
}
FSDP_CASES = {  # what FSDP2 alone has
    "whole afterwards": {"fsdp_config": WHOLE_AFTERWARDS, **ADAPTER, "beta": 0.1},
    "recomputed": {"fsdp_config": RECOMPUTED, **MOVING},
}
SHARDED_CASES = {
    "reference of an adapter": {**ADAPTER, "beta": 0.1},
    "reference of an adapter in the head": {**IN_THE_HEAD, "beta": 0.1},
    "moving reference of an adapter": {**ADAPTER, **MOVING},
    "generate": {"generation_engine": "generate"},
    "sharded generation": {"ds3_gather_for_generation": False},
    "sharded generation, adapter": {**CASES["adapter"], "ds3_gather_for_generation": False},
    "checkpointing": {"gradient_checkpointing": True},
}
ALL = {**CASES, **SHARDED_CASES, **FSDP_CASES}
MIXED = "mixed precision"
EXACT = {"dtype": torch.float64}
ROUNDED = {"dtype": torch.float32}  # ZeRO-3 adds gradients up in float32, whatever they are
PRECISION = {"copies": EXACT, "fsdp2": EXACT, "zero3": ROUNDED}


def all_cases(folder, options):
    results = {}
    precision = ROUNDED if "deepspeed" in options else EXACT
    for name, case in {**ALL, MIXED: {**ROUNDED, "bf16": True}}.items():
        if name in FSDP_CASES and "fsdp" not in options:
            continue
        run = trainer(folder, 4, **{**precision, **options, **case})
        run.train()
        results[name] = result_of(run)
    if "fsdp" not in options and "deepspeed" not in options:
        with warnings.catch_warnings(record=True) as told:
            trainer(folder, 4, **options, **KINDS["fsdp2"])
        results["told"] = [str(warning.message) for warning in told]
    return results


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    """Results of all cases by kind of ranks; each kind is run once."""
    results = {}

    def get(kind):
        if kind not in results:
            results[kind] = None  # if it fails, it does so for one test
            results[kind] = with_two_ranks(kind, all_cases, tmp_path_factory.mktemp("ranks"))
        return results[kind]

    return get


@pytest.mark.parametrize("kind", marked(KINDS))
@pytest.mark.parametrize("case", ALL)
def test_two_ranks_make_the_update_of_one(tmp_path, two_ranks, kind, case):
    if case in FSDP_CASES and kind != "fsdp2":
        pytest.skip("an option of FSDP2")
    options = {name: value for name, value in ALL[case].items() if name != "fsdp_config"}
    alone = trainer(str(tmp_path), 8, **PRECISION[kind], **options)
    start = result_of(alone)["weights"]
    alone.train()
    limits = (
        {"rtol": 1e-6, "atol": 1e-7} if PRECISION[kind] is EXACT else {"rtol": 1e-4, "atol": 1e-5}
    )
    for theirs in two_ranks(kind):
        assert_same_training(theirs[case], result_of(alone), start=start, **limits)


@pytest.mark.parametrize("kind", marked(KINDS))
def test_in_mixed_precision_they_learn_too(tmp_path, two_ranks, kind):
    """Also where all rows of a rank are silent."""
    start = result_of(trainer(str(tmp_path), 8, **ROUNDED))["weights"]
    for rank in two_ranks(kind):
        weights, logs = rank[MIXED]["weights"], rank[MIXED]["logs"]
        assert all(torch.isfinite(value).all() for value in weights.values())
        moved = [
            name
            for name, value in weights.items()
            if not torch.equal(value, start[name].to(value.dtype))
        ]
        assert (
            len(moved) > len(weights) / 2
        )  # ZeRO-3 keeps bfloat16 beside float32, where small steps don't show
        assert all(entry["loss"] != 0 and math.isfinite(entry["grad_norm"]) for entry in logs)
        assert all(entry["sampling/sampling_logp_difference/mean"] < 0.05 for entry in logs)


def test_shards_that_are_asked_for_in_vain_are_told(two_ranks):
    """accelerate makes copies on CPUs."""
    for rank in two_ranks("copies"):
        assert any(
            "fsdp=True does nothing here" in message and "2 on cpu" in message
            for message in rank["told"]
        )
