"""What is reported of a chunk, by hand."""

from math import exp

import pytest
import torch

from gmpo.types import Statistics
from tests.objective.cases import counts, double, inputs, log, objective

NAN = float("nan")


def reported(member, x) -> Statistics:
    return member.loss(x, counts(x))[1]


def means(statistics: Statistics) -> dict[str, float]:
    return {
        name: float(total) / float(count)
        for name, (total, count) in statistics.means.items()
        if count
    }


def gmpo_rows():
    """Three rows of log-ratios, A = 1, -1, 1; the last has no counted token."""
    return inputs(
        [[0.5, 0.1, -0.9, 0.1], [-0.5, -0.6, 0.3, 7.0], [9.0] * 4],
        [1.0, -1.0, 1.0],
        mask=[[1, 1, 1, 1], [1, 1, 1, 0], [0] * 4],
        entropy=double([[1, 2, 3, 4], [0, 0, 4, NAN], [NAN] * 4]),
    )


def test_means_are_sums_over_counted_tokens_with_their_counts():
    total, count = reported(objective("gmpo", epsilon=0.4), gmpo_rows()).means["entropy"]
    assert (float(total), float(count)) == (14.0, 7.0)


def test_clip_shares_of_both_sides_and_of_the_extreme_rows():
    statistics = reported(objective("gmpo", epsilon=0.4), gmpo_rows())
    shares = means(statistics)
    assert shares["clip_ratio/high_mean"] == pytest.approx(1 / 7)  # 0.5 of the first row
    assert shares["clip_ratio/low_mean"] == pytest.approx(2 / 7)  # -0.5 and -0.6 of the second
    assert shares["clip_ratio/region_mean"] == pytest.approx(3 / 7)
    assert float(statistics.minima["clip_ratio/low_min"]) == 0.0
    assert float(statistics.maxima["clip_ratio/high_max"]) == pytest.approx(1 / 4)


def test_a_row_without_selected_tokens_has_no_share():
    x = inputs([[-0.9, 0.0], [-0.9, -0.9], [0.0, 0.0]], [-1.0] * 3, mask=[[1, 1], [1, 1], [0, 0]])
    statistics = reported(objective("gmpo", epsilon=0.4), x)
    assert float(statistics.minima["clip_ratio/low_min"]) == 0.5
    assert means(statistics)["clip_ratio/low_mean"] == 0.75


def test_extremes_of_the_log_ratio_are_of_counted_tokens_selected_or_not():
    x = inputs(
        [[0.5, 0.1, -0.9, 7.0]],
        [1.0],
        mask=[[1, 1, 1, 0]],
        select=torch.tensor([[False, True, False, False]]),
    )
    statistics = reported(objective("gmpo", epsilon=0.4), x)
    assert float(statistics.minima["log_ratio/min"]) == pytest.approx(-0.9)
    assert float(statistics.maxima["log_ratio/max"]) == pytest.approx(0.5)


def test_rho_is_told_apart_by_the_sign_of_the_advantage():
    statistics = reported(objective("gmpo", epsilon=0.4), gmpo_rows())
    positive, negative = exp((0.4 + 0.1 - 0.9 + 0.1) / 4), exp((-0.4 - 0.4 + 0.3) / 3)
    assert means(statistics)["rho/positive/mean"] == pytest.approx(positive)
    assert means(statistics)["rho/negative/mean"] == pytest.approx(negative)
    assert float(statistics.maxima["rho/positive/max"]) == pytest.approx(positive)
    assert float(statistics.maxima["rho/negative/max"]) == pytest.approx(negative)


def test_the_divergence_is_reported_with_a_reference_and_after_its_correction():
    x = inputs([[0.3, 0.3]], [1.0], mask=[[1, 0]], reference=[[log(2.0), NAN]])
    assert "kl" not in means(reported(objective("gmpo"), x))
    assert means(reported(objective("gmpo", beta=0.1), x))["kl"] == pytest.approx(1 - log(2.0))
    corrected = reported(objective("gmpo", beta=0.1, use_bias_correction_kl=True), x)
    assert means(corrected)["kl"] == pytest.approx((1 - log(2.0)) * exp(0.3))


DIFFERENCES = [[log(2.0), -log(4.0), 9.0], [log(5.0), NAN, 9.0], [NAN] * 3]


def sampled():
    return inputs(
        [[0.0] * 3] * 3, [1.0] * 3, mask=[[1, 1, 0], [1, 1, 0], [0] * 3], sampler=DIFFERENCES
    )


def test_the_sampler_is_compared_over_counted_tokens_whether_or_not_it_is_corrected_for():
    for options in ({}, {"vllm_importance_sampling_correction": False}):
        statistics = reported(objective(**options), sampled())
        name = "sampling/sampling_logp_difference"
        assert means(statistics)[f"{name}/mean"] == pytest.approx((log(2) + log(4) + log(5)) / 4)
        assert float(statistics.maxima[f"{name}/max"]) == pytest.approx(log(5))


RATIOS = [  # mode -> min, mean, max of the raw ratios; share outside of at most 3
    ("token_mask", 0.25, (2 + 0.25 + 5 + 1) / 4, 5.0, 1 / 4),
    ("token_truncate", 0.25, (2 + 0.25 + 5 + 1) / 4, 5.0, 1 / 4),
    ("sequence_mask", 0.5, 2.75, 5.0, 1 / 2),
    ("geometric_truncate", 0.5**0.5, (0.5**0.5 + 5**0.5) / 2, 5**0.5, 0.0),
]


@pytest.mark.parametrize(("mode", "low", "mean", "high", "share"), RATIOS)
def test_ratios_are_reported_raw_with_the_share_that_the_bounds_touch(mode, low, mean, high, share):
    statistics = reported(objective(vllm_importance_sampling_mode=mode), sampled())
    name = "sampling/importance_sampling_ratio"
    assert float(statistics.minima[f"{name}/min"]) == pytest.approx(low)
    assert float(statistics.maxima[f"{name}/max"]) == pytest.approx(high)
    assert means(statistics)[f"{name}/mean"] == pytest.approx(mean)
    assert means(statistics)[
        f"{name}/{'masked' if 'mask' in mode else 'truncated'}"
    ] == pytest.approx(share)


def test_a_chunk_without_counted_tokens_moves_no_mean_and_no_extreme():
    empty = inputs([[9.0]], [1.0], mask=[[0]], sampler=[[9.0]], entropy=double([[9.0]]))
    alone, together = reported(objective("gmpo"), sampled()), reported(objective("gmpo"), empty)
    assert all(float(count) == 0 == float(total) for total, count in together.means.values())
    together.update(alone)
    assert means(together) == means(alone)
    assert {name: float(v) for name, v in together.minima.items()} == {
        n: float(v) for n, v in alone.minima.items()
    }
    assert {name: float(v) for name, v in together.maxima.items()} == {
        n: float(v) for n, v in alone.maxima.items()
    }


def test_no_figure_carries_a_gradient():
    x = inputs(
        [[0.1]], [1.0], reference=[[0.1]], sampler=[[0.1]], entropy=double([[1.0]]).requires_grad_()
    )
    statistics = reported(objective("gmpo", beta=0.1), x)
    figures = [*statistics.minima.values(), *statistics.maxima.values()]
    figures += [value for pair in statistics.means.values() for value in pair]
    assert not any(torch.as_tensor(figure).requires_grad for figure in figures)
