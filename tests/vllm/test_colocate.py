"""vLLM in this process, for real: it computes with exactly the weights that are trained."""

import random

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from gmpo.rollout.engine import Request, Sampling
from gmpo.rollout.settings import RolloutSettings
from gmpo.rollout.vllm.colocated import ColocatedEngine
from gmpo.rollout.vllm.errors import VllmError
from gmpo.rollout.vllm.inside import worker
from gmpo.rollout.vllm.llm import RunOptions
from gmpo.types import Prompt
from tests.tiny import tiny_tokenizer
from tests.vllm.small import (
    CPU,
    KINDS,
    SEQUENCES,
    Conversations,
    base_weights,
    check_conversations,
    distances,
    small_policy,
    train,
    trainer_logps,
)

pytest.importorskip("vllm")
pytestmark = [pytest.mark.vllm, pytest.mark.timeout(900)]


@pytest.fixture(autouse=True, scope="module")
def no_compilation():
    """vLLM compiles a helper for counting ranks of log-probs; that takes longer than all tests."""
    import torch._dynamo

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch._dynamo.config, "disable", True)
        yield


@pytest.fixture(scope="module")
def start():
    """Starts engines, one at a time: the last one is closed before the next, and at the end."""
    engines = []

    def stop():
        while engines:
            engines.pop().close()

    def start(policy, *, kwargs=None, autocast=None, **options):
        stop()
        settings = RolloutSettings(
            use_vllm=True, vllm_engine_kwargs={**CPU, **(kwargs or {})}, **options
        )
        engines.append(
            ColocatedEngine(
                settings,
                lambda: policy,
                tiny_tokenizer(),
                eos=(1,),
                autocast=autocast,
                run_options=RunOptions(seed=11),
            )
        )
        return engines[-1]

    yield start
    stop()


def kwargs_for(kind):
    return {"enable_lora": True, "max_lora_rank": 8, "max_loras": 1} if kind == "adapter" else {}


# -- publication -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tied", [True, False])
def test_after_each_optimizer_step_the_engine_computes_what_is_trained(start, kind, tied):
    policy = small_policy(kind, tied=tied)
    base = base_weights(policy)
    engine = start(policy, kwargs=kwargs_for(kind))
    moved = None
    for version in range(4):
        engine.publish(version)
        assert distances(engine._score, policy).max() < 1e-4
        assert (
            moved is None or distances(engine._score, moved).max() > 1e-3
        )  # the step was large enough to show
        moved = small_policy(kind, tied=tied)
        moved.load_state_dict(policy.state_dict())
        train(policy, steps=1, seed=version)
    assert all(torch.equal(weight, policy.get_parameter(name)) for name, weight in base.items())


@pytest.mark.parametrize("kind", KINDS)
def test_in_half_precision_the_engine_computes_what_is_trained(start, kind):
    """Two implementations of a forward pass round differently: by 0.02 nats in the mean."""
    policy = small_policy(kind, dtype=torch.bfloat16)
    engine = start(policy, kwargs=kwargs_for(kind))
    for version in range(3):
        engine.publish(version)
        assert distances(engine._score, policy).mean() < 2e-2
        train(policy, steps=1, seed=version)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_published_engine_is_bit_for_bit_a_fresh_one(start, dtype, tmp_path):
    """The yardstick without rounding: an engine that vLLM itself loads from a checkpoint."""
    policy = small_policy(dtype=dtype)
    train(policy, steps=2)
    engine = start(small_policy(dtype=dtype, seed=5))
    engine.publish(0)
    engine.policy = lambda: policy
    engine.publish(1)
    published = [engine._score(ids) for ids in SEQUENCES]
    policy.save_pretrained(tmp_path)
    engine = start(AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype))
    engine.publish(0)
    assert [engine._score(ids) for ids in SEQUENCES] == published


def test_after_two_hundred_publications_still(start):
    policy = small_policy("merged adapter")
    base = base_weights(policy)
    engine = start(policy)
    for version in range(200):
        engine.publish(version)
        train(policy, steps=1, lr=1e-3, seed=version)
    engine.publish(200)
    assert distances(engine._score, policy).max() < 1e-4
    assert all(torch.equal(weight, policy.get_parameter(name)) for name, weight in base.items())


def test_an_engine_in_half_precision_under_a_float32_policy(start):
    policy = small_policy()
    engine = start(policy, autocast=lambda: torch.autocast("cpu", torch.bfloat16))
    engine.publish(0)
    assert engine.dtype == torch.bfloat16
    assert distances(engine._score, policy).mean() < 2e-2


def test_the_same_version_is_not_published_again(start, monkeypatch):
    policy = small_policy()
    engine = start(policy)
    engine.publish(7)
    updates = []
    monkeypatch.setattr(engine.llm, "start_weight_update", lambda: updates.append(1))
    engine.publish(7)
    assert not updates


def test_a_publication_that_left_the_tied_head_behind_would_be_found(start, monkeypatch):
    """vLLM 0.32 does leave it, on CPUs; without the repair the run must not begin."""
    monkeypatch.setattr(worker, "forget_packed", lambda model: None)
    engine = start(small_policy())
    with pytest.raises(VllmError, match="vLLM does not compute what is trained"):
        engine.publish(0)


def test_a_missing_weight_is_an_error_and_the_next_publication_works(start, monkeypatch):
    policy = small_policy()
    engine = start(policy)
    engine.publish(0)
    with monkeypatch.context() as patch:
        from gmpo.rollout.vllm import colocated

        whole = colocated.policy_weights
        patch.setattr(colocated, "policy_weights", lambda *a, **k: list(whole(*a, **k))[:-1])
        with pytest.raises(
            RuntimeError, match=r"lacks 1 parameters of the engine's model, 'model.norm.weight'"
        ):
            engine.publish(1)
    train(policy, steps=1)
    engine.publish(2)
    assert distances(engine._score, policy).max() < 1e-4


def test_a_publication_that_stops_half_way_does_not_leave_its_half_to_the_next(start, monkeypatch):
    policy = small_policy()
    engine = start(policy)
    engine.publish(0)
    train(policy, steps=1)
    with monkeypatch.context() as patch:
        from gmpo.rollout.vllm import colocated

        def stops(*arguments, **keywords):
            yield from list(whole(*arguments, **keywords))[
                :5
            ]  # the queries of a layer, but not its keys
            raise ValueError("stopped")

        whole = colocated.policy_weights
        patch.setattr(colocated, "policy_weights", stops)
        with pytest.raises(ValueError, match="stopped"):
            engine.publish(1)
    train(policy, steps=1, seed=1)
    engine.publish(2)
    assert distances(engine._score, policy).max() < 1e-4


# -- completions -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ready(start):
    policy = small_policy()
    engine = start(policy, vllm_max_model_length=64)
    engine.publish(0)
    return engine, policy


@pytest.fixture
def engine(ready, start):
    """One engine for all tests of completions; another test may have closed it."""
    engine, policy = ready
    if engine.llm is None:
        engine = start(policy, vllm_max_model_length=64)
        engine.publish(0)
    return engine, policy


def request(ids, count=4, seed=3):
    return Request(Prompt(list(ids), "text"), count, seed)


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(12),
        Sampling(12, temperature=0.6),
        Sampling(
            12,
            temperature=1.7,
            top_p=0.8,
            top_k=9,
            min_p=0.02,
            repetition_penalty=1.3,
            logps_support="full",
        ),
    ],
)
def test_reported_log_probs_are_of_the_temperature_scaled_distribution(engine, sampling):
    engine, policy = engine
    (completions,) = engine.generate([request([5, 6, 7], count=6)], sampling)
    for completion in completions:
        expected = trainer_logps(policy, [5, 6, 7, *completion.ids], sampling.temperature)[2:]
        torch.testing.assert_close(torch.tensor(completion.logps), expected, rtol=0, atol=1e-4)


def test_with_a_repetition_penalty_log_probs_are_of_what_is_sampled(start):
    """Divides positive and multiplies negative logits of tokens that were there before."""
    policy = small_policy()
    engine = start(policy, repetition_penalty=1.5, temperature=0.7, vllm_max_model_length=64)
    engine.publish(0)
    sampling = Sampling(10, temperature=0.7, repetition_penalty=1.5)
    (completions,) = engine.generate([request([5, 6, 7], count=6)], sampling)
    for completion in completions:
        ids = [5, 6, 7, *completion.ids]
        with torch.no_grad():
            logits = policy(input_ids=torch.tensor([ids])).logits[0].float()
        for place, logp in enumerate(completion.logps, start=3):
            row = logits[place - 1].clone()
            seen = torch.tensor(sorted(set(ids[:place])))
            row[seen] = torch.where(row[seen] > 0, row[seen] / 1.5, row[seen] * 1.5)
            expected = (row / 0.7).log_softmax(-1)[ids[place]]
            assert abs(float(expected) - logp) < 1e-4


def test_counts_and_order_are_those_of_the_requests(engine):
    engine, _ = engine
    groups = engine.generate([request([5], 3), request([6, 7], 1), request([8], 2)], Sampling(4))
    assert [len(group) for group in groups] == [3, 1, 2]


def test_a_seed_gives_the_same_completions_whatever_else_is_asked_for(engine):
    engine, _ = engine
    alone = engine.generate([request([5, 6], seed=9)], Sampling(10))
    among = engine.generate(
        [request([7], seed=1), request([5, 6], seed=9), request([5, 6], seed=8)], Sampling(10)
    )
    assert alone[0] == among[1] != among[2]
    assert len({tuple(completion.ids) for completion in alone[0]}) > 1


def test_a_group_over_ranks_gets_the_samples_of_the_whole_group(engine):
    engine, _ = engine
    prompt = Prompt([5, 6], "text")
    (whole,) = engine.generate([Request(prompt, 4, 77)], Sampling(10))
    ranks = [Request(prompt, 2, 77, 0), Request(prompt, 2, 77, 2)]
    parts = [engine.generate([request], Sampling(10))[0] for request in ranks]
    assert [c.ids for c in parts[0] + parts[1]] == [c.ids for c in whole]
    assert len({tuple(c.ids) for c in whole}) > 1


def test_weights_that_are_not_finite_end_the_run(start):
    policy = small_policy(tied=False)
    engine = start(policy)
    engine.publish(0)
    with torch.no_grad():
        policy.lm_head.weight[3] = float("nan")
    engine.publish(1)
    with pytest.raises(VllmError, match="The logits are not finite"):
        engine.generate([request([5, 6])], Sampling(4))


def test_samples_go_on_from_their_own_tokens(engine):
    engine, policy = engine
    requests = [request([5, 6], 3), request([7, 8, 9], 2, seed=8)]
    work = Conversations(requests)
    engine.serve(work, Sampling(6))
    check_conversations(policy, work, samples=5)
    whole = engine.generate(requests, Sampling(6))
    first_turns = [
        (number, c.ids) for it, number, c in work.given if it.prompt.ids == [5, 6] and not it.so_far
    ]
    assert sorted(first_turns) == list(enumerate([c.ids for c in whole[0]]))


def test_what_fails_leaves_nothing_behind_in_the_batch(engine):
    engine, _ = engine
    too_long = request([5] * 60, 1)
    with pytest.raises(ValueError, match="Raise vllm_max_model_length"):
        engine.serve(Conversations([request([5, 6], 3), too_long]), Sampling(6))
    assert not engine.llm.llm_engine.has_unfinished_requests()
    assert len(engine.generate([request([5], 2)], Sampling(4))[0]) == 2


def test_a_completion_ends_with_the_end_token_or_at_its_budget(engine):
    engine, _ = engine
    (completions,) = engine.generate([request([5, 6], count=40)], Sampling(16))
    stopped = [c for c in completions if c.finish_reason == "stop"]
    assert stopped and all(c.ids[-1] == 1 and 1 not in c.ids[:-1] for c in stopped)
    assert all(len(c.ids) == 16 for c in completions if c.finish_reason == "length")


def test_greedy_takes_the_most_probable_token(engine):
    engine, policy = engine
    ((completion,),) = engine.generate([request([5, 6], count=1)], Sampling(5, temperature=0.0))
    with torch.no_grad():
        expected = policy.generate(torch.tensor([[5, 6]]), max_new_tokens=5, do_sample=False)[0, 2:]
    assert completion.ids == expected.tolist()


def test_a_regex_restricts_the_text_and_then_no_log_probs_are_reported(start):
    engine = start(small_policy(), vllm_structured_outputs_regex="[a]( [bc])*")
    engine.publish(0)
    (completions,) = engine.generate([request([5, 6], count=8)], Sampling(6))
    allowed = {5, 6, 7, 1}  # a, b, c and the end
    assert all(c.logps is None and c.ids[0] == 5 and set(c.ids) <= allowed for c in completions)


def test_prompts_that_do_not_fit_into_one_batch_wait(start):
    """Else vLLM would read one in parts, and on CPUs fail on that request's random numbers."""
    policy = small_policy()
    engine = start(policy, kwargs={"max_num_batched_tokens": 64}, vllm_max_model_length=64)
    engine.publish(0)
    requests = [request([5 + number] * 40, count=2, seed=number) for number in range(6)]
    together = engine.generate(requests, Sampling(6))[4]
    (alone,) = engine.generate(requests[4:5], Sampling(6))
    assert [completion.ids for completion in together] == [completion.ids for completion in alone]


def test_too_long_is_refused_before_generation(engine):
    engine, _ = engine
    with pytest.raises(ValueError, match="Raise vllm_max_model_length"):
        engine.generate([request([5] * 60)], Sampling(5))


def test_vllm_leaves_the_trainers_random_numbers_and_threads_alone(start):
    threads = torch.get_num_threads()
    torch.manual_seed(1), random.seed(1), np.random.seed(1)
    expected = (torch.rand(1), random.random(), np.random.rand())
    torch.manual_seed(1), random.seed(1), np.random.seed(1)
    engine = start(small_policy())
    engine.publish(0)
    engine.generate([request([5])], Sampling(4))
    assert (torch.rand(1), random.random(), np.random.rand()) == expected
    assert torch.get_num_threads() == threads
    torch.set_num_threads(threads + 1)
    assert torch.get_num_threads() == threads + 1
    torch.set_num_threads(threads)


def test_sleep_mode_gives_memory_away_after_each_collection(start):
    """Sleeping is for GPUs; here a record of the calls must do."""
    policy = small_policy()
    engine = start(policy)
    engine.settings.vllm_enable_sleep_mode = True
    calls = []
    engine.llm.sleep = lambda level: calls.append(("sleep", level))
    engine.llm.wake_up = lambda tags: calls.append(("wake", *tags))
    start_update = engine.llm.start_weight_update
    engine.llm.start_weight_update = lambda: (calls.append(("update",)), start_update())
    for version in (0, 0, 0, 1):
        engine.publish(version)
        engine.generate([request([5])], Sampling(2))
    assert calls == [
        ("update",),
        ("sleep", 2),
        ("wake", "weights"),
        ("update",),  # the same version: the weights were thrown away
        ("wake", "kv_cache"),
        ("sleep", 1),  # and may be used again, as in an evaluation: they are kept
        ("wake", "weights", "kv_cache"),
        ("sleep", 1),
        ("wake", "weights"),
        ("update",),
        ("wake", "kv_cache"),
        ("sleep", 2),
    ]


def test_sampling_options_that_vllm_refuses_are_told_before_it_starts(start):
    with pytest.raises(ValueError, match=r"vLLM refuses .* Change generation_kwargs"):
        start(small_policy(), generation_kwargs={"presence_penalty": 7.0}, logps_support="full")


def test_options_that_vllm_does_not_know_are_named(start):
    with pytest.raises(
        ValueError, match=r"'max_num_seq', which vLLM does not know. Did you mean 'max_num_seqs'\?"
    ):
        start(small_policy(), kwargs={"max_num_seq": 1})
