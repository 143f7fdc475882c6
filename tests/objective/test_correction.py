"""The sampler/trainer correction by hand, on two unmoved rows: log trainer/sampler is log 2, -log 4 | log 5, NaN."""

from math import exp

import pytest
import torch

from gmpo.config import GMPOConfig, GRPOConfig
from gmpo.objective.correction import correction_from
from tests.objective.cases import equal, inputs, log, loss_and_gradient, objective

NAN = float("nan")
DIFFERENCES = [[log(2.0), -log(4.0)], [log(5.0), NAN]]
TOKENS = [[2.0, 0.25], [5.0, 1.0]]

# mode, lower bound, upper bound -> what each token's loss -A (A = 1) is multiplied by
BY_HAND = [
    ("token_truncate", None, 3.0, [[2.0, 0.25], [3.0, 1.0]]),
    ("token_truncate", 0.5, None, [[2.0, 0.5], [5.0, 1.0]]),
    ("token_mask", None, 3.0, [[2.0, 0.25], [0.0, 1.0]]),
    ("token_mask", 0.5, 3.0, [[2.0, 0.0], [0.0, 1.0]]),
    ("token_mask", None, None, TOKENS),
    ("sequence_truncate", None, 3.0, [[0.5] * 2, [3.0] * 2]),  # 2 * 0.25 | 5 * 1
    ("sequence_mask", None, 3.0, [[0.5] * 2, [0.0] * 2]),
    ("sequence_mask", 0.6, None, [[0.0] * 2, [5.0] * 2]),
    ("geometric_truncate", 1.0, 2.0, [[1.0] * 2, [2.0] * 2]),  # sqrt(0.5) | sqrt(5)
    ("geometric_mask", 0.5, 2.0, [[0.5**0.5] * 2, [0.0] * 2]),
    ("geometric_mask", 0.5, 3.0, [[0.5**0.5] * 2, [5**0.5] * 2]),
]


def correcting(mode, low, high, algorithm="grpo", **options):
    return objective(
        algorithm,
        vllm_importance_sampling_mode=mode,
        vllm_importance_sampling_clip_min=low,
        vllm_importance_sampling_clip_max=high,
        **options,
    )


@pytest.mark.parametrize(("mode", "low", "high", "weights"), BY_HAND)
def test_each_mode_weighs_the_tokens_of_a_token_member(mode, low, high, weights):
    loss, gradient = loss_and_gradient(
        correcting(mode, low, high), inputs([[0.0] * 2] * 2, [1, 1], sampler=DIFFERENCES)
    )
    equal(loss, -sum(map(sum, weights)) / 4)
    equal(gradient, [[-w / 4 for w in row] for row in weights])


# The same for GMPO: a row's weight, the geometric mean of its tokens' weights, and its number of tokens in the mean.
ROWS = [
    ("token_truncate", None, 3.0, [0.5**0.5, 3**0.5], [[1, 1], [1, 1]]),
    ("token_mask", None, 3.0, [0.5**0.5, 1.0], [[1, 1], [0, 1]]),
    ("token_mask", 0.5, 3.0, [2.0, 1.0], [[1, 0], [0, 1]]),
    ("sequence_truncate", None, 3.0, [0.5, 3.0], [[1, 1], [1, 1]]),
    ("sequence_mask", None, 3.0, [0.5, 0.0], [[1, 1], [0, 0]]),
    ("geometric_truncate", 1.0, 2.0, [1.0, 2.0], [[1, 1], [1, 1]]),
    ("geometric_mask", 0.5, 2.0, [0.5**0.5, 0.0], [[1, 1], [0, 0]]),
]


@pytest.mark.parametrize(("mode", "low", "high", "weights", "kept"), ROWS)
def test_each_mode_weighs_the_rows_of_gmpo(mode, low, high, weights, kept):
    moved = [[0.1, 0.3], [-0.1, 0.2]]
    x = inputs(moved, [1.0, -2.0], sampler=DIFFERENCES)
    loss, gradient = loss_and_gradient(correcting(mode, low, high, "gmpo", epsilon=0.4), x)
    expected, slopes = 0.0, []
    for row, advantage, weight, counts in zip(moved, (1.0, -2.0), weights, kept, strict=True):
        length = max(sum(counts), 1)
        rho = exp(sum(d for d, c in zip(row, counts, strict=True) if c) / length)
        expected += -advantage * weight * rho / 2
        slopes.append([-advantage * weight * rho * c / length / 2 for c in counts])
    equal(loss, expected)
    equal(gradient, slopes)


def test_the_default_drops_completions_whose_ratio_exceeds_three():
    loss, _ = loss_and_gradient(
        objective(), inputs([[0.0] * 2] * 2, [1.0, 1.0], sampler=DIFFERENCES)
    )
    equal(loss, -(0.5 + 0.5 + 0 + 0) / 4)


def test_bounds_are_inside():
    loss, _ = loss_and_gradient(
        correcting("token_mask", None, 1.0), inputs([[0.0]], [1.0], sampler=[[0.0]])
    )
    equal(loss, -1.0)


@pytest.mark.parametrize("algorithm", ["gmpo", "grpo"])
def test_no_report_or_the_option_off_leaves_the_loss_as_it_is(algorithm):
    plain = loss_and_gradient(objective(algorithm), inputs([[0.1, 0.2]], [1.0]))
    unreported = loss_and_gradient(
        objective(algorithm), inputs([[0.1, 0.2]], [1.0], sampler=[[NAN, NAN]])
    )
    off = objective(algorithm, vllm_importance_sampling_correction=False)
    switched_off = loss_and_gradient(off, inputs([[0.1, 0.2]], [1.0], sampler=[[1.0, 1.0]]))
    for loss, gradient in (unreported, switched_off):
        equal(loss, plain[0])
        equal(gradient, plain[1])


def test_the_old_name_of_the_upper_bound_wins():
    x = inputs([[0.0]], [1.0], sampler=[[log(4.0)]])
    mode = {"vllm_importance_sampling_mode": "token_truncate"}
    equal(loss_and_gradient(objective(vllm_importance_sampling_cap=2.0, **mode), x)[0], -2.0)


def test_differences_outside_of_the_mask_count_nowhere():
    x = inputs([[0.0, 0.0, 0.0]], [1.0], mask=[[1, 1, 0]], sampler=[[log(2.0), -log(4.0), 9.0]])
    for mode, weight in (("sequence_truncate", 0.5), ("geometric_truncate", 0.5**0.5)):
        equal(loss_and_gradient(correcting(mode, None, 3.0, "gmpo"), x)[0], -weight)


def test_ratios_beyond_the_floating_range_stay_finite():
    x = inputs([[0.0, 0.0]], [1.0], sampler=[[1000.0, -1000.0]])
    for mode in ("token_mask", "token_truncate"):
        for algorithm in ("gmpo", "grpo"):
            loss, gradient = loss_and_gradient(correcting(mode, 0.0, None, algorithm), x)
            assert torch.isfinite(loss) and torch.isfinite(gradient).all()


def test_the_correction_comes_after_the_selection():
    # the unselected token's weight of 3 is in no mean; the selected one's is
    x = inputs(
        [[0.0, 0.0]], [1.0], sampler=[[log(2.0), log(3.0)]], select=torch.tensor([[True, False]])
    )
    equal(loss_and_gradient(correcting("token_truncate", None, 9.0, "gmpo"), x)[0], -2.0)
    equal(loss_and_gradient(correcting("token_truncate", None, 9.0), x)[0], -2.0 / 2)
    equal(loss_and_gradient(correcting("sequence_truncate", None, 9.0, "gmpo"), x)[0], -6.0)


def test_rounding_noise_of_long_completions_leaves_gmpos_own_correction_at_1():
    """0.045 nats per token is what bfloat16 leaves between two ways to compute the same weights.

    Over 2,000 tokens the sum has a standard deviation of 2, the mean one of 0.001.
    """
    generator = torch.Generator().manual_seed(0)
    noise = 0.045 * torch.randn(200, 2000, generator=generator, dtype=torch.float64)
    mask = torch.ones(200, 2000, dtype=torch.bool)

    own = correction_from(GMPOConfig("out"))
    weight = own.weight(own.ratio(noise, mask))
    assert weight.shape == (200, 1)
    assert (weight - 1).abs().max() < 0.005

    sums = correction_from(GRPOConfig("out"))
    dropped = (sums.weight(sums.ratio(noise, mask)) == 0).double().mean()
    assert 0.2 < dropped < 0.4  # P(N(0, 2) > log 3) = 0.29


def test_a_correction_that_is_given_counts_for_gmpo():
    config = GMPOConfig("out", vllm_importance_sampling_mode="sequence_mask")
    assert correction_from(config).mode == "sequence_mask"
    assert correction_from(GMPOConfig("out")).mode == "geometric_mask"
    assert correction_from(GRPOConfig("out")).mode == "sequence_mask"
