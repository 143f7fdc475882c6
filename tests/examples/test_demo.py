import json
import subprocess

import pytest

from examples import chain_sum, demo, smollm2
from tests.tiny import tiny_model, tiny_tokenizer


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """A tiny model takes the place of the real one."""
    folder = tmp_path / "tiny"
    tiny_model().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    monkeypatch.setattr(smollm2, "prepared", lambda cache: folder)
    return folder


def test_the_demo_trains_through_the_command_line_and_measures_twice(tiny, tmp_path, capsys):
    output = tmp_path / "run"
    demo.main(["--steps", "2", "--problems", "8", "--output", str(output)])
    accuracy = json.loads((output / "accuracy.json").read_text())
    nothing_right = {"exact": 0.0, "found": 0.0}  # the tiny model knows no digits
    assert accuracy == {"before": nothing_right, "after": nothing_right}
    records = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert (
        records[-1]["step"] == 2
        and "rewards/verifier/mean" in (output / "metrics.jsonl").read_text()
    )
    trained_on = {
        json.loads(line)["prompt"] for line in (output / "problems.jsonl").read_text().splitlines()
    }
    assert not trained_on & {problem["prompt"] for problem in chain_sum.held_out(8)}
    assert (output / "training_curves.png").read_bytes().startswith(b"\x89PNG")
    assert f'AutoModelForCausalLM.from_pretrained("{output}")' in capsys.readouterr().out


def test_a_training_that_fails_ends_the_demo_with_its_status(tiny, tmp_path, monkeypatch):
    failed = subprocess.CompletedProcess([], returncode=3)
    monkeypatch.setattr(demo.subprocess, "run", lambda command: failed)
    with pytest.raises(SystemExit) as stop:
        demo.main(["--problems", "1", "--output", str(tmp_path / "run")])
    assert stop.value.code == 3
    assert not (tmp_path / "run" / "accuracy.json").exists()


def test_rates_are_shares_of_all_answers():
    problems = [{"answer": "8"}, {"answer": "6"}, {"answer": "-2"}, {"answer": "151"}]
    assert demo.rates(["8", "The answer is 6.", "-2", "13"], problems) == {
        "exact": 0.5,
        "found": 0.75,
    }


@pytest.mark.parametrize("flag", ["--steps", "--problems"])
def test_counts_below_one_are_refused(flag, capsys):
    with pytest.raises(SystemExit):
        demo.parse([flag, "0"])
    assert "0 is below 1" in capsys.readouterr().err


def test_a_sample_is_one_line_however_long_the_answers():
    problems = [{"prompt": f"Answer with the number: {n} + 4 ="} for n in range(6)]
    long = "First,\nwe add " * 20
    header, *lines = demo.samples(problems, [long] * 6, ["8"] * 6).splitlines()
    assert header.split() == ["problem", "before", "after"]
    assert [line.split()[0] for line in lines] == ["0", "1", "2", "3", "4"]
    assert lines[0] == f"{'0 + 4 =':<12}{' '.join(long.split())[:57] + '...':<64}8"
