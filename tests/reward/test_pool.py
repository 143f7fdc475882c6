"""Rewards in worker processes: whatever a function does, the other rows keep their scores."""

import json
import logging
import os
import subprocess
import sys
import time

import datasets
import psutil
import pytest
import torch

from gmpo import GMPOConfig, GMPOTrainer
from gmpo.reward.check import check_rewards
from gmpo.reward.pool import MARK, Limits, WorkerPool, pack, shared_pool
from gmpo.reward.score import score
from gmpo.reward.settings import RewardSettings
from gmpo.reward.sources import build_sources
from tests.reward.cases import rollout
from tests.reward.vicious import HARMED, VICIOUS, hangs_now_and_then, python_loop, vicious
from tests.tiny import tiny_model, tiny_tokenizer

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="its cases are of POSIX")


async def quick(completions):
    return [1.0] * len(completions)


def workers_of(marked=MARK):
    """Return the processes on this machine that carry a worker's mark."""
    found = []
    for process in psutil.process_iter():
        try:
            if marked in process.environ() and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process.pid)
        except psutil.Error:
            continue
    return found


@pytest.fixture
def sources():
    settings = RewardSettings(reward_workers=2, reward_timeout=3.0, reward_memory_limit=0.5)
    return build_sources(vicious, settings=settings)


def scores(sources, case):
    texts = ["a", HARMED, "ccc", "dddd"]
    rollouts = [rollout("?", text) for text in texts]
    return score(sources, rollouts, [{"answer": case}] * 4)


@pytest.mark.parametrize("case", VICIOUS)
def test_a_vicious_reward_costs_its_own_row_only(sources, case, caplog):
    with caplog.at_level(logging.WARNING):
        result = scores(sources, case)
    rewards = result.rewards[:, 0].tolist()
    assert [rewards[0], *rewards[2:]] == [1.0, 3.0, 4.0]
    assert rewards[1] != rewards[1]
    assert result.metrics == {"rewards/vicious/lost": (1.0, 4.0)}
    assert "'vicious' did not score a completion" in caplog.text and HARMED in caplog.text

    again = scores(sources, "nothing").rewards if case == "exits" else None
    assert again is None or again[0, 0] == 1.0


def test_nothing_that_a_reward_started_is_left(sources):
    before = set(workers_of())
    scores(sources, "daemon_left_behind")
    scores(sources, "fork_that_hangs")
    shared_pool(2).close()
    assert set(workers_of()) <= before


def test_an_error_for_every_row_is_the_function_s_own(sources):
    def broken(completions):
        raise ZeroDivisionError("my fault")

    broken_sources = build_sources(broken, settings=RewardSettings(reward_workers=2))
    with pytest.raises(RuntimeError, match=r"each of 2 completions(.|\n)*my fault") as caught:
        score(broken_sources, [rollout(), rollout()], [{}] * 2)
    assert "Raised by the reward 'broken'" in caught.value.__notes__[0]


def test_a_reward_that_never_answers_stops_the_run_with_the_reason():
    settings = RewardSettings(reward_workers=2, reward_timeout=0.5)
    (source,) = build_sources(vicious, settings=settings)
    for _ in range(2):
        score([source], [rollout("?", HARMED)], [{"answer": "sleep"}])
    with pytest.raises(RuntimeError, match=r"no completion in 3 calls.*within 0.5 s"):
        score([source], [rollout("?", HARMED)], [{"answer": "sleep"}])


def test_closures_and_lambdas_go_to_workers():
    bonus = 0.25
    rewards = [lambda completions: [bonus], vicious]
    settings = RewardSettings(reward_workers=2)
    result = score(
        build_sources(rewards, settings=settings), [rollout("?", "ab")], [{"answer": None}]
    )
    assert result.rewards.tolist() == [[0.25, 2.0]]


def test_what_can_t_be_sent_is_refused_when_the_source_is_built():
    held = (number for number in range(3))

    def holds(completions):
        return [next(held)]

    with pytest.raises(
        ValueError, match=r"can't be sent to worker processes.*leave reward_workers"
    ):
        build_sources(holds, settings=RewardSettings(reward_workers=1))


def test_a_script_s_functions_go_to_workers_and_the_script_runs_once(tmp_path):
    """multiprocessing would run a script without a guard again in each worker."""
    script = tmp_path / "script.py"
    script.write_text(
        "from gmpo.reward.score import score\n"
        "from gmpo.reward.settings import RewardSettings\n"
        "from gmpo.reward.sources import build_sources\n"
        "from gmpo.types import Prompt, Rollout\n"
        "print('begun')\n"
        "SCALE = 2\n"
        "def double(completions):\n    return [SCALE * float(len(completions[0]))]\n"
        "sources = build_sources(double, settings=RewardSettings(reward_workers=1))\n"
        "rows = [Rollout(Prompt([1], '?'), [2], 'stop', completion='abc')]\n"
        "print(score(sources, rows, [{}]).rewards.tolist())\n"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    result = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, env=environment
    )
    assert result.stdout.split("\n") == ["begun", "[[6.0]]", ""], result.stderr


def test_workers_log_for_the_function():
    def logs(completions, log_extra, log_metric, trainer_state):
        log_extra("seen", [completions[0].upper()])
        log_metric("steps", trainer_state["step"])
        return [None if completions[0] == "b" else 1.0]

    sources = build_sources(logs, settings=RewardSettings(reward_workers=2))
    for step in (1, 2):
        result = score(
            sources,
            [rollout("?", "a"), rollout("?", "b")],
            [{}] * 2,
            trainer_state={"step": step},
        )
        assert result.rewards[:, 0].tolist()[0] == 1.0
        assert result.extra == {"seen": ["A", "B"]}
        assert result.metrics == {"steps": (2.0 * step, 2.0), "rewards/logs/lost": (0.0, 2.0)}


def test_a_worker_ends_with_its_parent(tmp_path):
    code = (
        "import os, signal\n"
        "from gmpo.reward.pool import Limits, pack, shared_pool\n"
        "import os\n"
        "pool = shared_pool(1)\n"
        "print(pool.submit(pack(os.getpid), limits=Limits()).result().value, flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment
    )
    worker = int(result.stdout)
    for _ in range(300):
        if not psutil.pid_exists(worker):
            return
        time.sleep(0.1)
    pytest.fail("the worker is still there")


def test_cpu_time_counts_and_waiting_does_not():
    pool = WorkerPool(1)
    try:
        limits = Limits(wall_s=60, cpu_s=0.5)
        assert pool.submit(pack(time.sleep), 1.0, limits=limits).result().lost is None
        lost = pool.submit(pack(python_loop), limits=limits).result().lost
        assert lost == "there was no answer within 0.5 s of CPU time"
    finally:
        pool.close()


def test_options_without_effect_are_refused():
    with pytest.raises(ValueError, match=r"reward_timeout=5 has no effect.*reward_workers to 1"):
        build_sources(vicious, settings=RewardSettings(reward_timeout=5.0))
    with pytest.raises(ValueError, match=r"reward_memory_limit=1 has no effect"):
        check_rewards(RewardSettings(reward_memory_limit=1.0))


@pytest.mark.parametrize("reward", ["number_match", quick, ["think_format", quick]])
def test_workers_that_nobody_would_use_are_refused(reward):
    with pytest.raises(ValueError, match="reward_workers=2 has no effect"):
        build_sources(reward, settings=RewardSettings(reward_workers=2))


def test_the_judge_uses_the_workers():
    pytest.importorskip("math_verify")
    (source,) = build_sources("accuracy", settings=RewardSettings(reward_workers=3))
    assert score([source], [rollout("?", "4")], [{"answer": "4"}]).rewards.item() == 1.0
    assert shared_pool().max_workers == 3


def test_a_training_goes_on_beside_a_reward_that_hangs(tmp_path):
    """About a third of the completions hang; the others train the policy."""
    config = GMPOConfig(
        str(tmp_path),
        per_device_train_batch_size=4,
        num_generations=4,
        max_completion_length=4,
        max_steps=2,
        logging_steps=1,
        learning_rate=1e-2,
        reward_workers=2,
        reward_timeout=3.0,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
    )
    model = tiny_model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trainer = GMPOTrainer(
        model,
        hangs_now_and_then,
        config,
        datasets.Dataset.from_list([{"prompt": "a b"}] * 4),
        processing_class=tiny_tokenizer(),
    )
    trainer.train()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    lost = [line["rewards/hangs_now_and_then/lost"] for line in lines if "loss" in line]
    assert len(lost) == 2 and 0 < sum(lost) < 2
    assert any(not torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_when_another_source_fails_the_workers_calls_are_ended():
    def fails(completions):
        raise KeyError("my fault")

    settings = RewardSettings(reward_workers=2, reward_timeout=1000.0)
    pooled, _ = build_sources([vicious, vicious], settings=settings)
    (broken,) = build_sources(fails)
    with pytest.raises(KeyError):
        score([pooled, broken], [rollout("?", HARMED)] * 3, [{"answer": "deaf_loop"}] * 3)
    again = score([pooled], [rollout("?", "abc")], [{"answer": None}])
    assert again.rewards.item() == 3.0
