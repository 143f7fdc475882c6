"""Which checkpoint a resume takes, what moves aside, what is deleted, who may train in a folder."""

import contextlib
import os
import subprocess
import sys

import pytest
import torch

from gmpo.run import checkpoint
from gmpo.run.checkpoint import (
    DamagedCheckpoint,
    check_whole,
    finish_checkpoint,
    move_into_place,
)
from gmpo.run.folder import RunFolder, refuse_folder_of_model


@pytest.fixture
def folder(tmp_path):
    run = RunFolder(tmp_path / "out")
    run.begin()
    return run


def save(folder, step, **facts):
    """Write a small checkpoint of the folder's run."""
    path = folder.checkpoint(step)
    path.mkdir(parents=True)
    (path / "weights").write_bytes(bytes([step]) * 100)
    finish_checkpoint(path, {"run": folder.run, "step": step, **facts})
    return path


def names(path):
    return sorted(entry.name for entry in path.iterdir())


def test_the_newest_whole_checkpoint_is_taken(folder):
    for step in (2, 10, 4):
        save(folder, step)
    assert folder.newest_whole()[0] == str(folder.checkpoint(10))


HARM = {
    "missing": lambda file: file.unlink(),
    "empty": lambda file: file.write_bytes(b""),
    "a byte less": lambda file: file.write_bytes(file.read_bytes()[:-1]),
    "a flipped bit": lambda file: file.write_bytes(
        bytes([file.read_bytes()[0] ^ 1]) + file.read_bytes()[1:]
    ),
}


@pytest.mark.parametrize("harm", HARM)
@pytest.mark.parametrize("name", ["weights", "gmpo_manifest.json"])
def test_a_damaged_one_is_named_and_the_one_before_taken(folder, caplog, harm, name):
    save(folder, 2)
    HARM[harm](save(folder, 4) / name)
    assert folder.newest_whole()[0] == str(folder.checkpoint(2))
    assert name in caplog.text and "checkpoint-4" in caplog.text


def test_a_damaged_one_asked_for_by_name_is_refused_with_another(folder):
    save(folder, 2)
    path = save(folder, 4)
    HARM["a flipped bit"](path / "weights")
    with pytest.raises(
        DamagedCheckpoint, match=r"weights in .*checkpoint-4.* is damaged"
    ) as caught:
        folder.named(path)
    assert "checkpoint-2" in caught.value.__notes__[0]


def test_a_checkpoint_of_the_model_alone_is_refused(folder):
    save(folder, 2, resumable=False)
    with pytest.raises(ValueError, match="save_only_model"):
        folder.newest_whole()


def test_other_names_and_other_runs_are_passed_over(folder):
    save(folder, 2)
    (folder.path / "checkpoint-best").mkdir()
    (folder.path / "checkpoint-4-backup").mkdir()
    path = folder.checkpoint(8)
    path.mkdir()
    finish_checkpoint(path, {"run": "another", "step": 8})
    assert folder.newest_whole()[0] == str(folder.checkpoint(2))


def test_fresh_runs_move_all_of_the_earlier_ones_aside_numbered(folder):
    for number in (1, 2):
        save(folder, number)
        (folder.path / "metrics.jsonl").write_text('{"step": 1, "reward": 1.0}\n')
        (folder.path / "completions").mkdir()
        (folder.path / "model.safetensors").write_bytes(bytes([number]))
        (folder.path / "mine.txt").write_text("not the run's")
        folder.begin()
        aside = folder.path / f"_earlier_{number}"
        assert (aside / "model.safetensors").read_bytes() == bytes([number])
        assert names(aside) == [
            f"checkpoint-{number}",
            "completions",
            "gmpo_run.json",
            "metrics.jsonl",
            "model.safetensors",
        ]
    assert names(folder.path) == ["_earlier_1", "_earlier_2", "gmpo_run.json", "mine.txt"]


def test_an_evaluation_before_the_first_step_does_not_move(tmp_path):
    folder = RunFolder(tmp_path)
    (tmp_path / "metrics.jsonl").write_text('{"step": 0, "eval_reward": 1.0}\n')
    folder.begin()
    assert (tmp_path / "metrics.jsonl").exists()


def test_going_back_moves_later_checkpoints_aside(folder):
    for step in (2, 4, 6):
        save(folder, step)
    run = folder.run
    assert folder.resume(*folder.named(folder.checkpoint(2))) == run
    assert folder.steps() == [2]
    assert names(folder.path / "_earlier_1") == ["checkpoint-4", "checkpoint-6"]


def test_a_checkpoint_from_elsewhere_begins_a_run(folder, tmp_path):
    path = save(folder, 2)
    other = RunFolder(tmp_path / "other")
    assert other.resume(*other.named(path)) != folder.run
    assert check_whole(path)


@pytest.mark.parametrize(
    ("limit", "best", "left"),
    [
        (None, None, [1, 2, 3, 4]),
        (2, None, [3, 4]),
        (1, None, [4]),
        (1, 2, [2, 4]),
        (3, 1, [1, 3, 4]),
    ],
)
def test_the_oldest_go_but_never_the_best_nor_the_newest(folder, limit, best, left):
    for step in (1, 2, 3, 4):
        save(folder, step)
    folder.keep_newest(limit, best=str(folder.checkpoint(best)) if best else None)
    assert folder.steps() == left


def test_folders_that_are_not_whole_push_out_none_that_are(folder):
    save(folder, 1)
    folder.checkpoint(2).mkdir()
    folder.checkpoint(3).mkdir()
    folder.keep_newest(1, best=None)
    assert folder.steps() == [1, 2, 3]


def test_a_checkpoint_finished_before_a_crash_comes_into_its_place(folder):
    path = save(folder, 4)
    folder.unfinished.mkdir()
    path.rename(folder.unfinished / "checkpoint-4")
    assert folder.newest_whole()[0] == str(folder.checkpoint(4))
    assert not folder.unfinished.exists()


class Killed(BaseException):
    pass


def kill_before(monkeypatch, number):
    """Raise before the given operation on files, counted from 1; return the operations so far."""
    done = []

    def counted(name, operation):
        def run(*arguments, **keywords):
            done.append(name)
            if len(done) == number:
                raise Killed
            return operation(*arguments, **keywords)

        return run

    for owner, name in (
        (os, "replace"),
        (checkpoint, "_sync"),
        (checkpoint.shutil, "rmtree"),
        (checkpoint.Path, "write_text"),
        (checkpoint.Path, "unlink"),
    ):
        monkeypatch.setattr(owner, name, counted(name, getattr(owner, name)))
    return done


def save_beside(folder, step):
    """Save as the trainer does: into the folder of unfinished ones, then into the place."""
    path = folder.unfinished / f"checkpoint-{step}"
    path.mkdir(parents=True)
    (path / "weights").write_bytes(bytes([step]) * 100)
    finish_checkpoint(path, {"run": folder.run, "step": step})
    move_into_place(path, folder.checkpoint(step))
    folder.keep_newest(1, best=None)


@pytest.mark.parametrize("earlier", [2, 4], ids=["another step", "the same step"])
def test_killed_before_any_operation_of_a_save_one_is_whole(tmp_path, monkeypatch, earlier):
    number, done = 0, [None]
    while len(done) > number - 1:
        number += 1
        folder = RunFolder(tmp_path / str(number))
        folder.begin()
        save(folder, earlier)
        with monkeypatch.context() as patch:
            done = kill_before(patch, number)
            with contextlib.suppress(Killed):
                save_beside(folder, 4)
        path, manifest = folder.newest_whole()
        assert manifest["step"] in (earlier, 4)
        assert (folder.path / path / "weights").read_bytes() == bytes([manifest["step"]]) * 100
        assert not list(folder.path.glob("_earlier*"))
        if len(done) < number:
            break
    assert number > 10


def test_a_folder_in_use_is_refused_to_another_process(folder):
    code = (
        "import sys; from gmpo.run.folder import RunFolder\n"
        "with RunFolder(sys.argv[1]).locked(): pass"
    )
    command = [sys.executable, "-c", code, str(folder.path)]
    with folder.locked():
        refused = subprocess.run(command, capture_output=True, text=True)
    assert f"Another process (process {os.getpid()} on" in refused.stderr
    assert subprocess.run(command).returncode == 0


def test_the_command_line_tells_of_a_folder_in_use_by_a_message(folder):
    code = (
        "import sys, gmpo.cli.train; from gmpo.cli.main import main\n"
        "from gmpo.run.folder import RunFolder\n"
        "gmpo.cli.train.run = lambda _: RunFolder(sys.argv[1]).locked().__enter__()\n"
        "sys.exit(main(['train']))"
    )
    command = [sys.executable, "-c", code, str(folder.path)]
    with folder.locked():
        refused = subprocess.run(command, capture_output=True, text=True)
    assert refused.returncode == 2
    assert refused.stderr.startswith("gmpo train: Another process")
    assert "Traceback" not in refused.stderr


@pytest.mark.parametrize("inside", [".", "checkpoint-4"])
def test_the_folder_of_the_model_itself_is_refused(tmp_path, inside):
    (tmp_path / inside).mkdir(exist_ok=True)
    with pytest.raises(ValueError, match="overwrite"):
        refuse_folder_of_model(str(tmp_path / inside), str(tmp_path))
    refuse_folder_of_model(str(tmp_path), str(tmp_path / "run"))


def test_state_comes_back_as_it_was_saved(tmp_path):
    from gmpo.run.checkpoint import load_state, save_state

    state = {"a": {"x": [1, None, 2.5, "t", [True]], "y": torch.arange(3), "z": torch.tensor(0.1)}}
    save_state(state, tmp_path, "state")
    back = load_state(tmp_path, "state")
    assert torch.equal(back["a"].pop("y"), state["a"].pop("y"))
    assert back == {"a": {"x": [1, None, 2.5, "t", [True]], "z": float(torch.tensor(0.1))}}
