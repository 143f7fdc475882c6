import json

import pytest

from examples import drop_in
from examples.custom_reward import close_to_the_answer
from tests.tiny import tiny_model, tiny_tokenizer


def test_the_drop_in_script_makes_an_off_policy_step(tmp_path, monkeypatch):
    tiny_model().save_pretrained(tmp_path / "tiny")
    tiny_tokenizer().save_pretrained(tmp_path / "tiny")
    monkeypatch.chdir(tmp_path)
    drop_in.main("tiny")
    first, second = [json.loads(line) for line in (tmp_path / "runs/drop_in/metrics.jsonl").open()][
        :2
    ]
    assert (first["step"], second["step"]) == (1, 2)
    assert first["log_ratio/max"] == 0.0
    assert second["log_ratio/max"] != 0.0


def test_the_custom_reward_falls_with_the_distance():
    logged = {}
    completions = ["8", [{"role": "assistant", "content": "1 + 6 is 7."}], "4", "none"]
    rewards = close_to_the_answer(
        completions, answer=["8", "8", "8", "8"], log_metric=logged.__setitem__, task="any"
    )
    assert rewards == pytest.approx([1.0, 1 / 2, 1 / 5, 0.0])
    assert logged == {"close/without_number": 0.25}
