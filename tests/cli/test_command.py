import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import gmpo
from gmpo.cli import main as cli


def python(*arguments):
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True)


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["no-such-command"], []])
def test_nothing_heavy_is_imported_before_a_command_runs(arguments):
    code = f"""
import sys
from gmpo.cli.main import main
try:
    main({arguments})
except SystemExit:
    pass
heavy = {{"torch", "transformers", "datasets", "accelerate", "numpy", "yaml", "rich", "gmpo.config"}}
print("imported:", sorted(heavy & set(sys.modules)))
"""
    assert python("-c", code).stdout.splitlines()[-1] == "imported: []"


def test_help_names_every_command_and_version_the_version():
    assert all(name in python("-m", "gmpo.cli", "--help").stdout for name in cli.COMMANDS)
    assert python("-m", "gmpo.cli", "--version").stdout.strip() == f"gmpo {gmpo.__version__}"


def test_an_unknown_command_is_refused_with_the_closest_one(capsys):
    assert cli.main(["trian"]) == 2
    assert capsys.readouterr().err == "gmpo has no command 'trian'. Did you mean 'train'?\n"


@pytest.fixture
def command(monkeypatch, tmp_path):
    """Makes the command "made_up" out of source code, as if it stood in a file of gmpo's or of a user's."""

    def make(source, *, file="cli/made_up.py", of_user=False):
        folder = tmp_path if of_user else Path(gmpo.__file__).parent
        namespace = {}
        exec(compile(source, str(folder / file), "exec"), namespace)
        monkeypatch.setitem(cli.COMMANDS, "made_up", "")
        monkeypatch.setitem(sys.modules, "gmpo.cli.made_up", SimpleNamespace(run=namespace["run"]))

    return make


@pytest.mark.parametrize("error", ["ValueError", "FileNotFoundError", "ImportError"])
def test_what_the_user_can_fix_is_one_message_and_status_2(command, capsys, error):
    command(f"def run(arguments): raise {error}('set it to ' + arguments[0])")
    assert cli.main(["made_up", "7"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines()[0] == "gmpo made_up: set it to 7"
    assert "Traceback" not in err


def test_notes_on_an_error_are_shown(command, capsys):
    command(
        "def run(arguments):\n  error = ValueError('no')\n  error.add_note('It is over there.')\n  raise error"
    )
    cli.main(["made_up"])
    assert "It is over there." in capsys.readouterr().err


def test_debug_shows_the_traceback(command):
    command("def run(arguments): raise ValueError('no')")
    with pytest.raises(ValueError, match="no"):
        cli.main(["--debug", "made_up"])


def test_a_defect_keeps_its_traceback(command):
    command("def run(arguments): {}['missing']")
    with pytest.raises(KeyError):
        cli.main(["made_up"])


def test_an_error_of_the_users_own_code_keeps_its_traceback(command):
    command("def run(arguments): int('seven')", of_user=True)
    with pytest.raises(ValueError, match="seven"):
        cli.main(["made_up"])


def test_an_error_of_another_package_keeps_its_traceback_once_the_training_runs(command):
    source = "import json\ndef {0}(): json.loads('{{')\ndef run(arguments): {0}()"
    command(source.format("prepare"))
    assert cli.main(["made_up"]) == 2
    command(source.format("train"), file="trainer.py")
    with pytest.raises(ValueError, match="property name"):
        cli.main(["made_up"])


def test_an_error_of_gmpo_itself_while_training_is_told_by_its_message(command):
    command("def train(): raise ValueError('no')\ndef run(arguments): train()", file="trainer.py")
    assert cli.main(["made_up"]) == 2


def test_what_becomes_of_a_server_is_told_by_its_message(command, capsys):
    fault = "from gmpo.rollout.vllm.errors import VllmError"
    command(
        f"{fault}\ndef train(): raise VllmError('no server')\ndef run(arguments): train()",
        file="trainer.py",
    )
    assert cli.main(["made_up"]) == 2
    assert "Traceback" not in capsys.readouterr().err


def test_env_prints_a_version_for_each_package_and_the_device(capsys):
    assert cli.main(["env"]) == 0
    lines = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    import torch

    assert lines["torch"] == torch.__version__
    assert {
        "python",
        "gmpo",
        "transformers",
        "accelerate",
        "datasets",
        "peft",
        "vllm",
        "device",
    } <= lines.keys()


def test_env_refuses_arguments(capsys):
    assert cli.main(["env", "--all"]) == 2
    assert "takes no arguments" in capsys.readouterr().err


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_has_a_help_that_needs_nothing_heavy(name):
    code = f"""
import sys
from gmpo.cli.main import main
main([{name!r}, "--help"])
print("imported:", sorted({{"torch", "transformers", "datasets", "vllm"}} & set(sys.modules)))
"""
    lines = python("-c", code).stdout.splitlines()
    assert lines[-1] == "imported: []"
    assert f"gmpo {name}" in lines[0]


def test_a_mistyped_option_is_answered_without_heavy_imports():
    code = """
import sys
from gmpo.cli.main import main
status = main(["train", "--num_generation", "4"])
print(status, sorted({"torch", "transformers", "datasets"} & set(sys.modules)))
"""
    result = python("-c", code)
    assert result.stdout == "2 []\n"
    assert "no option --num_generation. Did you mean '--num_generations'?" in result.stderr


def test_the_help_knows_every_option_and_default():
    """It reads them in the source; here are the classes themselves."""
    from dataclasses import MISSING, fields

    from gmpo.cli import help
    from gmpo.cli.parse import known_options
    from gmpo.config import GMPOConfig

    assert known_options(GMPOConfig) <= help.option_names()
    shown = help.overridden()
    for field in fields(GMPOConfig):
        if field.name in shown and field.default is not MISSING:
            assert shown[field.name] == field.default, field.name


def test_notes_speak_the_language_of_the_command_line(command, capsys):
    note = "What was learned is in out/checkpoint-3; train(resume_from_checkpoint=True) goes on."
    command(
        f"def run(arguments):\n    error = ValueError('no')\n    error.add_note({note!r})\n    raise error"
    )
    assert cli.main(["made_up"]) == 2
    assert "checkpoint-3; --resume latest goes on." in capsys.readouterr().err
