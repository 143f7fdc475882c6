"""SAPO by hand: cost -A sigmoid(tau (w - 1)) 4 / tau, slope in logp -A w 4 s (1 - s)."""

from math import exp

import pytest

from tests.objective.cases import equal, inputs, log, loss_and_gradient, objective

SAPO = {"loss_type": "sapo", "sapo_temperature_pos": 2.0, "sapo_temperature_neg": 3.0}


@pytest.mark.parametrize(("advantage", "tau"), [(1.5, 2.0), (-1.5, 3.0)])
def test_the_gate_takes_its_temperature_by_the_sign_of_the_advantage(advantage, tau):
    s = 1 / (1 + exp(-tau * 0.4))
    loss, gradient = loss_and_gradient(objective(**SAPO), inputs([[log(1.4)]], [advantage]))
    equal(loss, -advantage * s * 4 / tau)
    equal(gradient, [[-advantage * 1.4 * 4 * s * (1 - s)]])


def test_the_slope_of_an_unmoved_token_is_that_of_grpo():
    _, gradient = loss_and_gradient(
        objective(**SAPO), inputs([[0.0, 0.0], [0.0, 0.0]], [1.0, -2.0])
    )
    equal(gradient, [[-0.25, -0.25], [0.5, 0.5]])


def test_rows_weigh_the_same_whatever_their_length():
    loss, _ = loss_and_gradient(
        objective(**SAPO), inputs([[0.0] * 3, [0.0] * 3], [2.0, 4.0], mask=[[1, 0, 0], [1] * 3])
    )
    equal(loss, -(2 + 4) / 2)  # sigmoid(0) 4 / tau = 1 at tau = 2


def test_a_ratio_beyond_the_floating_range_has_no_slope():
    loss, gradient = loss_and_gradient(objective(**SAPO), inputs([[1000.0, 0.0]], [-1.0]))
    equal(loss, (4 / 3 + 2 / 3) / 2)
    equal(gradient, [[0.0, 0.5]])


def test_the_sequence_level_gates_one_geometric_mean():
    s = 1 / (1 + exp(-2 * 0.4))
    x = inputs([[log(1.4) + 2, log(1.4) - 2]], [1.0])
    loss, gradient = loss_and_gradient(objective(**SAPO, importance_sampling_level="sequence"), x)
    equal(loss, -s * 2)
    equal(gradient, [[-1.4 * 4 * s * (1 - s) / 2] * 2])
