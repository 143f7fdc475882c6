import json
from types import SimpleNamespace

import pytest
import torch

from gmpo.report.jsonl import JsonlCallback, read_records


@pytest.fixture
def run(tmp_path):
    """Drives the callback as the Trainer does: `run(step, **logs)`; `run.begin(step)`."""
    callback = JsonlCallback()
    args = SimpleNamespace(output_dir=str(tmp_path / "out"))

    def log(step, *, first_rank=True, **logs):
        callback.on_log(
            args,
            SimpleNamespace(global_step=step, is_world_process_zero=first_rank),
            None,
            logs=logs,
        )

    def begin(step):
        callback.on_train_begin(
            args, SimpleNamespace(global_step=step, is_world_process_zero=True), None
        )

    log.begin, log.path = begin, tmp_path / "out" / "metrics.jsonl"
    return log


def test_every_log_is_one_json_line_at_once(run):
    run(10, reward=0.5, epoch=0.1)
    assert run.path.read_text() == '{"step": 10, "reward": 0.5, "epoch": 0.1}\n'
    run(20, reward=0.75)
    assert [json.loads(line)["reward"] for line in run.path.read_text().splitlines()] == [0.5, 0.75]


def test_figures_that_are_not_finite_are_null(run):
    run(
        1,
        a=float("nan"),
        b=float("inf"),
        c=-float("inf"),
        d=torch.tensor(2.0),
        e=torch.tensor(float("nan")),
    )
    line = run.path.read_text()
    assert json.loads(line, parse_constant=pytest.fail) == {
        "step": 1,
        "a": None,
        "b": None,
        "c": None,
        "d": 2.0,
        "e": None,
    }


def test_only_the_first_rank_writes(run):
    run(1, first_rank=False, reward=1.0)
    assert not run.path.exists()


def test_resuming_from_step_20_drops_the_lines_after_20(run):
    for step in (10, 20, 30):
        run(step, reward=step / 10)
    run.begin(20)
    run(30, reward=30.0)
    assert [(record["step"], record["reward"]) for record in read_records(run.path)] == [
        (10, 1.0),
        (20, 2.0),
        (30, 30.0),
    ]


def test_a_line_cut_short_by_a_crash_is_dropped_on_resume_and_when_read(run):
    run(10, reward=1.0)
    with run.path.open("a") as file:
        file.write('{"step": 11, "rew')
    assert [record["step"] for record in read_records(run.path)] == [10]
    run.begin(10)
    run(11, reward=2.0)
    assert [json.loads(line)["step"] for line in run.path.read_text().splitlines()] == [10, 11]


def test_the_closing_line_is_dropped_when_a_run_goes_on(run):
    run(10, reward=1.0)
    run(10, train_runtime=3.0)
    run.begin(10)
    assert [record.get("reward") for record in read_records(run.path)] == [1.0]


def test_an_evaluation_before_the_first_step_stays_with_the_run_that_follows(run):
    run(0, eval_reward=0.25)
    run.begin(0)
    run(1, reward=2.0)
    assert [record["step"] for record in read_records(run.path)] == [0, 1]


def test_a_log_after_a_cut_line_is_not_lost_with_it(run):
    run(10, reward=1.0)
    with run.path.open("a") as file:
        file.write('{"step": 11, "rew')
    run(12, reward=2.0)  # evaluate() in a new process, without a training run that would tidy up
    assert [record["step"] for record in read_records(run.path)] == [10, 12]
