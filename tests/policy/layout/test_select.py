"""A prompt is shared where the model attends by segments, which is believed once checked."""

import types

import pytest
import torch

from gmpo.attention.segments import Segments, Tree
from gmpo.policy.layout.attention import NAME, SegmentInputs
from gmpo.policy.layout.select import TOLERANCE, check_rows, tolerance
from gmpo.policy.logprobs import LogProbs
from gmpo.policy.settings import PolicySettings
from gmpo.types import Batch
from tests.policy.cases import (
    assert_same_gradients,
    float64_throughout,
    gradients,
    make_batch,
    make_model,
    naive_scores,
    weighted,
    weighted_rows,
)


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
    """Remembers the kind of each layout of a caller's batch, and counts forward passes."""

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


@pytest.mark.parametrize(
    ("wanted", "kind"),
    [("auto", "shared_prefix"), ("shared_prefix", "shared_prefix"), ("packed", "packed")],
)
def test_a_model_that_attends_by_segments_gets_the_layout(wanted, kind):
    logprobs = Spying(PolicySettings(batch_layout=wanted))
    logprobs.compute(make_model("llama"), make_batch())
    assert logprobs.kinds == [kind]


def test_tokens_of_rows_are_those_of_their_layout():
    batch = rows_of((20, [5, 6, 7]), (3, [9]))
    logprobs = LogProbs(PolicySettings(router_aux_loss_coef=0.0))
    # Before a model is seen: a rectangle, of which the last tokens of completions are no part.
    assert logprobs.tokens(batch) == 4 * (20 + 6)
    logprobs.compute(make_model("llama"), batch)
    assert logprobs.tokens(batch) == 20 + 4 + 5 + 6 + 3 + 8


def lose_segments(model):
    """Make the model's attention see the whole row before a token: everything in one tree."""
    for layer in model.model.layers:
        plain = layer.self_attn.forward

        def forward(self, *args, plain=plain, **kwargs):
            if NAME in kwargs:
                inputs = kwargs[NAME]
                whole = Segments((Tree(inputs.segments.tokens),), torch.device("cpu"))
                kwargs[NAME] = SegmentInputs(whole, inputs.softcaps)
            return plain(*args, **kwargs)

        layer.self_attn.forward = types.MethodType(forward, layer.self_attn)
    return model


def test_a_model_that_sees_too_much_falls_back_with_a_warning():
    batch, model = make_batch(), make_model("mistral-window")
    expected, _ = naive_scores(model, batch)
    logprobs = Spying(PolicySettings())
    with pytest.warns(UserWarning, match=r"leaves out 'shared_prefix' .* differ by .* nats"):
        scores = logprobs.compute(lose_segments(model), batch)
    torch.testing.assert_close(scores.logps, expected, rtol=1e-6, atol=1e-6)
    assert logprobs.kinds == ["padded"]


def test_a_model_that_fails_falls_back_with_a_warning():
    model = make_model("llama")
    plain = model.model.forward

    def forward(self, *args, **kwargs):
        assert NAME not in kwargs, "no keywords but my own"
        return plain(*args, **kwargs)

    model.model.forward = types.MethodType(forward, model.model)
    with pytest.warns(UserWarning, match="fails with AssertionError: no keywords but my own"):
        LogProbs(PolicySettings()).compute(model, make_batch())


def test_a_layout_that_is_asked_for_and_wrong_is_an_error():
    logprobs = LogProbs(PolicySettings(batch_layout="shared_prefix"))
    with pytest.raises(
        ValueError,
        match=r"batch_layout='shared_prefix' does not work for LlamaForCausalLM .* 'padded'",
    ):
        logprobs.compute(lose_segments(make_model("llama")), make_batch())


def test_attention_that_drops_weights_keeps_to_the_rectangle():
    model = make_model("llama", attention_dropout=0.5)
    with pytest.warns(UserWarning, match=r"drops weights at the rate 0.5 \(see disable_dropout\)"):
        LogProbs(PolicySettings()).compute(model, make_batch())


@pytest.mark.parametrize(
    "name", ["gemma2-window-softcap", "gemma3-window", "gpt-oss", "mistral-window", "llama"]
)
def test_models_with_eager_attention_attend_by_segments_too(name):
    """Soft caps and sinks among them, which transformers' sdpa leaves out."""
    batch, model = make_batch(), make_model(name, attn_implementation="eager")
    with float64_throughout():
        logps, entropy = naive_scores(model, batch)
        expected = gradients(weighted(logps, entropy, torch.arange(len(batch))), model)
        logprobs = LogProbs(PolicySettings(batch_layout="shared_prefix"))
        loss = logprobs.loss(model, batch, weighted_rows(batch))
        found = gradients(loss, model)
    torch.testing.assert_close(loss.item(), weighted(logps, entropy, torch.arange(9)).item())
    assert_same_gradients(found, expected, rtol=1e-10, atol=1e-10)
    assert model.config._attn_implementation == "eager"


def test_soft_caps_count_with_eager_attention():
    """The test above would not feel a cap of 50."""
    batch = make_batch()
    options = {"attn_logit_softcapping": 1.0, "attn_implementation": "eager"}
    model = make_model("gemma2-window-softcap", **options)
    expected, _ = naive_scores(model, batch)
    scores = LogProbs(PolicySettings(batch_layout="shared_prefix")).compute(model, batch)
    torch.testing.assert_close(scores.logps, expected, rtol=1e-6, atol=1e-6)
    without, _ = naive_scores(make_model("gemma2-window-softcap"), batch)
    assert (expected - without).abs().max() > 0.1


def test_each_kind_of_model_is_checked_once():
    logprobs, batch = Spying(PolicySettings()), make_batch()
    model = logprobs.counting(make_model("llama"))
    logprobs.compute(model, batch)
    # what follows the head; the rectangle twice, the shared prefix; the batch
    assert logprobs.forwards == 1 + 2 + 1 + 1
    logprobs.compute(model, batch)
    assert logprobs.forwards == 6


def test_a_resumed_run_believes_what_the_first_one_found():
    batch = make_batch()
    first = LogProbs(PolicySettings())
    with pytest.warns(UserWarning):
        first.compute(lose_segments(make_model("llama")), batch)
    second = Spying(PolicySettings())
    second.load_state_dict(first.state_dict())
    second.compute(second.counting(make_model("llama")), batch)
    assert second.forwards == 2
    assert second.state_dict() == first.state_dict()
    assert second.kinds == ["padded"]


def test_a_resumed_run_checks_what_the_first_one_did_not():
    """Under 'padded' nothing is checked, and a model of another dtype is another kind."""
    batch = make_batch()
    first = LogProbs(PolicySettings(batch_layout="padded"))
    first.compute(make_model("llama"), batch)
    second = Spying(PolicySettings())
    second.load_state_dict(first.state_dict())
    with pytest.warns(UserWarning, match="leaves out"):
        second.compute(lose_segments(make_model("llama")), batch)
    third = Spying(PolicySettings())
    third.load_state_dict(second.state_dict())
    third.compute(make_model("llama", torch.float32), batch)
    assert second.kinds == ["padded"] and third.kinds == ["shared_prefix"]


def deep():
    """A model in bfloat16 whose log-probs move by 0.08 when its attention rounds otherwise."""
    model = make_model("llama", torch.bfloat16, num_hidden_layers=12)
    for layer in model.model.layers:
        layer.self_attn.q_proj.weight.data *= 3
    model.lm_head.weight.data *= 12
    return model


def test_a_model_that_rounds_much_keeps_its_layout(recwarn):
    logprobs = Spying(PolicySettings())
    logprobs.compute(deep(), make_batch())
    assert logprobs.kinds == ["shared_prefix"]
    assert not [warning for warning in recwarn if "leaves out" in str(warning.message)]


def test_a_model_that_rounds_much_and_sees_too_much_falls_back():
    logprobs = Spying(PolicySettings())
    with pytest.warns(UserWarning, match="differ by"):
        logprobs.compute(lose_segments(deep()), make_batch())
    assert logprobs.kinds == ["padded"]


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
    dtypes = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
    assert [tolerance(dtype, 0.0) for dtype in dtypes] == sorted(TOLERANCE.values())


def test_tolerances_grow_with_the_noise_of_rounding():
    assert tolerance(torch.float32, 1e-5) == TOLERANCE[torch.float32]
    assert tolerance(torch.bfloat16, 0.04) == pytest.approx(0.08)
    assert tolerance(torch.bfloat16, 0.3) == 0.2
