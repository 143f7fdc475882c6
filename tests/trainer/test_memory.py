"""Where memory runs out, chunks are halved and the step is repeated, with the same update."""

import pytest
import torch

from tests.policy.cases import make_batch
from tests.tiny import tiny_model


def out_of_memory_above(trainer, tokens, after):
    """Let the pass over a chunk of more than `tokens` tokens fail, some after their backward.

    Args:
        after: The first passes succeed whatever their size.
    """
    logprobs, whole = trainer.stages.logprobs, trainer.stages.logprobs.loss
    failures, calls = [], []

    def loss(model, batch, *args, **keywords):
        value = whole(model, batch, *args, **keywords)
        calls.append(batch)
        if len(calls) > after and logprobs.tokens(batch) > tokens:
            failures.append(logprobs.tokens(batch))
            if len(failures) % 2:
                value.backward()  # a part of the gradient is there already
            raise torch.OutOfMemoryError("no room")
        return value

    logprobs.loss = loss
    return failures


def run(make_trainer, weights, tokens=10**6, after=0, **options):
    trainer = make_trainer(
        model=tiny_model(dtype=torch.float64),
        zero_signal_groups="keep",
        optim="sgd",
        learning_rate=0.5,
        max_grad_norm=0.0,
        max_steps=2,
        **options,
    )
    failures = out_of_memory_above(trainer, tokens, after)
    trainer.train()
    return weights(trainer.model), trainer, failures


@pytest.mark.parametrize(("accumulation", "after"), [(1, 0), (2, 0), (2, 1)])
def test_the_update_is_that_of_enough_memory(make_trainer, weights, accumulation, after):
    options = {"gradient_accumulation_steps": accumulation, "steps_per_generation": 2}
    expected, plain, _ = run(make_trainer, weights, **options)
    with pytest.warns(
        UserWarning, match=r"Out of memory in a chunk of \d+ tokens: the step is repeated"
    ):
        found, trainer, failures = run(make_trainer, weights, tokens=30, after=after, **options)
    assert len(failures) >= 1 and trainer.stages.learner.max_tokens_per_chunk <= 30
    for name, value in expected.items():
        torch.testing.assert_close(
            found[name], value, rtol=1e-4, atol=1e-6
        )  # Llama norms in float32
    for mine, theirs in zip(trainer.state.log_history, plain.state.log_history, strict=True):
        for name in ("loss", "log_ratio/max", "entropy", "clip_ratio/region_mean"):
            assert mine.get(name, 0.0) == pytest.approx(theirs.get(name, 0.0), rel=1e-4, abs=1e-6)


def test_a_completion_that_does_not_fit_alone_is_an_error(make_trainer, weights):
    with pytest.raises(torch.OutOfMemoryError) as caught, pytest.warns(UserWarning):
        run(make_trainer, weights, tokens=1)
    assert any("Lower max_completion_length" in note for note in caught.value.__notes__)


def test_of_several_ranks_none_starts_a_collective_where_its_memory_runs_out(
    make_trainer, monkeypatch
):
    trainer, met = make_trainer(), []
    monkeypatch.setattr("gmpo.learn.distributed.world_size", lambda: 2)
    monkeypatch.setattr(
        "gmpo.learn.distributed.all_reduce", lambda *given: met.append(given) or torch.ones(())
    )
    trainer.stages.learner.in_step = True
    with pytest.raises(torch.OutOfMemoryError) as caught:
        trainer.stages.learner.make_room(
            torch.OutOfMemoryError("no room"), trainer.model, make_batch()
        )
    assert any("Set max_tokens_per_chunk" in note for note in caught.value.__notes__)
    assert met == []
