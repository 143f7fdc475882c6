"""Ranks decide alike on a step that is not finite on one of them only."""

import os

import pytest
import torch

from gmpo.nonfinite import NonFiniteError
from tests.distributed.runs import result_of, trainer, with_two_ranks


def with_nan_on_rank_1(run, *, from_call):
    """Let rank 1's hidden states be NaN in one pass of training."""
    calls = []

    def hook(module, inputs, output):
        if not (module.training and torch.is_grad_enabled()):
            return output
        calls.append(1)
        return output * torch.nan if len(calls) == from_call else output

    if os.environ["RANK"] == "1":
        run.model.get_input_embeddings().register_forward_hook(hook)
    return run


def program(folder, options):
    results = {}
    shared = {"zero_signal_groups": "keep", "batch_layout": "padded", "logging_steps": 1}
    for mode in ("stop", "skip"):
        run = trainer(os.path.join(folder, mode), 4, nonfinite_steps=mode, **shared, **options)
        run = with_nan_on_rank_1(run, from_call=3)  # in the second of two steps per collection
        try:
            run.train()
            results[mode] = {"error": "", **result_of(run)}
        except NonFiniteError as error:
            results[mode] = {"error": str(error), **result_of(run)}
    return results


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return with_two_ranks("copies", program, tmp_path_factory.mktemp("ranks"))


def test_all_ranks_stop_with_the_same_rows(ranks):
    assert ranks[0]["stop"]["error"] == ranks[1]["stop"]["error"]
    assert "Optimizer step 2: log-probs are not finite for row" in ranks[0]["stop"]["error"]
    for result in ranks:
        assert all(value.isfinite().all() for value in result["stop"]["weights"].values())


def test_all_ranks_skip_the_same_step(ranks):
    for result in ranks:
        assert result["skip"]["error"] == ""
        for name, value in result["skip"]["weights"].items():
            assert value.isfinite().all()
            assert torch.equal(value, ranks[0]["skip"]["weights"][name])
    assert ranks[0]["skip"]["logs"][-1]["nonfinite_steps"] == 1
