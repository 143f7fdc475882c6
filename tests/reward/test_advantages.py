import math
from statistics import fmean, stdev

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gmpo.option import check_options
from gmpo.reward.advantages import group_advantages, reward_statistics
from gmpo.reward.settings import RewardSettings

NAN = math.nan
ROOT_2 = math.sqrt(2)


def advantages(rewards, group_size, **options):
    """Of one column or a table of rewards."""
    table = torch.tensor(rewards, dtype=torch.float64)
    table = table[:, None] if table.dim() == 1 else table
    return group_advantages(table, group_size, RewardSettings(**options))


HAND = [
    # mean 1/4; squares 3 * 1/16 + 9/16 = 3/4, over 4 - 1: variance 1/4, deviation 1/2
    ("group", [0, 0, 0, 1], 4, [-0.25 / 0.5001] * 3 + [0.75 / 0.5001]),
    # groups on their own: means 1 and 3, deviations sqrt 2 and 3 sqrt 2
    (
        "group",
        [0, 2, 0, 6],
        2,
        [
            -1 / (ROOT_2 + 1e-4),
            1 / (ROOT_2 + 1e-4),
            -3 / (3 * ROOT_2 + 1e-4),
            3 / (3 * ROOT_2 + 1e-4),
        ],
    ),
    # all four: mean 2, squares 4 + 0 + 4 + 16 = 24, over 3: deviation sqrt 8; centred by the group, not by the batch
    ("batch", [0, 2, 0, 6], 2, [v / (math.sqrt(8) + 1e-4) for v in (-1, 1, -3, 3)]),
    ("none", [0, 2, 0, 6], 2, [-1, 1, -3, 3]),
    # the row that nobody scored leaves mean 2 and deviation sqrt 2 of (1, 3)
    ("group", [1, NAN, 3], 3, [-1 / (ROOT_2 + 1e-4), 0, 1 / (ROOT_2 + 1e-4)]),
    # scored are 0, 4, 2, 2: mean 2, squares 8, over 3
    (
        "batch",
        [0, NAN, 4, 2, 2, NAN],
        3,
        [-2 / (math.sqrt(8 / 3) + 1e-4), 0, 2 / (math.sqrt(8 / 3) + 1e-4), 0, 0, 0],
    ),
    ("none", [1, NAN, 3], 3, [-1, 0, 1]),
    ("group", [1, NAN, NAN], 3, [0, 0, 0]),
    ("none", [NAN, NAN, NAN], 3, [0, 0, 0]),
]


@pytest.mark.parametrize(("scale", "rewards", "group_size", "expected"), HAND)
def test_advantages_of_one_source_are_those_of_the_hand_calculation(
    scale, rewards, group_size, expected
):
    result = advantages(rewards, group_size, scale_rewards=scale)
    torch.testing.assert_close(
        result.advantages, torch.tensor(expected, dtype=torch.float32), rtol=1e-6, atol=0
    )


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_groups_of_one_get_nothing(scale):
    assert advantages([3.0, -1.0, 0.5], 1, scale_rewards=scale).advantages.tolist() == [0, 0, 0]


def test_sources_are_weighed_and_added_over_those_that_scored_the_row():
    result = advantages(
        [[1, 10], [NAN, 3], [2, NAN], [NAN, NAN]],
        4,
        reward_weights=[1.0, 0.5],
        scale_rewards="none",
    )
    # 1 + 5, 0.5 * 3, 2, nobody; mean of the three: 9.5 / 3
    torch.testing.assert_close(
        result.rewards,
        torch.tensor([6, 1.5, 2, NAN], dtype=torch.float64),
        equal_nan=True,
        rtol=0,
        atol=0,
    )
    expected = [6 - 9.5 / 3, 1.5 - 9.5 / 3, 2 - 9.5 / 3, 0]
    torch.testing.assert_close(result.advantages, torch.tensor(expected, dtype=torch.float32))


def test_a_weight_of_zero_only_watches():
    watched = advantages([[1, 7], [4, NAN], [NAN, 9], [2, 8]], 4, reward_weights=[1.0, 0.0])
    alone = advantages([1, 4, NAN, 2], 4)
    assert watched.advantages.tolist() == alone.advantages.tolist()
    torch.testing.assert_close(watched.rewards, alone.rewards, equal_nan=True)


def test_normalize_then_sum_normalises_each_source_in_its_group_and_then_all_rows():
    result = advantages(
        [[0, 0], [1, 3], [0, 5], [0, 3]],
        2,
        reward_weights=[1.0, 2.0],
        multi_objective_aggregation="normalize_then_sum",
    )
    # (0, 1): +-0.5 / (sqrt 0.5 + floor); (0, 3): +-1.5 / (1.5 sqrt 2 + floor); (5, 3): +-1 / (sqrt 2 + floor)
    first = 0.5 / (math.sqrt(0.5) + 1e-4) + 2 * 1.5 / (1.5 * ROOT_2 + 1e-4)
    second = 2 * 1 / (ROOT_2 + 1e-4)
    everywhere = math.sqrt(2 * (first**2 + second**2) / 3) + 1e-4  # their mean is 0
    expected = [-first / everywhere, first / everywhere, second / everywhere, -second / everywhere]
    torch.testing.assert_close(result.advantages, torch.tensor(expected, dtype=torch.float32))
    assert result.rewards.tolist() == [0, 7, 10, 6]  # what is logged is still the weighted sum


def test_normalize_then_sum_keeps_apart_what_a_sum_makes_equal():
    """What GDPO is for: sums (0, 1) and (0, 2) have the same advantages."""
    table = [[0, 0], [0, 1], [0, 0], [1, 1]]
    added = advantages(table, 2).advantages
    torch.testing.assert_close(added[1], added[3], rtol=1e-4, atol=0)
    apart = advantages(table, 2, multi_objective_aggregation="normalize_then_sum").advantages
    # the second group's rows hold two normalised rewards, the first group's one: twice as far from 0
    torch.testing.assert_close(apart[3] / apart[1], torch.tensor(2.0), rtol=1e-3, atol=0)


def test_normalize_then_sum_counts_a_single_score_of_a_source_as_no_signal():
    table = [[0, NAN], [1, 4], [NAN, NAN]]
    result = advantages(table, 3, multi_objective_aggregation="normalize_then_sum")
    half = 0.5 / (math.sqrt(0.5) + 1e-4)
    scaled = half / (half * ROOT_2 + 1e-4)
    torch.testing.assert_close(result.advantages, torch.tensor([-scaled, scaled, 0]))


def test_normalize_then_sum_gets_nothing_from_a_source_that_is_flat_in_the_group():
    large = 1e15 / 17  # the float mean of three of them is another number
    table = [[0, large], [1, large], [0, large], [0, 1], [1, 1], [0, 1]]
    options = {"multi_objective_aggregation": "normalize_then_sum"}
    assert advantages(table, 3, **options).advantages.equal(
        advantages([0, 1, 0] * 2, 3, **options).advantages
    )


ZERO_SIGNAL = [
    (
        [0.1, 0.1, 0.1, 0.7, 0.7, 0.7],
        3,
        [True] * 6,
    ),  # whose float deviation is not 0: 0.1 + 0.1 + 0.1 != 0.3
    ([0.1, 0.1 + 1e-12, 0.1, 0.7, 0.7, 0.7], 3, [False] * 3 + [True] * 3),
    ([2, NAN, 2], 3, [True] * 3),
    ([2, NAN, 3], 3, [False] * 3),
    ([NAN, NAN, 1], 3, [True] * 3),
    ([[1, 0], [0, 1]], 2, [True] * 2),  # the sums are equal
]


@pytest.mark.parametrize(("rewards", "group_size", "expected"), ZERO_SIGNAL)
def test_a_group_is_without_signal_when_its_rewards_are_exactly_equal(
    rewards, group_size, expected
):
    for scale in ("group", "batch", "none"):
        result = advantages(rewards, group_size, scale_rewards=scale)
        assert result.zero_signal.tolist() == expected
        assert result.advantages[result.zero_signal].tolist() == [0.0] * sum(expected)


def test_normalize_then_sum_sees_no_signal_only_where_every_source_is_flat():
    table = [[1, 0], [0, 1], [3, 0.1], [3, 0.1], [3, NAN], [3, 0.1]]
    result = advantages(table, 2, multi_objective_aggregation="normalize_then_sum")
    assert result.zero_signal.tolist() == [False, False, True, True, True, True]
    assert result.advantages[2:].tolist() == [0.0] * 4


def test_equal_rows_are_summed_alike_wherever_they_stand():
    row = [0.1, 0.2, 0.3, 0.7, 1e-3]
    assert advantages([row] * 67, 67, reward_weights=[0.3, 0.9, 1.7, 0.1, 5.0]).zero_signal.all()


REFUSED = [
    ([1.0, 2, 3], 2, {}, "whole groups of 2"),
    ([1.0, math.inf], 2, {}, "infinite"),
    ([1.0, 2.0], 2, {"reward_weights": [1.0, 2.0]}, "must match"),
    (
        [1.0, 2.0],
        2,
        {"multi_objective_aggregation": "normalize_then_sum", "scale_rewards": "none"},
        "no effect",
    ),
]


@pytest.mark.parametrize(("rewards", "group_size", "options", "message"), REFUSED)
def test_what_has_no_advantages_is_refused(rewards, group_size, options, message):
    with pytest.raises(ValueError, match=message):
        advantages(rewards, group_size, **options)


@pytest.mark.parametrize("weight", [math.nan, math.inf])
def test_weights_must_be_finite(weight):
    with pytest.raises(ValueError, match="finite"):
        check_options(RewardSettings(reward_weights=[1.0, weight]))


# -- properties --------------------------------------------------------------------------------------------------------

# Multiples of 1/8 within +-8: sums and shifts of them are exact.
eighths = st.integers(-64, 64).map(lambda n: n / 8)
maybe_scored = st.one_of(eighths, st.just(NAN))
OPTIONS = [
    {"scale_rewards": "group"},
    {"scale_rewards": "batch"},
    {"scale_rewards": "none"},
    {"multi_objective_aggregation": "normalize_then_sum"},
]


@st.composite
def tables(draw, scores=maybe_scored):
    """A table of rewards and its group size."""
    num_groups, group_size, num_sources = (
        draw(st.integers(1, 4)),
        draw(st.integers(1, 5)),
        draw(st.integers(1, 3)),
    )
    row = st.lists(scores, min_size=num_sources, max_size=num_sources)
    size = num_groups * group_size
    return draw(st.lists(row, min_size=size, max_size=size)), group_size


def plainly(rewards, group_size, scale):
    """sum_then_normalize for one source, with Python's own statistics."""
    scored = [r for r in rewards if not math.isnan(r)]
    result = []
    for start in range(0, len(rewards), group_size):
        group = rewards[start : start + group_size]
        some = [r for r in group if not math.isnan(r)]
        pool = {"group": some, "batch": scored, "none": []}[scale]
        divisor = 1 if scale == "none" else (stdev(pool) if len(pool) > 1 else 0) + 1e-4
        result += [0.0 if math.isnan(r) else (r - fmean(some)) / divisor for r in group]
    return result


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
@settings(max_examples=60, deadline=None)
@given(tables())
def test_one_source_agrees_with_plain_python(scale, case):
    table, group_size = case
    rewards = [row[0] for row in table]
    result = advantages(rewards, group_size, scale_rewards=scale).advantages
    torch.testing.assert_close(
        result, torch.tensor(plainly(rewards, group_size, scale)), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("options", OPTIONS)
@settings(max_examples=60, deadline=None)
@given(tables())
def test_no_nan_leaves(options, case):
    result = advantages(*case, **options)
    assert result.advantages.isfinite().all()
    unscored = torch.tensor(case[0]).isnan().all(1)
    assert result.rewards.isnan().equal(unscored)
    assert not result.advantages[unscored].any()
    assert not result.advantages[result.zero_signal].any()


@pytest.mark.parametrize("options", OPTIONS)
@settings(max_examples=60, deadline=None)
@given(tables(), st.lists(eighths, min_size=4, max_size=4))
def test_adding_a_constant_to_every_reward_of_a_group_changes_nothing(options, case, shifts):
    table, group_size = case
    options = {"reward_weights": [1.0] + [0.0] * (len(table[0]) - 1), **options}
    if options.get("scale_rewards") == "batch":
        shifts = shifts[:1] * 4  # the whole batch moves, or its spread changes
    moved = [[reward + shifts[i // group_size] for reward in row] for i, row in enumerate(table)]
    torch.testing.assert_close(
        advantages(moved, group_size, **options).advantages,
        advantages(table, group_size, **options).advantages,
        rtol=1e-5,
        atol=1e-6,
    )


@pytest.mark.parametrize("options", OPTIONS)
@settings(max_examples=60, deadline=None)
@given(tables(), st.randoms(use_true_random=False))
def test_groups_and_rows_within_them_may_come_in_any_order(options, case, random):
    table, group_size = case
    starts = list(range(0, len(table), group_size))
    random.shuffle(starts)
    order = [
        i for start in starts for i in random.sample(range(start, start + group_size), group_size)
    ]
    torch.testing.assert_close(
        advantages([table[i] for i in order], group_size, **options).advantages,
        advantages(table, group_size, **options).advantages[order],
        rtol=1e-5,
        atol=1e-6,
    )


@settings(max_examples=60, deadline=None)
@given(st.lists(eighths, min_size=2, max_size=6), st.sampled_from([0.5, 4.0, 1024.0]))
def test_scaling_all_rewards_changes_only_the_share_of_the_floor(rewards, factor):
    result = advantages([factor * reward for reward in rewards], len(rewards)).advantages
    mean, spread = fmean(rewards), stdev(rewards)
    expected = [(reward - mean) / (spread + 1e-4 / factor) for reward in rewards]
    torch.testing.assert_close(result, torch.tensor(expected), rtol=1e-5, atol=1e-6)


# -- the log -----------------------------------------------------------------------------------------------------------


def test_statistics_are_those_of_the_hand_calculation():
    table = [[1, 4], [NAN, 4], [0, 4], [0, 4]]
    rewards = torch.tensor(table, dtype=torch.float64)
    result = group_advantages(rewards, 2, RewardSettings(reward_weights=[1.0, 0.5]))
    means = reward_statistics(["right", "short"], rewards, result).means
    expected = {
        "rewards/right/mean": (1.0, 3.0),
        "rewards/right/std": (
            math.sqrt(1 / 3),
            1.0,
        ),  # 1, 0, 0: mean 1/3, squares 4/9 + 1/9 + 1/9, over 2
        "rewards/short/mean": (16.0, 4.0),
        "rewards/short/std": (0.0, 1.0),
        "reward": (9.0, 4.0),  # 3 + 2 + 2 + 2
        "reward_std": (0.5, 1.0),  # mean 9/4, squares 9/16 + 3/16 = 3/4, over 3
        "frac_reward_zero_std": (2.0, 4.0),  # rewards 3, 2 | 2, 2
    }
    assert means.keys() == expected.keys()
    for name, figure in expected.items():
        assert means[name] == pytest.approx(figure), name


def test_statistics_leave_out_a_source_that_scored_nothing():
    rewards = torch.tensor([[1.0, NAN], [2.0, NAN]])
    result = group_advantages(rewards, 2, RewardSettings())
    assert set(reward_statistics(["a", "b"], rewards, result).means) == {
        *("rewards/a/mean", "rewards/a/std", "reward", "reward_std", "frac_reward_zero_std")
    }


def test_statistics_use_the_unweighted_scores_of_a_source_that_only_watches():
    rewards = torch.tensor([[1.0, 6.0], [3.0, 8.0]])
    result = group_advantages(rewards, 2, RewardSettings(reward_weights=[1.0, 0.0]))
    assert reward_statistics(["a", "b"], rewards, result).means["rewards/b/mean"] == (14.0, 2.0)


def test_no_rows_give_no_statistics_and_no_error():
    rewards = torch.empty(0, 2)
    result = group_advantages(rewards, 4, RewardSettings())
    assert (
        result.advantages.shape == (0,)
        and reward_statistics(["a", "b"], rewards, result).means == {}
    )
