"""Two ranks make the update that one rank makes, whether their weights are copies or sharded."""

import warnings

import pytest
import torch
from peft import LoraConfig

from tests.distributed.runs import KINDS, assert_same_training, marked, result_of, trainer, with_two_ranks

CASES = {
    "plain": {},
    "reference": {"beta": 0.1},
    "moving reference": {"beta": 0.1, "sync_ref_model": True, "ref_model_sync_steps": 1, "ref_model_mixup_alpha": 0.5},
    "resampling": {"zero_signal_groups": "resample", "gradient_accumulation_steps": 1},
    "chunks": {"max_tokens_per_chunk": 12},
    "entropy selection": {"top_entropy_quantile": 0.5, "gradient_accumulation_steps": 1},
    "a group over both ranks": {"num_generations": 16},
    "token aggregate": {"loss_type": "dapo"},
    "adapter": {"peft_config": LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)},
    "evaluation": {"eval_strategy": "steps", "eval_steps": 1, "num_generations_eval": 2},
}
SHARDED_CASES = {
    "generate": {"generation_engine": "generate"},
    "sharded generation": {"ds3_gather_for_generation": False},
    "sharded generation, adapter": {**CASES["adapter"], "ds3_gather_for_generation": False},
    "checkpointing": {"gradient_checkpointing": True},
}
EXACT = {"dtype": torch.float64}
ROUNDED = {"dtype": torch.float32}  # ZeRO-3 adds gradients up in float32, whatever they are
PRECISION = {"copies": EXACT, "fsdp2": EXACT, "zero3": ROUNDED}


def all_cases(folder, options):
    results = {}
    precision = ROUNDED if "deepspeed" in options else EXACT
    for name, case in {**CASES, **SHARDED_CASES}.items():
        run = trainer(folder, 4, **precision, **options, **case)
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
@pytest.mark.parametrize("case", {**CASES, **SHARDED_CASES})
def test_two_ranks_make_the_update_of_one(tmp_path, two_ranks, kind, case):
    alone = trainer(str(tmp_path), 8, **PRECISION[kind], **{**CASES, **SHARDED_CASES}[case])
    start = result_of(alone)["weights"]
    alone.train()
    limits = {"rtol": 1e-7, "atol": 1e-8} if PRECISION[kind] is EXACT else {"rtol": 1e-4, "atol": 1e-5}
    for theirs in two_ranks(kind):
        assert_same_training(theirs[case], result_of(alone), start=start, **limits)


def test_shards_that_are_asked_for_in_vain_are_told(two_ranks):
    """accelerate makes copies on CPUs."""
    for rank in two_ranks("copies"):
        assert any("fsdp=True does nothing here" in message and "2 on cpu" in message for message in rank["told"])
