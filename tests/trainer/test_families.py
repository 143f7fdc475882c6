"""Models that scale, cap or shift logits, or have several end tokens, through a whole run."""

import pytest
import torch
from torch import nn
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
)

from tests.tiny import WORDS, tiny_model
from tests.watch import collections_of

SIZES = {
    "vocab_size": len(WORDS),
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": None,
    "initializer_range": 0.3,
}


def with_biased_head():
    model = tiny_model()
    model.lm_head = nn.Linear(32, len(WORDS), bias=True)
    nn.init.normal_(model.lm_head.bias)
    return model


def letters(completions, **columns):
    """Hardly ever the same for two completions."""
    return [float(sum(map(ord, text))) for text in completions]


MODELS = {
    "soft-capped": lambda: Gemma2ForCausalLM(
        Gemma2Config(**SIZES, head_dim=8, final_logit_softcapping=2.0)
    ),
    "scaled down": lambda: GraniteForCausalLM(GraniteConfig(**SIZES, logits_scaling=4.0)),
    "scaled up": lambda: CohereForCausalLM(CohereConfig(**SIZES, logit_scale=2.0)),
    "shifted": with_biased_head,
}


@pytest.mark.parametrize("engine", ["auto", "generate"])
@pytest.mark.parametrize("name", MODELS)
def test_what_is_scored_is_what_the_model_itself_says(make_trainer, name, engine):
    torch.manual_seed(0)
    trainer = make_trainer(
        model=MODELS[name](),
        reward_funcs=letters,
        max_steps=1,
        temperature=0.7,
        generation_engine=engine,
    )
    seen = collections_of(trainer)
    before = {key: value.clone() for key, value in trainer.model.state_dict().items()}
    trainer.train()
    assert trainer.state.log_history[0]["sampling/sampling_logp_difference/max"] < 1e-4
    trainer.model.load_state_dict(before)
    for rollout in seen[0].rollouts[:3]:
        ids = torch.tensor([[*rollout.prompt.ids, *rollout.ids]])
        with torch.no_grad():
            logits = trainer.model.eval()(ids).logits[0, len(rollout.prompt.ids) - 1 : -1] / 0.7
        expected = logits.log_softmax(-1).gather(-1, torch.tensor(rollout.ids)[:, None])[:, 0]
        torch.testing.assert_close(
            torch.tensor(rollout.sampler_logps), expected, rtol=1e-4, atol=1e-4
        )


def test_every_end_token_of_the_model_ends_a_completion_and_none_counts_as_truncated(make_trainer):
    model = tiny_model()
    model.generation_config.eos_token_id = [1, *range(5, 11)]  # the letters a to f too
    trainer = make_trainer(model=model, max_steps=1, max_completion_length=40)
    trainer.train()
    log = trainer.state.log_history[0]
    assert log["completions/clipped_ratio"] == 0.0
    assert log["completions/max_length"] < 40
