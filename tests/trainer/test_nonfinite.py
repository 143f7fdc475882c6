"""A step whose numbers are not finite ends the run, or is dropped, before it touches a weight."""

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from gmpo.config import GMPOConfig
from gmpo.nonfinite import NonFiniteError, broken_rows
from tests.tiny import WORDS, tiny_model
from tests.trainer.conftest import share_of_a

OPTIONS = {"batch_layout": "padded", "zero_signal_groups": "keep", "max_steps": 4}


class Watch(TrainerCallback):
    """Keeps the weights as they are before each step, from 1 on, and the optimizer's state."""

    def __init__(self):
        self.weights, self.moments = {}, {}

    def on_step_begin(self, args, state, control, model, optimizer, **kwargs):
        self.weights[state.global_step + 1] = copies(model)
        self.moments[state.global_step + 1] = moments(optimizer)


def copies(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def moments(optimizer):
    return [state["exp_avg"].clone() for state in optimizer.state.values() if state]


def with_nan_for(model, word, *, from_call=0):
    """Let the embedding of a word be NaN in training mode: sampling does not see it."""
    token, calls = WORDS.index(word), []

    def hook(module, inputs, output):
        if not module.training or not torch.is_grad_enabled():
            return output
        calls.append(1)
        broken = (inputs[0] == token)[..., None] & (len(calls) > from_call)
        return torch.where(broken, torch.nan, output)

    model.get_input_embeddings().register_forward_hook(hook)
    return model


def with_nan_gradient(model, *, calls):
    """Let the gradient of one weight be infinite in these backward passes, counted from 1."""
    counted = []

    def hook(gradient):
        counted.append(1)
        return gradient * math.inf if len(counted) in calls else gradient

    model.lm_head.weight.register_hook(hook)
    return model


def same(left, right):
    return all(torch.equal(left[name], right[name]) for name in left)


def test_broken_rows_are_found_within_the_mask():
    mask = torch.tensor([[True, False], [True, True], [True, True]])
    logps = torch.tensor([[-1.0, math.nan], [-2.0, -math.inf], [-1.0, -1.0]])
    assert broken_rows(mask, logps, None).tolist() == [False, True, False]
    assert broken_rows(mask, torch.zeros(3, 2), -logps).tolist() == [False, True, False]


def test_a_log_prob_that_is_not_finite_stops_the_run_and_names_the_rows(make_trainer, tmp_path):
    """Prompts of row i hold the first 1 + i % 6 letters, so "f" stands in rows 5 and 11 only.

    The one token of a completion is nobody's input, so that no other row is broken.
    """
    watch, model = Watch(), with_nan_for(tiny_model(), "f", from_call=0)
    trainer = make_trainer(
        model=model, callbacks=[watch], max_completion_length=1, shuffle_dataset=False, **OPTIONS
    )
    with pytest.raises(NonFiniteError, match=r"Optimizer step \d+: log-probs .* finite") as caught:
        trainer.train()
    assert "row 5 of the dataset ('a b c d e f')" in str(caught.value)
    assert "row 4 of" not in str(caught.value)

    last = max(watch.weights)
    assert same(watch.weights[last], copies(model))
    assert all(map(torch.equal, watch.moments[last], moments(trainer.optimizer)))
    assert last > 1
    saved = load_file(Path(tmp_path, "out", f"checkpoint-{last - 1}", "model.safetensors"))
    assert all(value.isfinite().all() for value in saved.values())
    assert torch.equal(saved["lm_head.weight"], watch.weights[last]["lm_head.weight"])


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("max_grad_norm", [0.0, 1.0])
def test_a_gradient_that_is_not_finite_stops_the_run(make_trainer, accumulation, max_grad_norm):
    watch, model = Watch(), with_nan_gradient(tiny_model(), calls={2 * accumulation})
    trainer = make_trainer(
        model=model,
        callbacks=[watch],
        gradient_accumulation_steps=accumulation,
        max_grad_norm=max_grad_norm,
        **OPTIONS,
    )
    with pytest.raises(NonFiniteError, match="step 2: the gradient is not finite, though the loss"):
        trainer.train()
    assert same(watch.weights[2], copies(model))
    assert not same(watch.weights[1], watch.weights[2])


def test_such_a_step_may_be_skipped_and_is_counted(make_trainer):
    watch, model = Watch(), with_nan_gradient(tiny_model(), calls={2})
    trainer = make_trainer(model=model, callbacks=[watch], nonfinite_steps="skip", **OPTIONS)
    trainer.train()
    assert same(watch.weights[2], watch.weights[3])
    assert all(map(torch.equal, watch.moments[2], watch.moments[3]))
    assert not same(watch.weights[3], watch.weights[4])
    assert not same(watch.weights[4], copies(model))
    assert all(value.isfinite().all() for value in copies(model).values())

    logs = [entry for entry in trainer.state.log_history if "nonfinite_steps" in entry]
    assert [entry["nonfinite_steps"] for entry in logs] == [0, 1, 1, 1]


def test_the_figures_of_a_skipped_step_are_left_out(make_trainer):
    model = with_nan_for(tiny_model(), "f")
    trainer = make_trainer(model=model, nonfinite_steps="skip", shuffle_dataset=False, **OPTIONS)
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "nonfinite_steps" in entry]
    assert logs[-1]["nonfinite_steps"] > 0
    assert all(math.isfinite(value) for entry in logs for value in entry.values())
    assert all(value.isfinite().all() for value in copies(model).values())


def test_steps_can_not_be_skipped_where_deepspeed_makes_them(tmp_path):
    pytest.importorskip("deepspeed")
    with pytest.raises(ValueError, match="nonfinite_steps='skip' has no effect with deepspeed"):
        GMPOConfig(str(tmp_path), nonfinite_steps="skip", deepspeed={"zero_optimization": {}})


def test_finite_runs_are_as_before(make_trainer):
    results = []
    for mode in ("stop", "skip"):
        trainer = make_trainer(reward_funcs=share_of_a, nonfinite_steps=mode, **OPTIONS)
        trainer.train()
        results.append(copies(trainer.model))
    assert same(*results)
