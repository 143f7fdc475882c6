"""The load-balancing loss is the one that the model itself computes of the rectangle, in every layout."""

import pytest
import torch

from gmpo.policy.logprobs import LogProbs
from gmpo.policy.moe import load_balancing_loss
from gmpo.policy.settings import PolicySettings
from tests.policy.cases import (
    assert_same_gradients,
    float64_throughout,
    gradients,
    make_batch,
    make_model,
)

LAYOUTS = ("padded", "packed", "shared_prefix")
MIXTURES = ("mixtral", "qwen3-moe")


def loss_of_the_model(model, batch):
    rows = [
        torch.cat([p, c[:n]])
        for p, c, n in zip(batch.prompt_ids, batch.completion_ids, batch.lengths, strict=True)
    ]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    mask = torch.nn.utils.rnn.pad_sequence(
        [torch.ones(len(row), dtype=torch.int64) for row in rows], batch_first=True
    )
    return model(
        input_ids=ids, attention_mask=mask, output_router_logits=True, use_cache=False
    ).aux_loss


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", MIXTURES)
def test_it_is_that_of_the_model_over_real_tokens(name, layout):
    batch = make_batch()
    with float64_throughout():
        model, logprobs = make_model(name), LogProbs(PolicySettings(batch_layout=layout))
        expected = loss_of_the_model(model, batch)
        wanted = gradients(expected, model)
        found = logprobs.compute(model, batch).router_loss
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
        grads = gradients(found, model)
        total = logprobs.loss(
            model,
            batch,
            lambda rows, logps, entropy: 0 * logps.sum(),
            router_share=lambda loss: 3.0 * loss,
        )
        torch.testing.assert_close(total, 3 * expected, rtol=1e-10, atol=1e-10)
    grads = {name: grad for name, grad in grads.items() if name in wanted}
    assert_same_gradients(grads, wanted, rtol=1e-10, atol=1e-10)


def test_an_even_load_costs_the_number_of_chosen_experts():
    # 4 experts, 2 chosen; every pair is chosen once, probabilities are 0.4, 0.4, 0.1, 0.1 in turn: shares are 1/2 each,
    # means 1/4 each: 4 * 4 * 1/2 * 1/4 = 2
    pairs = torch.tensor([[0, 1], [2, 3]])
    logits = torch.full((2, 4), 0.1).scatter(1, pairs, 0.4).log()
    torch.testing.assert_close(load_balancing_loss([logits], torch.ones(2), 2), torch.tensor(2.0))
    # the first token counted twice and the second not at all: shares 1, 1, 0, 0: 4 * (0.4 + 0.4)
    torch.testing.assert_close(
        load_balancing_loss([logits], torch.tensor([2.0, 0.0]), 2), torch.tensor(3.2)
    )


def test_it_is_left_out_where_nothing_asks_for_it():
    batch, mixture = make_batch(), make_model("mixtral")
    assert (
        LogProbs(PolicySettings(router_aux_loss_coef=0.0)).compute(mixture, batch).router_loss
        is None
    )
    assert LogProbs(PolicySettings()).compute(make_model("llama"), batch).router_loss is None
    with torch.no_grad():
        assert LogProbs(PolicySettings()).compute(mixture, batch).router_loss is None


def test_checkpointing_that_hides_the_routers_is_refused():
    batch, model = make_batch(), make_model("mixtral")
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    model.enable_input_require_grads()
    with pytest.raises(ValueError, match="'use_reentrant': False"):
        LogProbs(PolicySettings()).compute(model, batch)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    expected = LogProbs(PolicySettings()).compute(make_model("mixtral"), batch).router_loss
    found = LogProbs(PolicySettings()).compute(model, batch).router_loss
    torch.testing.assert_close(found, expected)
    gate = "model.layers.0.mlp.gate.weight"
    assert gradients(found, model)[gate].abs().max() > 0
