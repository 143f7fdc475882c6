"""A reward that hangs or exits on one rank ends both, in time and with its name."""

import os
import sys
import time

import pytest

from gmpo.config import GMPOConfig
from gmpo.trainer import GMPOTrainer
from tests.distributed.runs import PROMPTS, with_two_ranks
from tests.tiny import tiny_model, tiny_tokenizer


def hangs(completions):
    if os.environ["RANK"] == "1":
        time.sleep(10**6)
    return [0.0] * len(completions)


def exits(completions):
    if os.environ["RANK"] == "1":
        sys.exit(7)
    return [0.0] * len(completions)


CASES = {
    "hangs": (hangs, {"reward_workers": 2, "reward_timeout": 1.0}),
    "exits": (exits, {}),
}


def program(folder, options):
    told = {}
    for name, (reward, settings) in CASES.items():
        config = GMPOConfig(
            os.path.join(folder, name),
            per_device_train_batch_size=4,
            num_generations=4,
            max_completion_length=4,
            max_steps=4,
            save_strategy="no",
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
            **settings,
            **options,
        )
        run = GMPOTrainer(tiny_model(), reward, config, PROMPTS, processing_class=tiny_tokenizer())
        try:
            run.train()
            told[name] = "nothing"
        except RuntimeError as error:
            told[name] = "\n".join([str(error), *getattr(error, "__notes__", ())])
    return told


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return with_two_ranks("copies", program, tmp_path_factory.mktemp("ranks"))


def test_a_reward_that_hangs_on_one_rank_ends_both(ranks):
    assert "'hangs' scored no completion in 3 calls in a row" in ranks[1]["hangs"]
    assert "within 1 s" in ranks[1]["hangs"]
    assert "rank" in ranks[0]["hangs"].lower()


def test_a_reward_that_exits_on_one_rank_ends_both(ranks):
    assert "'exits' called sys.exit(7)" in ranks[1]["exits"]
    assert "rank" in ranks[0]["exits"].lower()
