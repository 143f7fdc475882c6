"""What the benchmarks write down, and which rounds count."""

import argparse

import pytest

from benchmarks import compare, programs
from benchmarks.loss import random_rows
from tests.tiny import tiny_model


def written(folder, name, text, label=""):
    return compare.report(
        name, f"About {name}.", text, argparse.Namespace(results=str(folder), label=label)
    )


def test_a_section_replaces_the_older_one_of_its_name_and_leaves_the_others(tmp_path, monkeypatch):
    monkeypatch.setattr(compare.sys, "argv", ["x", "--results", "/some/where", "--rounds", "2"])
    for name, text, label in (
        ("loss", "one", ""),
        ("step", "two", ""),
        ("step", "three", "long"),
        ("loss", "four", ""),
    ):
        path = written(tmp_path, name, text, label)
    (file,) = tmp_path.iterdir()
    assert file == path
    sections = compare.read_sections(file)
    assert list(sections) == ["loss", "step", "step, long"]
    assert [section.split("\n")[-2] for section in sections.values()] == ["four", "two", "three"]
    assert "python -m benchmarks.loss --rounds 2`" in sections["loss"]
    assert (
        file.read_text().startswith("# Measurements of ")
        and file.read_text().count("# Measurements") == 1
    )


def test_a_round_that_others_disturb_is_repeated_but_not_for_ever(monkeypatch):
    taken = iter([0.0, 1000.0, 0.0, 0.0])  # others' processor time before and after each try
    monkeypatch.setattr(compare, "others_seconds", lambda pid: next(taken))
    rounds = iter("ab")
    assert compare.undisturbed(lambda: next(rounds), 0, tries=3) == "b"
    always = iter(range(0, 10**9, 1000))
    monkeypatch.setattr(compare, "others_seconds", lambda pid: float(next(always)))
    rounds = iter("abc")
    assert compare.undisturbed(lambda: next(rounds), 0, tries=2) == "b"


def test_ratios_and_medians_are_those_of_the_sides():
    replies = {"gmpo": [{"seconds": s, "peak_bytes": 1e9} for s in (1.0, 3.0, 2.0)]}
    assert compare.seconds(replies, "gmpo") == "2 (1-3)"
    assert (
        compare.ratio(replies)
        == compare.seconds(replies, "peer")
        == compare.peak_share(replies)
        == "-"
    )
    replies["peer"] = [{"seconds": 5.0, "peak_bytes": 4e9}]
    assert compare.ratio(replies) == "2.50"
    assert compare.peak_share(replies) == "0.25"


def test_parts_of_a_step_count_inner_calls_once_and_add_up(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(programs, "clock", lambda: now[0])
    parts = programs.Parts()

    def wait(seconds):
        now[0] += seconds

    generate = parts.timed("generate", lambda: wait(3.0))
    learn = parts.timed("learn", lambda: (wait(1.0), generate(), wait(1.5)))
    learn()
    wait(0.5)
    assert parts.drain(6.0) == pytest.approx({"generate": 3.0, "learn": 2.5, "other": 0.5})
    assert parts.drain(1.0) == {"other": 1.0}


def test_groups_of_the_learners_batch_share_a_prompt(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    rows = random_rows(str(tmp_path), 2, 4, (3, 2))
    batch = programs.gmpo_inputs(rows).batch
    assert batch.prompt_ids[0] is batch.prompt_ids[1] and batch.prompt_ids[2] is batch.prompt_ids[3]
    assert batch.prompt_ids[0] is not batch.prompt_ids[2]
    assert batch.group.tolist() == [0, 0, 1, 1] and batch.lengths.tolist() == [3, 2, 3, 2]
    assert batch.mask.sum(1).tolist() == [3, 2, 3, 2]
