import signal
import threading

import pytest

from gmpo.reward.math_judge import MathJudge

pytest.importorskip("math_verify")
FOR_EVER = "\\boxed{9^{9^{9^{9}}}}"


@pytest.fixture(scope="module")
def judge():
    judge = MathJudge(timeout_s=60)
    yield judge
    judge.close()


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
def test_answers_are_compared_as_mathematics(judge, gold, text, expected):
    assert judge.verdict(gold, text) is expected


def test_what_never_ends_is_wrong_and_the_next_answer_is_judged_again(caplog):
    judge = MathJudge(timeout_s=1)
    try:
        assert judge.verdict("5", FOR_EVER) is False
        assert "no answer within 1 s" in caplog.text
        judge.timeout_s = 60
        assert judge.verdict("5", "\\boxed{5}") is True
    finally:
        judge.close()


def test_a_child_that_died_meanwhile_costs_one_answer_at_most():
    judge = MathJudge(timeout_s=60)
    try:
        assert judge.verdict("5", "5") is True
        judge._child.kill()
        judge._child.wait()
        judge.verdict("5", "5")
        assert judge.verdict("5", "5") is True
    finally:
        judge.close()


def test_an_interrupted_question_does_not_leave_its_answer_to_the_next():
    class Interrupted:
        closed = True

        def readline(self):
            raise KeyboardInterrupt

    judge = MathJudge(timeout_s=60)
    try:
        judge.verdict("5", "5")
        answers, judge._child.stdout = judge._child.stdout, Interrupted()
        with answers, pytest.raises(KeyboardInterrupt):
            judge.verdict("5", "5")
        assert judge.verdict("5", "6") is False
    finally:
        judge.close()


def test_threads_share_the_judge_and_get_their_own_answers(judge):
    results = {}

    def ask(i):
        results[i] = [judge.verdict(str(i), f"\\boxed{{{n}}}") for n in range(8)]

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {i: [n == i for n in range(8)] for i in range(8)}


def test_the_alarm_of_the_caller_is_left_alone(judge):
    def handler(*_):
        pytest.fail("not due yet")

    before = signal.signal(signal.SIGALRM, handler)
    signal.alarm(1000)
    try:
        judge.verdict("5", "\\boxed{5}")
        assert signal.alarm(0) > 900
        assert signal.getsignal(signal.SIGALRM) is handler
    finally:
        signal.signal(signal.SIGALRM, before)


def test_a_child_that_can_t_start_is_an_error_and_not_a_wrong_answer(monkeypatch):
    monkeypatch.setattr("sys.executable", "/bin/false")
    with pytest.raises(RuntimeError, match="did not start"):
        MathJudge().verdict("5", "5")
