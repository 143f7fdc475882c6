import asyncio
import itertools
import logging
import sys
import threading
import time
import traceback
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
import torch

from gmpo.reward.answers import as_scores
from gmpo.reward.score import event_loop, score
from gmpo.reward.settings import RewardSettings
from gmpo.reward.sources import build_sources
from tests.reward.cases import assistant, rollout, user

NAN = float("nan")


def scored(rewards, rollouts=None, rows=None, **options):
    rollouts = [rollout("p1", "c1"), rollout("p2", "c2")] if rollouts is None else rollouts
    return score(build_sources(rewards), rollouts, rows or [{}] * len(rollouts), **options)


def same(got, expected):
    torch.testing.assert_close(
        got, torch.tensor(expected, dtype=torch.float64), equal_nan=True, rtol=0, atol=0
    )


def test_every_source_fills_its_column_and_none_is_nan():
    def first(completions):
        return [0.1, None]

    async def second(answer):
        return [int(value) for value in answer]

    result = scored([first, second], rows=[{"prompt": "x", "answer": "3"}, {"answer": "-4"}])
    same(result.rewards, [[0.1, 3.0], [NAN, -4.0]])  # 0.1 as float64
    assert (result.extra, result.metrics) == ({}, {})


def test_no_rollouts_ask_nobody():
    result = scored([lambda **kwargs: pytest.fail("asked")] * 3, rollouts=[])
    assert result.rewards.shape == (0, 3)


ANSWERS = [
    ([1, True], [1.0, 1.0]),
    ((0.5, None), [0.5, NAN]),
    ([NAN, np.float32(0.5)], [NAN, 0.5]),
    ([np.int64(3), np.bool_(True)], [3.0, 1.0]),
    ([torch.tensor(2.0), torch.tensor([3.0])], [2.0, 3.0]),
    ([Fraction(1, 4), -0.0], [0.25, 0.0]),
    (np.array([1, 2]), [1.0, 2.0]),
    (torch.tensor([1.5, NAN], requires_grad=True), [1.5, NAN]),
    (torch.tensor([[1.5], [2.5]], dtype=torch.bfloat16), [1.5, 2.5]),
    (map(float, ["1", "2"]), [1.0, 2.0]),
]


@pytest.mark.parametrize(("answer", "expected"), ANSWERS)
def test_whatever_holds_a_number_per_completion_is_an_answer(answer, expected):
    same(torch.tensor(as_scores("f", answer, 2), dtype=torch.float64), expected)


NO_ANSWERS = [
    ([1.0], "'f' returned 1 scores for 2 completions"),
    ([1.0, 2.0, 3.0], "'f' returned 3 scores for 2 completions"),
    (torch.ones(3), "'f' returned 3 scores for 2 completions"),
    (None, "None.*instead of a list of 2.*return at all"),
    (1.0, r"1.0 \(float\) instead of a list of 2"),
    (torch.tensor(1.0), r"\(Tensor\) instead of a list of 2"),
    (np.array(1.0), r"\(ndarray\) instead of a list of 2"),
    ("12", r"'12' \(str\) instead of a list"),
    ({0: 1.0, 1: 2.0}, r"\(dict\) instead of a list"),
    ({1.0, 2.0}, r"\(set\) instead of a list"),
    ([1.0, "2.0"], r"'2.0' \(str\) for completion 1"),
    ([[1.0, 2.0], 1.0], r"\(list\) for completion 0"),
    ([torch.ones(2), 1.0], r"\(Tensor\) for completion 0"),
    ([1.0, 1j], r"\(complex\) for completion 1"),
    ([1.0, np.complex64(1)], r"\(complex64\) for completion 1"),
    ([Decimal(1), 1.0], r"\(Decimal\) for completion 0"),
    ([1.0, float("-inf")], "-inf for completion 1.*finite"),
    ([1e39, 1.0], "for completion 0.*finite"),  # infinite in float32
    ([10**400, 1.0], "for completion 0.*finite"),
]


@pytest.mark.parametrize(("answer", "message"), NO_ANSWERS)
def test_another_answer_is_an_error_that_names_function_and_row(answer, message):
    with pytest.raises(ValueError, match=message):
        as_scores("f", answer, 2)


def test_asynchronous_sources_run_beside_each_other_and_beside_the_others():
    """None could finish alone: each waits for the next one to begin, the first of them for the plain function."""
    begun = {name: threading.Event() for name in ("first", "second", "plain")}

    async def meet(mine, other):
        begun[mine].set()
        while not begun[other].is_set():
            await asyncio.sleep(0.001)
        return [1.0, 1.0]

    async def first(**kwargs):
        return await meet("first", "second")

    async def second(**kwargs):
        return await meet("second", "plain")

    def plain(**kwargs):
        assert begun["first"].wait(30)
        begun["plain"].set()
        return [0.0, 0.0]

    same(scored([plain, first, second]).rewards, [[0.0, 1.0, 1.0]] * 2)


def test_asynchronous_sources_work_where_a_loop_is_already_running():
    async def patient(**kwargs):
        await asyncio.sleep(0)
        return [1.0, 2.0]

    async def notebook():
        return scored(patient)

    same(asyncio.run(notebook()).rewards, [[1.0], [2.0]])


def test_the_loop_is_the_same_for_every_call_so_that_connections_last():
    loops = []

    async def spy(**kwargs):
        loops.append(asyncio.get_running_loop())
        return [0.0, 0.0]

    scored(spy)
    asyncio.run(asyncio.sleep(0))
    scored(spy)
    assert loops[0] is loops[1] is event_loop()


def test_plain_functions_run_on_the_calling_thread():
    threads = []

    def spy(completions):
        threads.append(threading.current_thread())
        return [0.0, 0.0]

    scored(spy)
    assert threads == [threading.current_thread()]


def test_a_plain_function_may_return_an_awaitable():
    async def work():
        return [1.0, 2.0]

    same(scored(lambda **kwargs: work()).rewards, [[1.0], [2.0]])


class Broken(Exception):
    pass


def raise_plainly(completions):
    raise Broken("my fault")


async def raise_later(completions):
    await asyncio.sleep(0)
    raise Broken("my fault")


def raise_while_iterating(completions):
    yield 1.0
    raise Broken("my fault")


@pytest.mark.parametrize("function", [raise_plainly, raise_later, raise_while_iterating])
def test_an_exception_stays_what_it_is_and_says_who_raised_it(function):
    with pytest.raises(Broken) as caught:
        scored(function, [rollout("p" * 1000, "c1"), rollout()])
    assert str(caught.value) == "my fault"
    (note,) = caught.value.__notes__
    assert (
        repr(function.__name__) in note
        and "2 completions" in note
        and "'c1'" in note
        and len(note) < 400
    )
    assert caught.value.__cause__ is None
    assert traceback.extract_tb(caught.value.__traceback__)[-1].name == function.__name__


def test_when_one_source_fails_the_waiting_ones_are_cancelled():
    cancelled = threading.Event()

    async def waits(**kwargs):
        try:
            await asyncio.Event().wait()
        finally:
            cancelled.set()

    with pytest.raises(Broken):
        scored([waits, raise_later])
    assert cancelled.wait(30)


def test_who_is_waited_for_is_said(caplog):
    answered = asyncio.Event()

    async def lost(**kwargs):
        await answered.wait()
        return [1.0, 2.0]

    class Answer(logging.Handler):
        def emit(self, record):
            event_loop().call_soon_threadsafe(answered.set)

    handler = Answer()
    logging.getLogger("gmpo.reward.score").addHandler(handler)
    try:
        same(
            scored([lost, lambda **kwargs: [0, 0]], patience_s=0.01).rewards,
            [[1.0, 0.0], [2.0, 0.0]],
        )
    finally:
        logging.getLogger("gmpo.reward.score").removeHandler(handler)
    assert "No answer for 0.01 s from: lost." in caplog.text


def test_rows_that_nobody_scores_are_warned_of_once_with_an_example(caplog):
    def shy_one(completions):
        return [1.0, None]

    def shy_two(completions):
        return [None, None]

    rows = [{"answer": "yes"}, {"answer": "no"}]
    with caplog.at_level(logging.WARNING):
        sources = build_sources([shy_one, shy_two])
        rollouts = [rollout("p1", "c1"), rollout("p2", "c2")]
        score(sources, rollouts, rows)
        score(sources, rollouts, rows)
    (record,) = caplog.records
    message = record.getMessage()
    assert "1 of 2 completions (shy_one, shy_two all gave None)" in message
    assert "prompt 'p2', completion 'c2', columns {'answer': 'no'}" in message


def test_rows_that_somebody_scores_are_not_warned_of(caplog):
    scored([lambda **kwargs: [None, 1.0], lambda **kwargs: [1.0, None]])
    assert not caplog.records


def test_metrics_add_up_over_calls_and_sources():
    def counts(completions, log_metric):
        log_metric("length", 2)
        log_metric("length", torch.tensor(4.0))
        log_metric("length", NAN)
        log_metric("length", None)
        return [0.0, 0.0]

    async def adds(completions, log_metric):
        log_metric("length", 1.5)
        log_metric("other", True)
        return [0.0, 0.0]

    assert scored([counts, adds]).metrics == {"length": (7.5, 3.0), "other": (1.0, 1.0)}


@pytest.mark.parametrize("value", ["2", float("inf"), torch.ones(2)])
def test_a_metric_that_is_no_finite_number_is_refused(value):
    def counts(log_metric):
        log_metric("length", value)

    with pytest.raises(ValueError, match=r"'counts'.*log_metric.*'length'"):
        scored(counts)


def test_extra_columns_come_back_and_two_sources_keep_their_own():
    def one(log_extra):
        log_extra("seen", ["a", "b"])
        log_extra("seen", ("c", "d"))
        return [0.0, 0.0]

    def two(log_extra):
        log_extra("seen", [1, 2])
        log_extra("more", np.array([3, 4]))
        return [0.0, 0.0]

    assert scored([one, two]).extra == {"seen": ["c", "d"], "two/seen": [1, 2], "more": [3, 4]}


def test_an_extra_column_of_another_length_is_refused():
    def one(log_extra):
        log_extra("seen", ["a"])

    with pytest.raises(ValueError, match=r"'one'.*log_extra\('seen'.*1 values for 2"):
        scored(one)


def test_conversations_reach_functions_as_messages():
    def spy(prompts, completions):
        assert prompts == [[user("hi")]] and completions == [[assistant("ho")]]
        return [1.0]

    same(scored(spy, [rollout([user("hi")], [assistant("ho")])]).rewards, [[1.0]])


# -- what does not answer ------------------------------------------------------------------------------


async def never(completions):
    await asyncio.Event().wait()


async def deaf(completions):
    """Swallows its cancellation."""
    while True:
        try:
            await asyncio.sleep(1000)
        except asyncio.CancelledError:
            continue


async def blocking(completions):
    """Blocks the event loop, and with it every other async reward."""
    time.sleep(4)
    return [0.0] * len(completions)


async def quick(completions):
    return [1.0] * len(completions)


@pytest.mark.parametrize("function", [never, deaf, blocking])
def test_an_async_reward_that_never_answers_costs_its_own_scores(function, caplog):
    settings = RewardSettings(reward_timeout=0.5)
    sources = build_sources([function, quick], settings=settings)
    rollouts = [rollout("p1", "c1"), rollout("p2", "c2")]
    result = score(sources[:1], rollouts, [{}] * 2)
    same(result.rewards, [[NAN], [NAN]])
    assert result.metrics == {f"rewards/{function.__name__}/lost": (2.0, 2.0)}
    assert f"'{function.__name__}' did not score" in caplog.text
    same(score(sources[1:], rollouts, [{}] * 2).rewards, [[1.0], [1.0]])


def test_an_async_reward_that_never_answers_stops_the_run_at_last():
    (source,) = build_sources(never, settings=RewardSettings(reward_timeout=0.1))
    for _ in range(2):
        score([source], [rollout()], [{}])
    with pytest.raises(RuntimeError, match=r"'never' scored no completion in 3 calls in a row"):
        score([source], [rollout()], [{}])


def exits(completions):
    sys.exit(7)


async def exits_later(completions):
    await asyncio.sleep(0)
    sys.exit(7)


async def a_task_exits(completions):
    await asyncio.create_task(exits_later(completions))


@pytest.mark.parametrize("function", [exits, exits_later, a_task_exits])
def test_a_reward_that_exits_is_an_error_with_its_name(function):
    with pytest.raises(RuntimeError, match=r"called sys.exit\(7\)") as caught:
        scored(function)
    assert any(repr(function.__name__) in note for note in caught.value.__notes__)
    same(scored(quick).rewards, [[1.0], [1.0]])  # the event loop is still there


def test_a_function_that_takes_long_is_named(caplog):
    waited = threading.Event()

    class Told(logging.Handler):
        def emit(self, record):
            waited.set()

    def slow(completions):
        assert waited.wait(30)
        return [0.0, 0.0]

    handler = Told()
    logging.getLogger("gmpo.reward.score").addHandler(handler)
    try:
        scored(slow, patience_s=0.01)
    finally:
        logging.getLogger("gmpo.reward.score").removeHandler(handler)
    assert "No answer for 0.01 s from: slow. Still waiting." in caplog.text


def test_an_endless_answer_is_refused():
    with pytest.raises(ValueError, match="scores for 2 completions"):
        scored(lambda completions: itertools.repeat(1.0))
