"""Where memory runs out, chunks are halved and the step is repeated, with the same update."""

import pytest
import torch
from datasets import Dataset

from gmpo.policy.memory import ChunkMemory, ChunkSize, is_out_of_memory
from tests.policy.cases import make_batch
from tests.tiny import tiny_model


def out_of_memory_above(trainer, tokens, after, later=None):
    """Let passes over chunks of more than `tokens` tokens fail, some after their backward pass.

    Args:
        after: The first passes succeed whatever their size.
        later: The limit after the first failure; None for the same.
    """
    logprobs, whole = trainer.stages.logprobs, trainer.stages.logprobs.loss
    failures, calls = [], []

    def loss(model, batch, *args, **keywords):
        value = whole(model, batch, *args, **keywords)
        calls.append(batch)
        limit = later if failures and later is not None else tokens
        if len(calls) > after and logprobs.tokens(batch) > limit:
            failures.append(logprobs.tokens(batch))
            if len(failures) % 2:
                value.backward()  # a part of the gradient is there already
            raise torch.OutOfMemoryError("no room")
        return value

    logprobs.loss = loss
    return failures


def run(make_trainer, weights, tokens=10**6, after=0, later=None, **options):
    trainer = make_trainer(
        model=tiny_model(dtype=torch.float64),
        zero_signal_groups="keep",
        optim="sgd",
        learning_rate=0.5,
        max_grad_norm=0.0,
        max_steps=2,
        **options,
    )
    failures = out_of_memory_above(trainer, tokens, after, later)
    trainer.train()
    return weights(trainer.model), trainer, failures


@pytest.mark.parametrize(
    ("accumulation", "after", "later"), [(1, 0, None), (2, 0, None), (2, 1, None), (2, 1, 17)]
)
def test_the_update_is_that_of_enough_memory(make_trainer, weights, accumulation, after, later):
    """With `later`, memory runs out again while the first micro-batch is computed again."""
    options = {"gradient_accumulation_steps": accumulation, "steps_per_generation": 2}
    expected, plain, _ = run(make_trainer, weights, **options)
    with pytest.warns(
        UserWarning, match=r"Out of memory in a chunk of \d+ tokens: the work is repeated"
    ):
        found, trainer, failures = run(
            make_trainer, weights, tokens=30, after=after, later=later, **options
        )
    assert len(failures) >= (1 if later is None else 2)
    assert trainer.stages.logprobs.memory.max_tokens <= 30
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
    trainer.stages.learner.equal_passes = True
    with pytest.raises(torch.OutOfMemoryError) as caught:
        error, learner = torch.OutOfMemoryError("no room"), trainer.stages.learner
        learner.memory.make_room(error, learner._sizes(trainer.model, [make_batch()]))
    assert any("Set max_tokens_per_chunk" in note for note in caught.value.__notes__)
    assert met == []


# -- passes without gradients --------------------------------------------------------------------

ALLOCATION = "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"
WORK = {
    "old log-probs": {"steps_per_generation": 4, "max_steps": 4},
    "reference": {"beta": 0.1},
    "entropies": {"top_entropy_quantile": 0.5},
    "evaluation": {
        "eval_strategy": "steps",
        "eval_steps": 1,
        "per_device_eval_batch_size": 8,
        "eval_dataset": Dataset.from_list([{"prompt": "a b c"}, {"prompt": "b"}]),
    },
}


def fail_without_grad(trainer, tokens):
    """Let passes without gradients over more than `tokens` tokens fail as cuBLAS does."""
    logprobs, failures = trainer.stages.logprobs, []

    def limited(whole):
        def compute(model, batch, *args, **keywords):
            if not torch.is_grad_enabled() and logprobs.tokens(batch) > tokens:
                failures.append(logprobs.tokens(batch))
                raise RuntimeError(ALLOCATION)
            return whole(model, batch, *args, **keywords)

        return compute

    logprobs.compute = limited(logprobs.compute)
    logprobs.loss = limited(logprobs.loss)
    return failures


def figures(trainer):
    names = ("loss", "entropy", "kl", "eval_loss", "log_ratio/max", "eval_entropy")
    return [entry.get(name, 0.0) for entry in trainer.state.log_history for name in names]


@pytest.mark.parametrize("work", WORK)
def test_memory_that_runs_out_without_gradients_is_repaired_too(make_trainer, weights, work):
    results = []
    for tokens in (10**6, 20):
        trainer = make_trainer(
            model=tiny_model(dtype=torch.float64),
            zero_signal_groups="keep",
            **{"max_steps": 2, **WORK[work]},
        )
        failures = fail_without_grad(trainer, tokens)
        trainer.train()
        results.append((weights(trainer.model), figures(trainer), trainer))
        assert bool(failures) == (tokens == 20)
    (expected, plain, _), (found, mine, trainer) = results
    assert trainer.stages.learner.memory.max_tokens <= 24  # the one bound of all passes
    assert mine == pytest.approx(plain, rel=1e-4, abs=1e-6)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-6)


def test_an_entropy_pass_that_does_not_fit_is_told_once(make_trainer):
    trainer = make_trainer(top_entropy_quantile=0.5, max_steps=1)
    fail_without_grad(trainer, tokens=1)
    with pytest.raises(RuntimeError, match="CUBLAS") as caught, pytest.warns(UserWarning):
        trainer.train()
    told = [note for note in caught.value.__notes__ if "does not fit" in note]
    assert len(told) == 1


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("x"), RuntimeError(ALLOCATION), RuntimeError("HIP out of memory.")],
)
def test_every_form_of_a_lack_of_memory_is_known(error):
    assert is_out_of_memory(error)
    assert not is_out_of_memory(RuntimeError("shape mismatch"))
    assert not is_out_of_memory(ValueError("out of memory"))


def test_another_error_is_raised_as_it_is():
    error = RuntimeError("shape mismatch")
    with pytest.raises(RuntimeError, match="shape mismatch") as caught:
        ChunkMemory(None).make_room(error, [ChunkSize(10, 2)])
    assert not hasattr(caught.value, "__notes__")


def test_under_deepspeed_nothing_is_repeated():
    """It has reduced a part of the gradient already, which a second pass would count twice."""
    error = torch.OutOfMemoryError("no room")
    with pytest.raises(torch.OutOfMemoryError) as caught:
        ChunkMemory(None, deepspeed=True).make_room(error, [ChunkSize(10, 2)])
    assert any("DeepSpeed keeps a part" in note for note in caught.value.__notes__)
