import os
import signal
import threading

import pytest

from gmpo.reward.math_judge import is_right, verdict, verdicts
from gmpo.reward.pool import Limits, shared_pool

pytest.importorskip("math_verify")
FOR_EVER = "\\boxed{9^{9^{9^{9}}}}"


VERDICTS = [
    ("18", "The answer is 18.", True),
    ("18", "The answer is \\boxed{19}.", False),
    ("\\frac{1}{2}", "\\boxed{0.5}", True),  # without delimiters
    ("\\frac{1}{2}", "\\boxed{2}", False),
    ("$\\frac{1}{2}$", "so $x = \\frac{2}{4}$", True),
    ("therefore \\boxed{3}", "3", True),
    ("2x + 3y", "\\boxed{3y + 2x}", True),
    ("\\left( 3, \\frac{\\pi}{2} \\right)", "\\boxed{(3, \\pi/2)}", True),
    ("p - q", "\\boxed{q - p}", False),
    ("\\$32,\\!348", "\\boxed{\\$32,\\!348}", True),  # money, not a delimiter
    ("1,000", "\\boxed{1000}", True),
    ("5", "first $x = 4$, then \\boxed{5}, and $y = 4$", True),  # the box wins
    ("5", "no idea", False),
    ("5", "", False),
    ("5", "\\boxed{\\frac{", False),
    ("no idea", "5", None),
    ("The answer is 5", "\\boxed{5}", True),
    ("\\text{two words}", "\\boxed{\\text{two words}}", True),
    ("\\sin x + \\cos y", "\\boxed{\\cos y + \\sin x}", True),
    ("", "5", None),
    ("5", 'quotes " and\nlines and \u2028 and \\u0000', False),
]


@pytest.mark.parametrize(("gold", "text", "expected"), VERDICTS)
def test_answers_are_compared_as_mathematics(gold, text, expected):
    assert verdict(gold, text) is expected


BASES_AND_UNITS = [
    ("52_8", "\\boxed{52_9}", False),
    ("52_8", "\\boxed{52_{8}}", True),
    ("52_8", "\\boxed{52}", True),
    ("15\\mbox{ cm}^2", "\\boxed{15\\mbox{ cm}^3}", False),
    ("15\\mbox{ cm}^2", "\\boxed{15\\text{ cm}^2}", True),
    ("15\\mbox{ cm}^2", "\\boxed{15}", True),
    ("a_1 + a_2", "\\boxed{a_2 + a_1}", True),
]


@pytest.mark.parametrize(("gold", "text", "expected"), BASES_AND_UNITS)
def test_bases_and_powers_of_units_are_compared(gold, text, expected):
    assert is_right(gold, text) is expected


def test_what_never_ends_is_wrong_and_the_others_are_judged(caplog):
    limits = Limits(wall_s=60, cpu_s=1.0, memory_bytes=2**30)
    questions = [("5", FOR_EVER), ("5", "\\boxed{5}"), ("5", f"so {FOR_EVER}"), ("5", "6")]
    assert verdicts(questions, limits=limits) == [False, True, False, False]
    assert caplog.text.count("no verdict") == 2
    assert verdict("5", "\\boxed{5}") is True


def test_the_same_answer_is_judged_once(caplog):
    limits = Limits(wall_s=60, cpu_s=1.0, memory_bytes=2**30)
    assert verdicts([("5", FOR_EVER)] * 20, limits=limits) == [False] * 20
    assert caplog.text.count("no verdict") == 1


def test_a_worker_that_died_meanwhile_costs_no_answer():
    assert verdict("5", "5") is True
    for pid in shared_pool().pids():
        os.kill(pid, signal.SIGKILL)
    assert [verdict("5", "5") for _ in range(3)] == [True] * 3


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs a fork")
def test_forked_processes_have_workers_of_their_own():
    assert verdict("5", "5") is True
    children = []
    for number in range(2):
        if (pid := os.fork()) == 0:
            right = [verdict(str(i), f"\\boxed{{{number}}}") for i in range(2)]
            shared_pool().close()
            os._exit(0 if right == [number == 0, number == 1] else 1)
        children.append(pid)
    assert [os.waitpid(pid, 0)[1] for pid in children] == [0, 0]
    assert verdict("5", "6") is False


def test_threads_share_the_workers_and_get_their_own_answers():
    results = {}

    def ask(i):
        results[i] = [verdict(str(i), f"\\boxed{{{n}}}") for n in range(8)]

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {i: [n == i for n in range(8)] for i in range(8)}


def test_the_alarm_of_the_caller_is_left_alone():
    def handler(*_):
        pytest.fail("not due yet")

    before = signal.signal(signal.SIGALRM, handler)
    signal.alarm(1000)
    try:
        verdict("5", "\\boxed{5}")
        assert signal.alarm(0) > 900
        assert signal.getsignal(signal.SIGALRM) is handler
    finally:
        signal.signal(signal.SIGALRM, before)


def test_a_worker_that_can_t_start_is_an_error_and_not_a_wrong_answer(monkeypatch):
    shared_pool().close()
    monkeypatch.setattr("gmpo.reward.pool._pools", {})
    monkeypatch.setattr("sys.executable", "/bin/false")
    with pytest.raises(RuntimeError, match="could not be run: its process ended"):
        verdict("5", "5")
