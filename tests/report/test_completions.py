import json
import logging
import sys
from types import SimpleNamespace

import numpy
import pyarrow.parquet as parquet
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from gmpo.report.completions import CompletionLog, CompletionRecords
from gmpo.report.parquet import as_column, as_text
from gmpo.report.settings import ReportSettings

# Argument types differ from call to call, and one has none: no structure of parquet holds them.
TOOL_CALLS = [
    {"function": {"name": "add", "arguments": {"a": 1, "b": "two"}}},
    {"function": {"name": "now", "arguments": {}}},
]


def scored(count=2, *, prompts=None, rewards=None, **extras):
    return CompletionRecords(
        prompts=prompts or [f"prompt {i // 2}" for i in range(count)],
        completions=[f"completion {i}" for i in range(count)],
        rewards=rewards or {"exact": [float(i) for i in range(count)]},
        advantages=[i - 0.5 for i in range(count)],
        extras=extras,
    )


@pytest.fixture
def log(tmp_path):
    def make(*, num_completions_to_print=0, **options):
        trackers, callbacks = options.pop("trackers", ()), options.pop("callbacks", ())
        settings = ReportSettings(
            **{
                "log_completions": True,
                "num_completions_to_print": num_completions_to_print,
                **options,
            }
        )
        return CompletionLog(
            settings, str(tmp_path), trackers=trackers, callbacks=lambda: callbacks
        )

    return make


@pytest.fixture
def warnings_seen():
    """The messages that gmpo logs as warnings (transformers' loggers do not propagate)."""
    seen = []
    handler = logging.Handler()
    handler.emit = lambda record: seen.append(record.getMessage())
    logger = logging.getLogger("gmpo.report.completions")
    logger.addHandler(handler)
    yield seen
    logger.removeHandler(handler)


def read(tmp_path, name):
    return parquet.read_table(tmp_path / "completions" / name).to_pylist()


def test_a_file_holds_every_completion_since_the_last_log_with_its_scores(log, tmp_path):
    completions = log()
    completions.add(scored(2, source=["web", None]), step=3)
    completions.add(scored(1, rewards={"exact": [float("nan")], "judge": [0.25]}), step=4)
    completions.write(step=5)
    assert read(tmp_path, "train_000005.parquet") == [
        {
            "step": 3,
            "mode": "train",
            "prompt": "prompt 0",
            "completion": "completion 0",
            "exact": 0.0,
            "source": "web",
            "advantage": -0.5,
            "judge": None,
        },
        {
            "step": 3,
            "mode": "train",
            "prompt": "prompt 0",
            "completion": "completion 1",
            "exact": 1.0,
            "source": None,
            "advantage": 0.5,
            "judge": None,
        },
        {
            "step": 4,
            "mode": "train",
            "prompt": "prompt 0",
            "completion": "completion 0",
            "exact": None,
            "source": None,
            "advantage": -0.5,
            "judge": 0.25,
        },
    ]


def test_train_and_eval_of_one_step_are_two_files(log, tmp_path):
    completions = log()
    completions.add(scored(1), step=7)
    completions.add(scored(2), step=7, mode="eval")
    completions.write(step=7)
    completions.write(step=7, mode="eval")
    assert [row["mode"] for row in read(tmp_path, "train_000007.parquet")] == ["train"]
    assert [row["mode"] for row in read(tmp_path, "eval_000007.parquet")] == ["eval", "eval"]


def test_two_evaluation_sets_of_one_step_are_two_files(log, tmp_path):
    completions = log()
    for label, count in (("eval_math", 1), ("eval_code", 2)):
        completions.add(scored(count), step=7, mode="eval")
        completions.write(step=7, mode="eval", label=label)
    assert len(read(tmp_path, "eval_math_000007.parquet")) == 1
    assert len(read(tmp_path, "eval_code_000007.parquet")) == 2


def test_messages_with_tool_calls_are_json(log, tmp_path):
    messages = [
        {"role": "assistant", "content": None, "tool_calls": TOOL_CALLS},
        {"role": "tool", "content": "3"},
    ]
    completions = log(num_completions_to_print=None)
    rows = scored(2, prompts=[[{"role": "user", "content": "1 + 2?"}]] * 2)
    rows.completions = [
        messages,
        [{"role": "assistant", "content": [{"type": "text", "text": "3"}]}],
    ]
    completions.add(rows, step=1)
    completions.write(step=1)
    written = read(tmp_path, "train_000001.parquet")
    assert json.loads(written[0]["prompt"]) == [{"role": "user", "content": "1 + 2?"}]
    assert json.loads(written[0]["completion"]) == messages
    assert json.loads(written[1]["completion"])[0]["content"] == [{"type": "text", "text": "3"}]


@pytest.mark.parametrize(
    ("values", "column"),
    [
        ([1, 2.5, None], [1.0, 2.5, None]),
        ([True, None], [True, None]),
        ([True, 2], ["true", "2"]),
        ([1, "one", None], ["1", "one", None]),
        ([{"a": {}}, {}], ['{"a": {}}', "{}"]),
        ([[1, "x"], None], ['[1, "x"]', None]),
        ([2**70, 1], [str(2**70), "1"]),
        ([torch.tensor(2.0), numpy.int64(3)], [2.0, 3.0]),
        ([{(1, 2): 3}], ["{(1, 2): 3}"]),
        ([None, None], [None, None]),
    ],
)
def test_an_extra_column_keeps_its_type_where_parquet_has_it_and_is_text_elsewhere(
    log, tmp_path, values, column
):
    completions = log()
    completions.add(scored(len(values), extra=values), step=1)
    completions.write(step=1)
    written = [row["extra"] for row in read(tmp_path, "train_000001.parquet")]
    assert written == column
    assert [type(value) for value in written] == [type(value) for value in column]


def test_a_cycle_and_a_lone_surrogate_become_text():
    cycle = []
    cycle.append(cycle)
    assert as_text(cycle) == "[[...]]"
    assert as_text("a\ud800b") == "a?b"
    assert as_column([{"x": object}]) == [f'{{"x": "{object!r}"}}']


def test_a_source_named_like_a_column_of_ours_overwrites_nothing(log, tmp_path):
    completions = log()
    completions.add(scored(1, rewards={"advantage": [9.0]}, prompt=["extra"]), step=1)
    completions.write(step=1)
    row = read(tmp_path, "train_000001.parquet")[0]
    assert (row["advantage"], row["reward/advantage"], row["prompt"], row["extra/prompt"]) == (
        -0.5,
        9.0,
        "prompt 0",
        "extra",
    )


def test_no_file_appears_unless_it_is_whole(log, tmp_path, monkeypatch, warnings_seen):
    def half(table, path, **options):
        path.write_bytes(b"PAR1")
        raise OSError("disk full")

    monkeypatch.setattr(parquet, "write_table", half)
    completions = log()
    completions.add(scored(1), step=1)
    completions.write(step=1)
    assert list((tmp_path / "completions").glob("*.parquet")) == []
    assert warnings_seen == [
        "Could not write the completions: OSError: disk full. The training goes on."
    ]


def test_columns_of_different_lengths_warn_and_spoil_nothing_else(log, tmp_path, warnings_seen):
    completions = log()
    completions.add(scored(2, extra=[1]), step=1)
    completions.add(scored(1), step=1)
    completions.write(step=1)
    assert len(read(tmp_path, "train_000001.parquet")) == 1
    assert "Could not keep the completions" in warnings_seen[0]


def test_switched_off_nothing_is_kept_or_written(log, tmp_path):
    completions = log(log_completions=False)
    completions.add(scored(1), step=1)
    assert completions.state_dict()["pending"] == {}
    completions.write(step=1)
    assert list(tmp_path.iterdir()) == []


def test_the_console_shows_as_many_rows_as_asked_for_as_people_read_them(log, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    rows = scored(8, prompts=[[{"role": "user", "content": "[bold]why[/bold]"}]] * 8)
    completions = log(num_completions_to_print=3)
    completions.add(rows, step=4)
    completions.write(step=4)
    shown = capsys.readouterr().out
    assert shown.count("user: [bold]why[/bold]") == 3
    assert "train, step 4" in shown


@pytest.mark.parametrize(("count", "rows"), [(0, 0), (None, 4), (9, 4)])
def test_zero_prints_nothing_and_none_prints_all(log, capsys, count, rows):
    completions = log(num_completions_to_print=count)
    completions.add(scored(4), step=4)
    completions.write(step=4)
    shown = capsys.readouterr().out
    assert sum(f"completion {i}" in shown for i in range(4)) == rows
    assert bool(shown) == (rows > 0)


def test_pending_rows_survive_a_resume(log, tmp_path):
    interrupted, resumed = log(), log()
    interrupted.add(scored(2), step=1)
    resumed.load_state_dict(json.loads(json.dumps(interrupted.state_dict())))
    resumed.add(scored(1), step=2)
    resumed.write(step=2)
    assert [row["step"] for row in read(tmp_path, "train_000002.parquet")] == [1, 1, 2]


def test_resuming_from_step_2_drops_the_files_after_it(log, tmp_path):
    completions = log()
    for step in (1, 2, 3):
        completions.add(scored(1), step=step)
        completions.write(step=step)
    completions.begin(2)
    files = sorted(file.name for file in (tmp_path / "completions").iterdir())
    assert files == ["train_000001.parquet", "train_000002.parquet"]


def test_tensorboard_gets_a_text_table_of_one_completion_per_prompt(log):
    written = []
    writer = SimpleNamespace(add_text=lambda *arguments: written.append(arguments))
    callbacks = [
        SimpleNamespace(),
        SimpleNamespace(tb_writer=None),
        SimpleNamespace(tb_writer=writer),
    ]
    completions = log(trackers=["tensorboard"], callbacks=callbacks, log_unique_prompts=True)
    completions.add(scored(4), step=2, mode="eval")
    completions.write(step=2, mode="eval")
    assert [(name, step) for name, _, step in written] == [("eval_completions", 2)]
    lines = written[0][1].splitlines()
    assert lines[0] == "| step | mode | prompt | completion | exact | advantage |"
    assert lines[2:] == [
        "| 2 | eval | prompt 0 | completion 0 | 0.00 | -0.50 |",
        "| 2 | eval | prompt 1 | completion 2 | 2.00 | 1.50 |",
    ]


def test_wandb_gets_a_table_where_a_run_is_on(log, monkeypatch):
    logged = []
    fake = SimpleNamespace(
        run=object(), Table=lambda columns, data: (columns, data), log=logged.append
    )
    monkeypatch.setitem(sys.modules, "wandb", fake)
    completions = log(trackers=["wandb"])
    completions.add(scored(1), step=2)
    completions.write(step=2)
    columns = ["step", "mode", "prompt", "completion", "exact", "advantage"]
    table = (columns, [[2, "train", "prompt 0", "completion 0", 0.0, -0.5]])
    assert logged == [{"completions": table, "train/global_step": 2}]


def test_trackio_gets_a_table_it_can_store(log, monkeypatch):
    import trackio

    logged = []
    monkeypatch.setattr(trackio, "log", logged.append)
    completions = log(trackers=["trackio"])
    completions.add(scored(1), step=2)
    completions.write(step=2)
    table = logged[0]["completions"]
    assert isinstance(table, trackio.Table)
    assert [row["completion"] for row in table.data] == ["completion 0"]


def test_a_tracker_that_fails_is_a_warning(log, warnings_seen, tmp_path, monkeypatch):
    def unreachable(entry):
        raise ConnectionError("no route")

    fake = SimpleNamespace(run=object(), Table=lambda columns, data: None, log=unreachable)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    completions = log(trackers=["wandb"])
    completions.add(scored(1), step=2)
    completions.write(step=2)
    assert warnings_seen == [
        "Could not send the completions to wandb: ConnectionError: no route. The training goes on."
    ]
    assert len(read(tmp_path, "train_000002.parquet")) == 1


def test_the_hub_gets_the_folder_and_a_last_upload_when_closed(log, tmp_path, monkeypatch):
    import threading

    import huggingface_hub

    made, done = [], []

    class Scheduler:
        def __init__(self, **options):
            made.append(options)
            self.lock = threading.Lock()

        def trigger(self):
            done.append("upload")
            return SimpleNamespace(result=lambda: None)

        def stop(self):
            done.append("stop")

    monkeypatch.setattr(huggingface_hub, "CommitScheduler", Scheduler)
    completions = log(log_completions_hub_repo="me/run")
    for step in (1, 2):
        completions.add(scored(1), step=step)
        completions.write(step=step)
    completions.close()
    assert [(m["repo_id"], m["repo_type"], m["folder_path"]) for m in made] == [
        ("me/run", "dataset", tmp_path / "completions")
    ]
    assert done == ["upload", "stop"]


def test_a_hub_that_is_out_of_reach_leaves_the_local_file(
    log, tmp_path, monkeypatch, warnings_seen
):
    import huggingface_hub

    def unreachable(**options):
        raise ConnectionError("no route")

    monkeypatch.setattr(huggingface_hub, "CommitScheduler", unreachable)
    completions = log(log_completions_hub_repo="me/run")
    completions.add(scored(1), step=1)
    completions.write(step=1)
    completions.close()
    assert len(read(tmp_path, "train_000001.parquet")) == 1
    assert "Could not upload the completions to me/run" in warnings_seen[0]


def _write_on_two_ranks(rank, folder):
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2
    )
    completions = CompletionLog(
        ReportSettings(log_completions=True, num_completions_to_print=0), str(folder)
    )
    completions.add(scored(2, prompts=[f"of rank {rank}"] * 2), step=1)
    completions.write(step=1)
    dist.destroy_process_group()


def test_the_first_rank_writes_the_completions_of_all_ranks(tmp_path):
    spawn = mp.spawn  # pyright: ignore[reportPrivateImportUsage] (torch lists no names)
    spawn(_write_on_two_ranks, args=(tmp_path,), nprocs=2)
    prompts = [row["prompt"] for row in read(tmp_path, "train_000001.parquet")]
    assert prompts == ["of rank 0", "of rank 0", "of rank 1", "of rank 1"]
