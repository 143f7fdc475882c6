"""What only sharded weights can get wrong: FSDP2 and ZeRO-3 on two ranks."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from gmpo import distributed
from gmpo.sharding import full_model
from tests.distributed.runs import assert_same_training, marked, result_of, trainer, with_two_ranks
from tests.tiny import tiny_model

ADAM = {"optim": "adamw_torch", "adam_epsilon": 1e-2, "max_grad_norm": 0.5, "learning_rate": 1e-2}
OPTIONS = {
    "dtype": torch.float32,
    "beta": 0.1,
    "sync_ref_model": True,
    "ref_model_sync_steps": 1,
    **ADAM,
}
SAVING = {"save_strategy": "steps", "save_steps": 2}


def everything(folder, options):
    tiny_model().save_pretrained(f"{folder}/model")
    make = {"rows": 4, **OPTIONS, **options}
    run = trainer(f"{folder}/whole", **make, **SAVING)
    run.train()
    run.save_model(f"{folder}/saved")
    again = trainer(f"{folder}/whole", **make, **SAVING)
    again.train(resume_from_checkpoint=f"{folder}/whole/checkpoint-2")
    by_path = trainer(f"{folder}/by-path", model=f"{folder}/model", **make)
    by_path.train()
    return {
        "whole": result_of(run),
        "resumed": result_of(again),
        "by path": result_of(by_path),
        "logits": forward_passes_alone(run),
        "after them": result_of(run)["weights"],
    }


def forward_passes_alone(run):
    """Logits of some tokens, in a block in which each rank makes another number of forward passes."""
    policy = run.unwrapped_policy()
    with torch.no_grad(), full_model(policy):
        for _ in range(1 + 3 * distributed.rank()):
            logits = policy(input_ids=torch.arange(8)[None]).logits
    return logits


@pytest.fixture(scope="module", params=marked(["fsdp2", "zero3"]))
def ranks(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    return folder, with_two_ranks(request.param, everything, folder)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    run = trainer(str(tmp_path_factory.mktemp("alone")), 8, **OPTIONS)
    start = result_of(run)["weights"]
    run.train()
    return start, result_of(run)


@pytest.mark.parametrize("case", ["whole", "by path"])
def test_sharded_training_is_that_of_one_rank(ranks, alone, case):
    start, expected = alone
    for rank in ranks[1]:
        assert_same_training(rank[case], expected, start=start, rtol=1e-4, atol=1e-5)


def test_a_resumed_run_ends_where_the_whole_one_did(ranks):
    for rank in ranks[1]:
        for name, value in rank["whole"]["weights"].items():
            torch.testing.assert_close(
                rank["resumed"]["weights"][name], value, rtol=1e-5, atol=1e-6
            )


def test_what_is_published_is_what_is_saved(ranks):
    folder, results = ranks
    saved = dict(AutoModelForCausalLM.from_pretrained(folder / "saved").named_parameters())
    for rank in results:
        assert rank["whole"]["weights"].keys() == saved.keys()
        assert all(
            torch.equal(value, saved[name]) for name, value in rank["whole"]["weights"].items()
        )


def test_a_whole_model_runs_without_the_other_rank(ranks):
    folder, results = ranks
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(folder / "saved")(
            input_ids=torch.arange(8)[None]
        ).logits
    for rank in results:
        torch.testing.assert_close(rank["logits"], expected, rtol=1e-5, atol=1e-5)
        assert all(
            torch.equal(value, rank["whole"]["weights"][name])
            for name, value in rank["after them"].items()
        )
