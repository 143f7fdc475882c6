"""The folder of files for servers: who can read it, and that it goes with its run."""

import os
import stat
import subprocess
import sys
import time

import pytest

from gmpo.rollout.vllm.transfer import folder
from gmpo.rollout.vllm.transfer.folder import ExchangeFolder, remove_leftovers


def mode(path):
    return stat.S_IMODE(path.stat().st_mode)


def aged(path):
    """Make a folder look older than the seconds in which it may lack its lock."""
    os.utime(path, (time.time() - 3600,) * 2)


def test_in_shared_memory_only_this_user_can_read(tmp_path, monkeypatch):
    tmp_path.chmod(0o777)
    monkeypatch.setattr(folder, "memory_folder", lambda: str(tmp_path))
    it = ExchangeFolder(None)
    assert mode(it.path) == 0o700
    with it.file("weights.safetensors") as path:
        assert mode(path) == 0o600


@pytest.mark.parametrize(("parent", "file"), [(0o755, 0o644), (0o770, 0o660)])
def test_a_given_folder_says_who_can_read(tmp_path, parent, file):
    tmp_path.chmod(parent)
    it = ExchangeFolder(str(tmp_path))
    adapter = it.subfolder("adapter")
    (adapter / "weights").touch(mode=0o600)
    it.share(adapter)
    assert mode(it.path) == mode(adapter) == parent
    assert mode(adapter / "weights") == file


def test_files_are_gone_after_their_use_and_the_folder_with_the_run(tmp_path):
    it = ExchangeFolder(str(tmp_path))
    with it.file("weights.safetensors") as path:
        path.write_bytes(b"1")
    assert not path.exists() and it.path.exists()
    first = it.path
    it.close()
    assert list(tmp_path.iterdir()) == []
    assert it.path != first  # used again after a server was lost


def test_what_a_killed_run_has_left_is_removed_by_the_next(tmp_path):
    program = (
        "import os, sys; from gmpo.rollout.vllm.transfer.folder import ExchangeFolder;"
        "it = ExchangeFolder(sys.argv[1]); (it.path / 'weights.safetensors').touch();"
        "os.kill(os.getpid(), 9)"
    )
    subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=False)
    (left,) = tmp_path.iterdir()
    assert (left / "weights.safetensors").exists()
    aged(left)
    it = ExchangeFolder(str(tmp_path))
    made = it.path
    assert list(tmp_path.iterdir()) == [made]


def test_folders_of_runs_that_live_and_of_others_are_left_alone(tmp_path):
    living = ExchangeFolder(str(tmp_path))
    aged(living.path)
    other = tmp_path / "gmpo-weights-another-host-x"
    other.mkdir()
    aged(other)
    young = tmp_path / f"{folder.prefix()}young"
    young.mkdir()
    remove_leftovers(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {living.path.name, other.name, young.name}
