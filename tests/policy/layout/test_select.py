"""The cheapest layout is chosen, and none is believed before it gives the log-probs of the rectangle."""

import types

import pytest
import torch

from gmpo.policy.layout.select import TOLERANCE, check_rows, cost_of, tolerance
from gmpo.policy.logprobs import LogProbs
from gmpo.policy.settings import PolicySettings
from gmpo.types import Batch
from tests.policy.cases import make_batch, make_model, naive_scores


def rows_of(*shapes):
    """A batch with one group per (prompt tokens, completion tokens of each row)."""
    prompts, lengths, group = [], [], []
    for number, (prompt, completions) in enumerate(shapes):
        ids = torch.arange(prompt) + 1
        prompts += [ids] * len(completions)
        lengths += completions
        group += [number] * len(completions)
    lengths = torch.tensor(lengths)
    mask = torch.arange(int(lengths.max())) < lengths[:, None]
    return Batch(
        prompt_ids=prompts,
        completion_ids=mask * 3,
        lengths=lengths,
        mask=mask,
        num_completion_tokens=lengths,
        advantages=torch.zeros(len(lengths)),
        group=torch.tensor(group),
    )


class Spying(LogProbs):
    """Remembers the kind of each layout that a caller's batch got, and the number of forward passes."""

    def __init__(self, settings):
        super().__init__(settings)
        self.kinds, self.forwards = [], 0

    def _prepare(self, model, batch):
        run = super()._prepare(model, batch)
        self.kinds.append(run.layout.kind)
        return run

    def counting(self, model):
        def count(*_):
            self.forwards += 1

        model.register_forward_hook(count)
        return model


CHOICES = {
    "shared_prefix": rows_of((20, [5, 6, 7, 8])),  # 20 + 22 instead of 4 * 27 tokens
    "packed": rows_of(
        (3, [30]), (3, [2]), (3, [2]), (3, [2])
    ),  # 32 + 3 * 4 in one row instead of 4 * 32
    "padded": rows_of((3, [5]), (3, [5])),  # nothing to gain
}


@pytest.mark.parametrize("kind", CHOICES)
def test_auto_takes_the_layout_with_the_fewest_tokens(kind):
    logprobs = Spying(PolicySettings())
    logprobs.compute(make_model("llama", hidden_size=512), CHOICES[kind])
    assert logprobs.kinds == [kind]


def test_a_rectangle_of_rows_is_cheaper_than_one_long_row_when_attention_weighs():
    # 2 groups of 100 tokens: one row of 200 costs 200 * (1 + 200 / 64), two of 100 cost 200 * (1 + 100 / 64)
    cost = cost_of(32)
    assert cost(1, 200) == pytest.approx(200 * (1 + 200 / 64))
    assert cost(2, 100) < cost(1, 200)


def break_masks(model):
    """Make the model forget every mask that it has not made itself."""
    plain = model.model.forward

    def forward(self, *args, attention_mask=None, **kwargs):
        ours = attention_mask is not None and attention_mask.dim() != 2
        return plain(*args, attention_mask=None if ours else attention_mask, **kwargs)

    model.model.forward = types.MethodType(forward, model.model)
    return model


def test_a_model_that_ignores_our_masks_falls_back_with_a_warning():
    batch, model = make_batch(), make_model("mistral-window")
    expected, _ = naive_scores(model, batch)
    logprobs = Spying(PolicySettings())
    with pytest.warns(UserWarning, match=r"leaves out 'shared_prefix' .* differ by .* nats"):
        scores = logprobs.compute(break_masks(model), batch)
    torch.testing.assert_close(scores.logps, expected, rtol=1e-6, atol=1e-6)
    assert logprobs.kinds == ["padded"] or logprobs.kinds == [
        "packed"
    ]  # packing is found from positions, without a mask


def test_a_model_that_fails_on_our_masks_falls_back_with_a_warning():
    model = make_model("llama")
    plain = model.model.forward

    def forward(self, *args, attention_mask=None, **kwargs):
        assert attention_mask is None or attention_mask.dim() == 2, "no masks but my own"
        return plain(*args, attention_mask=attention_mask, **kwargs)

    model.model.forward = types.MethodType(forward, model.model)
    with pytest.warns(
        UserWarning, match="the model fails with AssertionError: no masks but my own"
    ):
        LogProbs(PolicySettings()).compute(model, make_batch())


def test_a_layout_that_is_asked_for_and_wrong_is_an_error():
    logprobs = LogProbs(PolicySettings(batch_layout="shared_prefix"))
    with pytest.raises(
        ValueError,
        match=r"batch_layout='shared_prefix' does not work for LlamaForCausalLM .* 'padded'",
    ):
        logprobs.compute(break_masks(make_model("llama")), make_batch())


def test_an_attention_without_masks_is_an_error_or_the_rectangle():
    model, logprobs = make_model("llama"), LogProbs(PolicySettings(batch_layout="packed"))
    logprobs.compute(model, make_batch())  # which flash attention, not installed here, could not
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(
        ValueError, match="takes no mask of ours; use one of sdpa, eager, flex_attention"
    ):
        logprobs.compute(model, make_batch())


@pytest.mark.parametrize("name", ["gemma3-window", "mistral-window", "llama"])
def test_additive_masks_of_eager_attention_work_too(name):
    batch, model = make_batch(), make_model(name, attn_implementation="eager")
    assert model.config._attn_implementation == "eager"
    expected, _ = naive_scores(model, batch)
    scores = LogProbs(PolicySettings(batch_layout="shared_prefix")).compute(model, batch)
    torch.testing.assert_close(scores.logps, expected, rtol=1e-6, atol=1e-6)


def test_each_kind_of_model_is_checked_once():
    logprobs, batch = Spying(PolicySettings()), make_batch()
    model = logprobs.counting(make_model("llama"))
    logprobs.compute(model, batch)
    assert (
        logprobs.forwards == 1 + 3 + 1
    )  # what follows the head; padded, packed, shared prefix; the batch
    logprobs.compute(model, batch)
    assert logprobs.forwards == 6


def test_a_resumed_scorer_believes_what_the_first_one_found():
    batch = make_batch()
    first = LogProbs(PolicySettings())
    with pytest.warns(UserWarning):
        first.compute(break_masks(make_model("llama")), batch)
    second = Spying(PolicySettings())
    second.load_state_dict(first.state_dict())
    second.compute(second.counting(make_model("llama")), batch)
    assert second.forwards == 2
    assert second.state_dict() == first.state_dict()
    assert "shared_prefix" not in second.kinds


def test_the_rows_of_the_check_hold_a_group_whatever_the_batch_holds():
    whole = make_batch()
    for batch in (
        whole,
        whole.rows(torch.tensor([2])),
        whole.rows(torch.tensor([], dtype=torch.int64)),
    ):
        rows = check_rows(batch)
        assert len(rows) == 4
        assert rows.prompt_ids[0] is rows.prompt_ids[1] and rows.prompt_ids[2] is rows.prompt_ids[3]
        assert rows.prompt_ids[0] is not rows.prompt_ids[2]
        assert (rows.lengths > 0).all() and rows.mask.sum() == rows.lengths.sum()


def test_tolerances_grow_with_the_rounding_of_the_dtype():
    ordered = [
        tolerance(dtype) for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16)
    ]
    assert ordered == sorted(TOLERANCE.values())
