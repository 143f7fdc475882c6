import math
import time

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from gmpo.report.metrics import Metrics, Stopwatch, peak_memory
from gmpo.types import Statistics


def test_a_mean_weighs_by_count_not_by_micro_batch():
    metrics = Metrics()
    metrics.add(Statistics(means={"entropy": (6.0, 3)}))  # mean 2
    metrics.add(Statistics(means={"entropy": (10.0, 1)}))  # mean 10
    assert metrics.reduce() == {"entropy": 4.0}  # 16 / 4, not (2 + 10) / 2


def test_extremes_are_the_extremes_of_all_that_was_added():
    metrics = Metrics()
    for low, high in ((-0.5, 0.25), (-0.125, 0.75), (-0.25, 0.5)):
        metrics.add(
            Statistics(minima={"log_ratio/min": torch.tensor(low)}, maxima={"log_ratio/max": high})
        )
    assert metrics.reduce() == {"log_ratio/min": -0.5, "log_ratio/max": 0.75}


def test_reducing_clears_only_its_own_mode():
    metrics = Metrics()
    metrics.add(Statistics(means={"reward": (1.0, 2)}))
    metrics.add(Statistics(means={"reward": (3.0, 4)}), mode="eval")
    assert metrics.reduce() == {"reward": 0.5}
    assert metrics.reduce() == {}
    assert metrics.reduce(mode="eval") == {"eval_reward": 0.75}


def test_a_prefix_given_replaces_that_of_the_mode():
    metrics = Metrics()
    metrics.add(Statistics(means={"reward": (3.0, 4)}), mode="eval")
    assert metrics.reduce(mode="eval", prefix="eval_math") == {"eval_math_reward": 0.75}


def test_figures_of_nothing_are_left_out_and_others_stay():
    metrics = Metrics()
    metrics.add(
        Statistics(
            means={"kl": (0.0, 0), "reward": (math.nan, 1)},
            minima={"a": math.inf, "b": -math.inf},
            maxima={"c": -math.inf, "d": math.inf},
        )
    )
    figures = metrics.reduce()
    assert math.isnan(figures.pop("reward"))
    assert figures == {"b": -math.inf, "d": math.inf}


def test_a_long_sum_of_float32_tensors_stays_exact():
    metrics = Metrics()
    metrics.add(Statistics(means={"tokens": (torch.tensor(2.0**24), 1)}))
    for _ in range(3):
        metrics.add(
            Statistics(means={"tokens": (torch.tensor(1.0), 0)})
        )  # float32 has no 2**24 + 1
    assert metrics.reduce() == {"tokens": 2.0**24 + 3}


def test_pending_figures_hold_no_graph():
    metrics = Metrics()
    loss = torch.ones((), requires_grad=True) * 2
    metrics.add(Statistics(means={"loss": (loss, 1)}, maxima={"top": loss}))
    assert metrics.state_dict() == {
        "train": {"means": {"loss": [2.0, 1.0]}, "minima": {}, "maxima": {"top": 2.0}}
    }
    pending = metrics._pending["train"]
    assert not any(value.requires_grad for value in (*pending.means["loss"], pending.maxima["top"]))
    assert metrics.reduce() == {"loss": 2.0, "top": 2.0}


def test_a_resumed_run_logs_what_the_uninterrupted_one_logs():
    def first_half(metrics):
        metrics.add(
            Statistics(
                means={"reward": (torch.tensor(1.0), 3)}, minima={"low": -2.0}, maxima={"high": 1.0}
            )
        )

    def second_half(metrics):
        metrics.add(
            Statistics(means={"reward": (4.0, 1)}, minima={"low": -1.0}, maxima={"high": 3.0})
        )

    interrupted, resumed = Metrics(), Metrics()
    first_half(interrupted)
    resumed.load_state_dict(interrupted.state_dict())
    second_half(resumed)
    assert resumed.reduce() == {"reward": 1.25, "low": -2.0, "high": 3.0}  # (1 + 4) / (3 + 1)


def _reduce_on_two_ranks(rank, folder):
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2
    )
    metrics = Metrics()
    metrics.add(
        Statistics(means={"reward": (1.0 + rank, 1 + 2 * rank)}, minima={"low": -1.0 - rank})
    )
    if rank == 1:  # a figure that the other rank has never seen
        metrics.add(Statistics(means={"rewards/judge/mean": (3.0, 2)}, maxima={"high": 5.0}))
    metrics.add(Statistics(means={"reward": (9.0, 1)}), mode="eval")
    watch = Stopwatch()
    watch._seconds, watch._tokens = {"learn": 2.0 + 2.0 * rank}, {"learn": 30.0}
    metrics.add(watch.drain(steps=1))
    figures = metrics.reduce()
    torch.save((figures, metrics.reduce(mode="eval")), f"{folder}/rank{rank}.pt")
    dist.destroy_process_group()


def test_ranks_agree_on_one_exact_figure_each_even_where_one_lacks_a_name(tmp_path):
    spawn = mp.spawn  # pyright: ignore[reportPrivateImportUsage] (torch lists no names)
    spawn(_reduce_on_two_ranks, args=(tmp_path,), nprocs=2)
    results = [torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2)]
    assert results[0] == results[1]
    figures, evaluation = results[0]
    # reward: sums 1 and 2, counts 1 and 3
    expected = {"reward": 0.75, "low": -2.0, "rewards/judge/mean": 1.5, "high": 5.0}
    assert {name: figures[name] for name in expected} == expected
    assert figures["time/learn"] == 3.0  # mean of 2 and 4 seconds
    assert figures["tokens_per_second/learn"] == pytest.approx(
        60 / 3
    )  # all tokens over the seconds of one rank
    assert evaluation == {"eval_reward": 9.0}


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still unless told to move: `clock(seconds)`."""
    now = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    def move(seconds):
        now[0] += seconds

    return move


def test_an_inner_block_takes_its_seconds_from_the_outer_one(clock):
    watch = Stopwatch()
    with watch.timed("generate"):
        clock(1.0)
        with watch.timed("publish"):
            clock(0.25)
        clock(2.0)
    clock(0.75)
    means = watch.drain(steps=2).means
    assert means == {
        "step_time": (4.0, 2),
        "time/generate": (3.0, 2),
        "time/publish": (0.25, 2),
        "time/other": (0.75, 2),
    }


def test_the_parts_add_up_to_the_wall_time_over_several_blocks(clock):
    watch = Stopwatch()
    for _ in range(3):
        with watch.timed("learn"):
            watch.count_tokens("learn", 50)
            clock(0.5)
        clock(0.1)
    statistics = watch.drain(steps=3)
    assert sum(
        seconds for name, (seconds, _) in statistics.means.items() if name.startswith("time/")
    ) == pytest.approx(1.8)
    assert statistics.means["tokens_per_second/learn"] == (150, 1.5)


def test_a_pause_counts_nowhere(clock):
    watch = Stopwatch()
    with watch.timed("learn"):
        watch.count_tokens("learn", 5)
        clock(1.0)
        with watch.paused():
            clock(10.0)
            with watch.timed("generate"):
                watch.count_tokens("generate", 100)
                clock(20.0)
        clock(0.5)
    clock(0.25)
    assert watch.drain(steps=1).means == {
        "step_time": (1.75, 1),
        "time/learn": (1.5, 1),
        "time/other": (0.25, 1),
        "tokens_per_second/learn": (5, 1.5),
    }


def test_a_drained_stopwatch_starts_anew(clock):
    watch = Stopwatch()
    with watch.timed("learn"):
        watch.count_tokens("learn", 50)
        clock(1.0)
    watch.drain(steps=1)
    clock(0.5)
    assert watch.drain(steps=1).means == {"step_time": (0.5, 1), "time/other": (0.5, 1)}


def test_time_is_counted_when_a_block_raises(clock):
    watch = Stopwatch()
    with pytest.raises(RuntimeError), watch.timed("reward"):
        clock(1.0)
        raise RuntimeError
    assert watch.drain(steps=1).means["time/reward"] == (1.0, 1)


def test_peak_memory_rises_with_a_large_allocation():
    before = peak_memory()
    block = torch.ones(before // 4 + 2**26)  # as many floats as bytes were held
    assert peak_memory() > before
    del block
    assert Stopwatch().drain(steps=1).maxima["memory/peak_gib"] == pytest.approx(
        peak_memory() / 2**30, rel=0.01
    )
