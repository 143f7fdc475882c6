"""Log-probs are of the distribution that was sampled from: an unmoved policy has ratio 1."""

import pytest
import torch
from datasets import Dataset

from tests.tiny import WORDS, tiny_model
from tests.watch import collections_of

CUTS = {
    "top_p": {"top_p": 0.7},
    "top_k": {"top_k": 5},
    "min_p": {"min_p": 0.1},
    "penalty": {"repetition_penalty": 1.3},
    "all": {"top_p": 0.9, "top_k": 8, "min_p": 0.02, "repetition_penalty": 1.2, "temperature": 1.3},
    "more": {"generation_kwargs": {"typical_p": 0.8, "suppress_tokens": [7], "temperature": 1.2}},
}
ENGINES = ("shared_prefix", "generate")


def letters(completions, **columns):
    """Hardly ever the same for two completions."""
    return [float(sum(map(ord, text))) for text in completions]


def ratios(trainer):
    """Trainer over sampler, least and greatest, in the first optimizer step of a collection."""
    entry = trainer.state.log_history[0]
    return [entry[f"sampling/importance_sampling_ratio/{name}"] for name in ("min", "max")]


@pytest.fixture
def run(make_trainer):
    """A run of one optimizer step, in float64 as far as engine and policy can."""

    def train(**options):
        options = {
            "model": tiny_model(dtype=torch.float64, initializer_range=0.4),
            "vllm_importance_sampling_mode": "token_truncate",
            "reward_funcs": letters,
            "max_steps": 1,
            "zero_signal_groups": "keep",
            **options,
        }
        trainer = make_trainer(**options)
        collections = collections_of(trainer)
        trainer.train()
        return trainer, [collection.batch for collection in collections]

    return train


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("cut", CUTS.values(), ids=CUTS)
def test_the_ratio_of_an_unmoved_policy_is_one(run, cut, engine):
    trainer, (batch,) = run(generation_engine=engine, learning_rate=0.0, **cut)
    assert ratios(trainer) == pytest.approx([1.0, 1.0], abs=1e-6)
    scores = trainer.stages.logprobs.compute(trainer.model, batch)
    torch.testing.assert_close(scores.logps.float(), batch.sampler_logps, rtol=0, atol=1e-6)
    assert (batch.support is None) == (cut == CUTS["penalty"])


def test_full_log_probs_are_of_another_distribution_than_the_tokens(run):
    trainer, (batch,) = run(top_k=5, logps_support="full", learning_rate=0.0)
    assert ratios(trainer) == pytest.approx([1.0, 1.0], abs=1e-6)
    assert batch.support is None
    _, (cut,) = run(top_k=5, learning_rate=0.0)
    assert torch.equal(cut.completion_ids, batch.completion_ids)
    assert (cut.sampler_logps - batch.sampler_logps)[batch.mask].min() > 0


def test_sampler_and_trainer_both_sum_to_one_over_the_tokens_that_could_be_drawn(run):
    # One prompt, one token each: every drawable token is written by some of the 128 completions.
    trainer, (batch,) = run(
        train_dataset=Dataset.from_list([{"prompt": "a b c"}]),
        per_device_train_batch_size=128,
        num_generations=128,
        steps_per_generation=1,
        max_completion_length=1,
        top_p=0.8,
        top_k=6,
        learning_rate=0.0,
    )
    tokens = batch.completion_ids[:, 0]
    drawn = batch.support[:, 0].members(len(WORDS))[0]
    first = [int((tokens == token).nonzero()[0]) for token in drawn.nonzero().flatten()]
    assert sorted(set(tokens.tolist())) == drawn.nonzero().flatten().tolist()
    assert 2 <= len(first) <= 6
    trained = trainer.stages.logprobs.compute(trainer.model, batch).logps
    assert float(batch.sampler_logps[first, 0].exp().sum()) == pytest.approx(1.0, abs=1e-6)
    assert float(trained[first, 0].exp().sum()) == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize("layout", ["padded", "packed", "shared_prefix"])
def test_cutting_a_batch_into_chunks_and_layouts_keeps_the_update(run, weights, layout):
    options = {
        "top_p": 0.8,
        "repetition_penalty": 1.2,
        "learning_rate": 1e-2,
        "optim": "sgd",
        "beta": 0.1,
    }
    results = []
    for changes in (
        {"batch_layout": "padded"},
        {"batch_layout": layout, "max_tokens_per_chunk": 24},
    ):
        trainer, _ = run(max_grad_norm=0.0, **options, **changes)
        results.append(weights(trainer.model))
    before = weights(tiny_model(dtype=torch.float64, initializer_range=0.4))
    assert max((results[0][name] - before[name]).abs().max() for name in before) > 1e-5
    for name, value in results[0].items():
        torch.testing.assert_close(results[1][name], value, rtol=1e-6, atol=1e-8)
