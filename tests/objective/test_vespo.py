"""VESPO by hand: cost -phi A logp, phi = exp(lam + k log W - lam W).  Log-probs are -1, -1.25, ... along the tokens."""

from math import exp

import pytest

from tests.objective.cases import equal, inputs, log, loss_and_gradient, objective, surrogate_of

OPTIONS = {
    "loss_type": "vespo",
    "vespo_k_pos": 2.0,
    "vespo_lambda_pos": 3.0,
    "vespo_k_neg": 1.0,
    "vespo_lambda_neg": 0.5,
}


def phi(log_weight, k, lam):
    return exp(lam + k * log_weight - lam * exp(log_weight))


@pytest.mark.parametrize(
    ("advantage", "k", "lam"), [(2.0, 2.0, 3.0), (-2.0, 1.0, 0.5), (0.0, 2.0, 3.0)]
)
def test_all_tokens_share_the_kernel_of_the_product_of_their_ratios(advantage, k, lam):
    x = inputs([[0.3, -0.1, 5.0]], [advantage], mask=[[1, 1, 0]])
    vespo = objective(**OPTIONS)
    loss, gradient = loss_and_gradient(vespo, x)
    weight = phi(0.2, k, lam)
    equal(loss, advantage * weight * (1 + 1.25) / 2)
    equal(gradient, [[-advantage * weight / 2] * 2 + [0.0]])
    equal(surrogate_of(vespo, x).ratio, [[weight]])


def test_an_unmoved_completion_has_weight_one():
    equal(surrogate_of(objective(**OPTIONS), inputs([[0.0] * 3], [1.0])).ratio, [[1.0]])


@pytest.mark.parametrize(
    ("log_ratios", "log_weight"),
    [
        ([30.0, -19.5], 0.5),
        ([-30.0, 19.5], -0.5),
        ([15.0, 15.0], 20.0),
        ([-15.0, -15.0], log(1e-8)),
    ],
)
def test_token_log_ratios_and_their_sum_are_clamped(log_ratios, log_weight):
    weight = surrogate_of(objective(**OPTIONS), inputs([log_ratios], [-1.0])).ratio
    equal(weight, [[phi(log_weight, 1.0, 0.5)]])


CORRECTIONS = [  # of the differences 0.3 and 2
    ("token_truncate", {}, 0.3 + log(3.0)),
    ("token_mask", {}, 0.3 + log(1e-8)),
    ("sequence_truncate", {"vllm_importance_sampling_clip_max": 20.0}, 2.3),
    ("sequence_truncate", {}, log(3.0)),
    (
        "token_truncate",
        {"vllm_importance_sampling_clip_max": 0.5},
        2 * log(0.5),
    ),  # of 2 counted tokens
]


@pytest.mark.parametrize(("mode", "bounds", "log_correction"), CORRECTIONS)
def test_the_correction_is_a_factor_of_the_weight_and_not_of_the_cost(mode, bounds, log_correction):
    x = inputs([[0.1, 0.1, 0.0]], [-1.0], mask=[[1, 1, 0]], sampler=[[0.3, 2.0, float("nan")]])
    vespo = objective(**OPTIONS, vllm_importance_sampling_mode=mode, **bounds)
    equal(surrogate_of(vespo, x).ratio, [[phi(max(0.2 + log_correction, log(1e-8)), 1.0, 0.5)]])


def test_a_masked_completion_costs_nothing():
    x = inputs([[0.1]], [1.0], sampler=[[2.0]])
    loss, gradient = loss_and_gradient(
        objective(**OPTIONS, vllm_importance_sampling_mode="sequence_mask"), x
    )
    equal(loss, 0.0)
    equal(gradient, [[0.0]])
