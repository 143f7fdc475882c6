"""PPO's clipped ratio: by hand, and against the formula as papers print it."""

from math import exp

import pytest
import torch

from tests.objective.cases import equal, inputs, log, loss_and_gradient, objective, surrogate_of

# (A, w) -> (loss, gradient in logp) with the window (0.8, 1.2) and delta = 3
BY_HAND = [
    (1.0, 1.1, -1.1, -1.1),
    (1.0, 0.5, -0.5, -0.5),  # below the window, but A > 0 only fears large ratios
    (1.0, 1.5, -1.2, 0.0),
    (2.0, 1.5, -2.4, 0.0),
    (-1.0, 1.5, 1.5, 1.5),
    (-1.0, 0.5, 0.8, 0.0),
    (-1.0, 2.9, 2.9, 2.9),
    (-1.0, 5.0, 3.0, 0.0),  # delta
    (0.0, 5.0, 0.0, 0.0),
]


@pytest.mark.parametrize(("advantage", "ratio", "cost", "slope"), BY_HAND)
def test_a_token_costs_what_ppo_says(advantage, ratio, cost, slope):
    loss, gradient = loss_and_gradient(
        objective(loss_type="grpo", epsilon=0.2, delta=3.0), inputs([[log(ratio)]], [advantage])
    )
    equal(loss, cost)
    equal(gradient, [[slope]])


def printed_formula(logps, old_logps, advantages, low, high, delta):
    ratio = (logps - old_logps).exp()
    first = ratio if delta is None else ratio.clamp(max=delta)
    return -torch.minimum(first * advantages, ratio.clamp(1 - low, 1 + high) * advantages)


@pytest.mark.parametrize("delta", [None, 2.0])
def test_the_one_sided_bound_is_the_minimum_of_two_products(delta):
    generator = torch.Generator().manual_seed(0)
    ratios = torch.randn(50, 4, generator=generator, dtype=torch.float64)
    x = inputs(ratios.tolist(), torch.randn(50, generator=generator).tolist())
    expected = printed_formula(x.logps, x.old_logps, x.advantages, 0.2, 0.28, delta).mean()
    (expected_gradient,) = torch.autograd.grad(expected, x.logps)
    loss, gradient = loss_and_gradient(
        objective(loss_type="dapo", epsilon=0.2, epsilon_high=0.28, delta=delta), x
    )
    equal(loss, expected.detach())
    equal(gradient, expected_gradient)


def test_clip_marks_tell_low_from_high():
    surrogate = surrogate_of(
        objective(epsilon=0.2, delta=3.0),
        inputs([[log(r) for r in (0.5, 1.0, 1.5, 5.0)]] * 2, [1, -1]),
    )
    assert surrogate.capped_high.tolist() == [
        [False, False, True, True],
        [False, False, False, True],
    ]
    assert surrogate.capped_low.tolist() == [[False] * 4, [True, False, False, False]]
    equal(surrogate.ratio, [[(0.5 + 1 + 1.2 + 1.2) / 4], [(0.8 + 1 + 1.5 + 3) / 4]])


def test_an_epsilon_of_one_or_more_leaves_small_ratios_alone():
    for epsilon in (1.0, 1.5):
        loss, gradient = loss_and_gradient(
            objective(epsilon=epsilon), inputs([[log(1e-3)]], [-1.0])
        )
        equal(loss, 1e-3)
        equal(gradient, [[1e-3]])


def test_the_sequence_level_clips_one_geometric_mean_per_completion():
    # GSPO: mean log-ratios log 1.1 (inside of 1.2) and log 1.3 (outside)
    x = inputs(
        [[log(1.1) + 1, log(1.1) - 1, 9.0], [log(1.3)] * 3], [1.0, 1.0], mask=[[1, 1, 0], [1, 1, 1]]
    )
    gspo = objective(loss_type="grpo", epsilon=0.2, importance_sampling_level="sequence")
    loss, gradient = loss_and_gradient(gspo, x)
    equal(loss, -(1.1 + 1.2) / 2)
    equal(gradient, [[-1.1 / 4, -1.1 / 4, 0.0], [0.0] * 3])
    assert surrogate_of(gspo, x).capped_high.tolist() == [[False] * 3, [True] * 3]


def test_the_sequence_level_takes_all_counted_tokens_for_the_ratio_and_charges_the_selected():
    x = inputs([[0.3, -0.1]], [1.0], select=torch.tensor([[True, False]]))
    loss, gradient = loss_and_gradient(
        objective(loss_type="grpo", importance_sampling_level="sequence"), x
    )
    equal(loss, -exp(0.1) / 2)  # one of two tokens is charged
    equal(gradient, [[-exp(0.1) / 4] * 2])  # the ratio depends on both


def test_unselected_tokens_cost_nothing_and_stay_in_the_denominator():
    x = inputs([[0.1, 0.2]], [1.0], select=torch.tensor([[True, False]]))
    grpo = objective(loss_type="grpo")
    loss, gradient = loss_and_gradient(grpo, x)
    equal(loss, -exp(0.1) / 2)
    equal(gradient, [[-exp(0.1) / 2, 0.0]])
    equal(surrogate_of(grpo, x).ratio, [[exp(0.1)]])
