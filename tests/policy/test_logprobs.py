"""Scores and losses of all kinds of models, in all layouts, are those of the model's own logits."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from gmpo.policy.head import chunked as tiles
from gmpo.policy.head.lm_head import find_head
from gmpo.policy.logprobs import LogProbs
from gmpo.policy.settings import PolicySettings
from tests.policy.cases import (
    MODELS,
    RECURRENT,
    VOCABULARY,
    assert_same_gradients,
    float64_throughout,
    gradients,
    make_batch,
    make_model,
    naive_scores,
    weighted,
    weighted_rows,
)

LAYOUTS = ("padded", "packed", "shared_prefix")
TEMPERATURE = 0.7


def make_logprobs(layout, **options):
    return LogProbs(PolicySettings(batch_layout=layout, **options), temperature=TEMPERATURE)


def all_rows(batch):
    return torch.arange(len(batch))


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles of 10 rows of float64 logits."""
    monkeypatch.setattr(tiles, "TILE_BYTES", 10 * VOCABULARY * 8)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", MODELS)
def test_every_layout_gives_the_scores_and_gradients_of_the_logits(name, layout, small_tiles):
    batch = make_batch()
    with float64_throughout():
        model = make_model(name)
        logps, entropy = naive_scores(model, batch, TEMPERATURE)
        expected = gradients(weighted(logps, entropy, all_rows(batch)), model)

        scores = make_logprobs(layout).compute(model, batch, want_entropy_grad=True)
        found = gradients(weighted(scores.logps, scores.entropy, all_rows(batch)), model)

    torch.testing.assert_close(scores.logps, logps, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(scores.entropy, entropy, rtol=1e-10, atol=1e-10)
    assert_same_gradients(found, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", MODELS)
def test_the_loss_is_that_of_all_scores_at_once(name, layout, small_tiles):
    batch = make_batch(longest=12)  # longer than a tile: one row has to go the other way
    seen = []

    def loss_of(rows, logps, entropy):
        seen.append(rows)
        assert len(logps) == len(entropy) == batch.rows(rows).mask.sum()
        return weighted_rows(batch)(rows, logps, entropy)

    with float64_throughout():
        model = make_model(name)
        logps, entropy = naive_scores(model, batch, TEMPERATURE)
        whole = weighted(logps, entropy, all_rows(batch))
        expected = gradients(whole, model)
        loss = make_logprobs(layout).loss(model, batch, loss_of)
        found = gradients(loss, model)

    assert len(seen) > 2
    assert sorted(torch.cat(seen).tolist()) == list(range(len(batch)))
    torch.testing.assert_close(loss, whole, rtol=1e-10, atol=1e-10)
    assert_same_gradients(found, expected, rtol=1e-10, atol=1e-10)


KINDS = ("llama", "qwen3", "gemma3-window", "qwen3-moe")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", KINDS)
def test_float32_models_agree_to_float32(name, layout, small_tiles):
    batch = make_batch()
    model = make_model(name, torch.float32)
    logps, entropy = naive_scores(model, batch, TEMPERATURE)
    expected = gradients(weighted(logps, entropy, all_rows(batch)), model)
    loss = make_logprobs(layout).loss(model, batch, weighted_rows(batch))
    scores = make_logprobs(layout).compute(model, batch)
    torch.testing.assert_close(scores.logps, logps, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(scores.entropy, entropy, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        loss, weighted(logps, entropy, all_rows(batch)), rtol=1e-5, atol=1e-4
    )  # terms of 100
    found = gradients(loss, model)
    assert found.keys() == expected.keys()
    for parameter, value in expected.items():
        assert (found[parameter] - value).norm() <= 1e-5 * value.norm(), parameter


def test_scores_are_float32_for_a_bfloat16_model_and_close_to_it():
    batch = make_batch()
    expected, _ = naive_scores(make_model("llama", torch.float32), batch)
    scores = LogProbs(PolicySettings()).compute(make_model("llama", torch.bfloat16), batch)
    assert scores.logps.dtype == scores.entropy.dtype == torch.float32
    assert (scores.logps - expected)[batch.mask].abs().mean() < 0.05


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("name", [*KINDS, "nemotron"])
def test_gradients_survive_checkpointing(name, layout, reentrant):
    batch = make_batch()
    results = []
    for checkpointing in (False, True):
        model = make_model(name)
        if checkpointing:
            model.gradient_checkpointing_enable(
                gradient_checkpointing_kwargs={"use_reentrant": reentrant}
            )
            model.enable_input_require_grads()
        loss_of = weighted_rows(batch)
        with float64_throughout():
            results.append(gradients(make_logprobs(layout).loss(model, batch, loss_of), model))
    assert_same_gradients(results[1], results[0], rtol=1e-10, atol=1e-10)


def test_autocast_scores_like_the_models_own_logits_under_autocast():
    batch = make_batch()
    model = make_model("llama", torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        logps, entropy = naive_scores(model, batch, TEMPERATURE)
        loss = make_logprobs("shared_prefix").loss(model, batch, weighted_rows(batch))
    expected = gradients(weighted(logps.float(), entropy.float(), all_rows(batch)), model)
    found = gradients(loss, model)
    head = "lm_head.weight"
    assert found[head].dtype == torch.float32
    assert (found[head] - expected[head]).norm() < 0.05 * expected[head].norm()


def test_padding_and_untrained_tokens_score_zero():
    batch = make_batch()
    scores = make_logprobs("shared_prefix").compute(make_model("llama"), batch)
    assert (scores.logps[~batch.mask] == 0).all() and (scores.entropy[~batch.mask] == 0).all()
    assert (scores.logps[batch.mask] < 0).all() and (scores.entropy[batch.mask] > 0).all()


def test_without_gradients_scores_and_losses_are_the_same_and_carry_none():
    batch, model, logprobs = make_batch(), make_model("llama"), make_logprobs("packed")
    loss_of = weighted_rows(batch)
    expected = logprobs.loss(model, batch, loss_of)
    with torch.no_grad():
        scores, loss = logprobs.compute(model, batch), logprobs.loss(model, batch, loss_of)
    assert not scores.logps.requires_grad and not loss.requires_grad
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-10, atol=1e-10)


def test_entropy_carries_a_gradient_only_where_asked():
    batch, model, logprobs = make_batch(), make_model("llama"), make_logprobs("packed")
    assert not logprobs.compute(model, batch).entropy.requires_grad
    assert logprobs.compute(model, batch, want_entropy_grad=True).entropy.requires_grad


def test_a_batch_of_no_rows_gives_zero_and_touches_every_parameter():
    batch, model = make_batch(), make_model("mixtral")
    none = batch.rows(torch.tensor([], dtype=torch.int64))
    for layout in LAYOUTS:
        loss = make_logprobs(layout).loss(
            model, none, lambda rows, logps, entropy: 1 / 0, router_share=lambda loss: loss
        )
        assert loss == 0.0
        found = gradients(loss, model)
        assert "lm_head.weight" in found and "model.layers.0.self_attn.q_proj.weight" in found
        assert all((gradient == 0).all() for gradient in found.values())


def test_rows_without_trained_tokens_still_enter_the_loss():
    batch, model = make_batch(), make_model("llama")
    batch.mask = torch.zeros_like(batch.mask)
    loss = make_logprobs("auto").loss(
        model, batch, lambda rows, logps, entropy: logps.sum() + len(rows)
    )
    assert loss.item() == len(batch)


@pytest.mark.parametrize("name", RECURRENT)
def test_recurrent_models_fall_back_to_the_rectangle_with_a_warning(name):
    batch, model = make_batch(), make_model(name, torch.float32).eval()
    logps, entropy = naive_scores(model, batch)
    with pytest.warns(UserWarning, match="leaves out 'shared_prefix' for"):
        scores = LogProbs(PolicySettings()).compute(model, batch)
    torch.testing.assert_close(scores.logps, logps, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(scores.entropy, entropy, rtol=1e-4, atol=1e-4)


class LargestTensor(TorchDispatchMode):
    """The number of rows of the largest [rows, VOCABULARY] tensor made within the block."""

    rows = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, torch.Tensor) and tensor.dim() and tensor.shape[-1] == VOCABULARY:
                self.rows = max(self.rows, tensor.numel() // VOCABULARY)
        return result


@pytest.mark.parametrize("layout", LAYOUTS)
def test_logits_of_more_rows_than_a_tile_never_exist(layout, small_tiles):
    batch, model = make_batch(groups=6, group_size=6, longest=10), make_model("llama")
    logprobs = make_logprobs(layout)
    head_rows = find_head(model).weight.shape[1]  # [32, VOCABULARY]: the head itself
    assert batch.mask.sum() > 4 * head_rows
    with LargestTensor() as seen:
        gradients(logprobs.loss(model, batch, weighted_rows(batch)), model)
        scores = logprobs.compute(model, batch, want_entropy_grad=True)
        gradients(weighted(scores.logps, scores.entropy, all_rows(batch)), model)
    assert seen.rows <= head_rows


def test_the_transform_is_measured_whatever_the_configuration_calls_it():
    expected = {
        "llama": (1.0, float("inf")),
        "granite-scale": (1 / 6, float("inf")),
        "cohere-scale": (0.3, float("inf")),
        "gemma2-window-softcap": (1.0, 2.0),
    }
    for name, (slope, cap) in expected.items():
        logprobs, model = make_logprobs("padded"), make_model(name)
        logprobs.compute(model, make_batch())
        transform = logprobs._transforms[model]
        assert (transform.slope, transform.cap, transform.temperature) == pytest.approx(
            (slope, cap, TEMPERATURE), rel=1e-14
        )


def test_scoring_leaves_the_model_and_the_random_numbers_as_they_were():
    model, batch = make_model("gpt2", resid_pdrop=0.5), make_batch()
    model.transformer.h[1].eval()
    modes = [module.training for module in model.modules()]
    states = []
    for checked in (False, True):
        logprobs = make_logprobs("shared_prefix")
        if checked:
            logprobs.compute(model, batch)
        torch.manual_seed(0)
        logprobs.compute(model, batch)
        states.append(torch.get_rng_state())
    torch.testing.assert_close(states[0], states[1])
    assert "forward" not in vars(model.lm_head)
    assert [module.training for module in model.modules()] == modes
