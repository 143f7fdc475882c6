"""What a reward leaves in the log can't replace the figures of gmpo and of the Trainer."""

import pyarrow.parquet
import pytest

from gmpo.report.completions import CompletionRecords
from gmpo.types import is_reserved_figure
from tests.options.runs import SCENARIOS, fresh_run, run

OPTIONS = {
    "beta": 0.1,
    "zero_signal_groups": "resample",
    "entropy_coef": 0.1,
    "include_num_input_tokens_seen": "all",
}


def test_every_figure_that_a_run_logs_is_its_own():
    logged = set()
    for scenario, options in (("gmpo", OPTIONS), ("eval", {}), ("mixture", {}), ("grpo", {})):
        for entry in run(scenario, **options).trainer.state.log_history:
            logged |= entry.keys()
    assert len(logged) > 50
    assert [name for name in sorted(logged) if not is_reserved_figure(name)] == []


@pytest.mark.parametrize("name", ["length", "rewards/mine/lost", "my/reward", "losses", "kl_like"])
def test_other_names_are_free(name):
    assert not is_reserved_figure(name)


def rewarding(remark):
    """A scenario with a reward function that leaves `remark` in the log."""

    def reward(completions, log_metric, log_extra, **columns):
        remark(log_metric, log_extra, len(completions))
        return [float(i % 2) for i in range(len(completions))]

    return SCENARIOS["gmpo"].__class__(arguments=lambda _: {"reward_funcs": reward})


@pytest.mark.parametrize("name", ["loss", "reward", "step", "rewards/reward/mean", "time/learn"])
def test_a_metric_with_the_name_of_a_figure_is_refused(name):
    scenario = rewarding(lambda metric, extra, count: metric(name, 1000.0))
    with pytest.raises(ValueError, match=rf"'reward' called log_metric\('{name}', .*another name"):
        fresh_run(scenario, max_steps=1)


@pytest.mark.parametrize("name", [5, None, ""])
def test_a_name_that_is_no_text_is_refused(name):
    for remark, said in (
        (lambda metric, extra, count: metric(name, 1.0), "log_metric"),
        (lambda metric, extra, count: extra(name, [0] * count), "log_extra"),
    ):
        with pytest.raises(ValueError, match=rf"called {said}\({name!r}, .*must be a text"):
            fresh_run(rewarding(remark), max_steps=1)


def test_an_extra_column_named_like_a_reward_gets_its_kind_before_it():
    scenario = rewarding(lambda metric, extra, count: extra("reward", ["mine"] * count))
    result = fresh_run(scenario, max_steps=1, log_completions=True)
    (file,) = (result.folder / "out" / "completions").glob("*.parquet")
    table = pyarrow.parquet.read_table(file).to_pydict()
    assert set(table["extra/reward"]) == {"mine"}
    assert set(table["reward"]) == {0.0, 1.0}


def test_two_rewards_of_a_table_keep_their_columns():
    records = CompletionRecords(["p"], ["c"], {"a": [1.0]}, [0.5], {"a": ["x"], "b": ["y"]})
    (record,) = records.records()
    assert (record["a"], record["extra/a"], record["b"]) == (1.0, "x", "y")
