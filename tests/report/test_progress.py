import io
from types import SimpleNamespace

import pytest
from rich.console import Console

from gmpo.report.progress import ProgressLines, duration


class Run:
    """Drives the callback as the Trainer does, with a clock that is told what time it is."""

    def __init__(self, *, terminal=False, bar=True, max_steps=100, width=140):
        self.out, self.now = io.StringIO(), 0.0
        console = Console(
            file=self.out, force_terminal=terminal, width=width, soft_wrap=True, highlight=False
        )
        self.callback = ProgressLines(bar=bar, console=console, clock=lambda: self.now)
        self.max_steps = max_steps

    def call(self, event, step, *, first_rank=True, **kwargs):
        state = SimpleNamespace(
            global_step=step, max_steps=self.max_steps, is_world_process_zero=first_rank
        )
        getattr(self.callback, event)(None, state, None, **kwargs)

    def log(self, step, **kwargs):
        self.call(
            "on_log", step, logs={name.replace("__", "/"): value for name, value in kwargs.items()}
        )

    @property
    def lines(self):
        return self.out.getvalue().splitlines()


def test_a_log_is_one_line_under_its_headings():
    run = Run()
    run.call("on_train_begin", 0)
    run.now = 10.0
    run.log(
        5,
        loss=0.0,
        reward=0.625,
        completions__mean_length=31.46,
        completions__clipped_ratio=0.25,
        entropy=1.5,
        log_ratio__min=-0.41,
        log_ratio__max=0.27,
        clip_ratio__low_mean=0.013,
        clip_ratio__high_mean=0.002,
        grad_norm=0.8,
        num_tokens=1000.0,
    )
    headings, line = run.lines
    assert (
        " ".join(headings.split())
        == "step reward length cut off entropy log-ratio clipped -/+ grad tok/s left"
    )
    # 95 steps of 2 s are left
    assert (
        " ".join(line.split()) == "5/100 0.625 31.5 25% 1.500 -0.41 .. 0.27 1.3% / 0.2% 0.80 - 3:10"
    )
    assert len(line) == len(headings)


def test_tokens_per_second_are_those_since_the_last_log():
    run = Run()
    run.call("on_train_begin", 0)
    for now, tokens in ((10.0, 1000.0), (14.0, 9000.0)):
        run.now = now
        run.log(1, loss=0.0, reward=0.5, num_tokens=tokens)
    assert "2,000" in run.lines[-1]  # 8000 tokens in 4 s


def test_an_evaluation_between_two_logs_does_not_count_for_tokens_per_second():
    run = Run()
    run.call("on_train_begin", 0)
    run.now = 10.0
    run.log(1, loss=0.0, num_tokens=1000.0)
    run.now = 110.0
    run.log(1, eval_reward=0.5, eval_runtime=99.0)
    run.now = 113.0
    run.log(2, loss=0.0, num_tokens=9000.0)
    assert "2,000" in run.lines[-1]  # 8000 tokens in 103 - 99 s


def test_a_log_between_two_collections_shows_a_dash_where_nothing_was_sampled():
    run = Run()
    run.log(3, loss=0.0, entropy=1.5)
    assert run.lines[-1].split()[:5] == ["3/100", "-", "-", "-", "1.500"]


def test_a_narrow_terminal_gets_fewer_columns_and_no_broken_lines():
    run = Run(terminal=True, width=80, bar=False)
    run.log(3, loss=0.0, reward=0.5)
    assert max(len(line) for line in run.lines) <= 80
    assert "reward" in run.lines[0]
    assert "log-ratio" in run.lines[0]
    assert "grad" not in run.lines[0]


def test_the_time_left_counts_from_the_step_that_was_resumed_from():
    run = Run(max_steps=60)
    run.call("on_train_begin", 40)
    run.now = 30.0
    run.log(50, loss=0.0, reward=0.5)
    assert run.lines[-1].endswith("0:30")  # 10 steps in 30 s, 10 to go


def test_headings_come_again_after_25_lines():
    run = Run()
    run.call("on_train_begin", 0)
    for step in range(1, 27):
        run.log(step, loss=0.0, reward=0.5)
    assert [number for number, line in enumerate(run.lines) if line.startswith("step")] == [0, 26]


def test_each_evaluation_has_a_line_of_its_own():
    run = Run()
    run.log(5, eval_math_reward=0.5, eval_math_entropy=2.0, eval_math_runtime=1.0)
    assert run.lines[-1].split()[:2] == ["eval_math", "0.500"]
    assert "2.000" in run.lines[-1]


def test_logs_without_figures_of_completions_print_nothing():
    run = Run()
    run.log(5, train_runtime=3.0, train_loss=0.0)
    assert run.lines == []


def test_only_the_first_rank_prints():
    run = Run(terminal=True)
    for event in ("on_train_begin", "on_step_end", "on_train_end"):
        run.call(event, 1, first_rank=False)
    run.call("on_log", 1, first_rank=False, logs={"reward": 1.0})
    assert run.out.getvalue() == ""


def test_a_terminal_keeps_a_bar_below_the_lines_and_ends_without_it():
    run = Run(terminal=True)
    run.call("on_train_begin", 0)
    run.call("on_step_end", 40)
    run.callback._bar.refresh()
    assert "40/100" in run.out.getvalue()
    run.log(40, loss=0.0, reward=0.5)
    run.now = 75.0
    run.call("on_train_end", 100)
    assert run.callback._bar is None
    assert run.lines[-1].endswith("100 steps in 1:15.")


def test_without_the_bar_a_terminal_gets_lines_alone():
    run = Run(terminal=True, bar=False)
    run.call("on_train_begin", 0)
    run.call("on_step_end", 40)
    assert run.out.getvalue() == ""


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0:00"), (59.6, "1:00"), (3599, "59:59"), (3723, "1:02:03")]
)
def test_durations_read_as_on_a_clock(seconds, text):
    assert duration(seconds) == text
