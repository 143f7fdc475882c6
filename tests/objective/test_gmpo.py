"""GMPO against the closed forms of its specification, and each of its choices by hand."""

import json
from math import exp, sqrt
from pathlib import Path

import pytest
import torch

from gmpo.objective.types import Denominators, ObjectiveInputs
from tests.objective.cases import (
    double,
    equal,
    inputs,
    log,
    loss_and_gradient,
    objective,
    surrogate_of,
)

VECTORS = json.loads((Path(__file__).parent / "gmpo_vectors.json").read_text())


def from_vector(case: dict) -> tuple[ObjectiveInputs, Denominators]:
    mask = torch.tensor(case["mask"], dtype=torch.bool)
    x = ObjectiveInputs(
        logps=double(case["logp_new"]).requires_grad_(),
        old_logps=double(case["logp_old"]),
        advantages=double(case["advantages"])[:, None],
        mask=mask,
        select=mask,
    )
    tokens = float(mask.sum())
    return x, Denominators(len(mask), tokens, tokens, 1, 8)


@pytest.mark.parametrize("case", VECTORS["cases"], ids=lambda case: case["name"])
def test_vectors_give_loss_ratio_gradient_and_clip_marks(case):
    gmpo = objective(
        "gmpo",
        epsilon=case.get("eps_low", case.get("eps")),
        epsilon_high=case.get("eps_high", case.get("eps")),
    )
    x, denominators = from_vector(case)
    expected = case["expected"]["gmpo"]
    loss, gradient = loss_and_gradient(gmpo, x, denominators=denominators)
    surrogate = surrogate_of(gmpo, x)
    equal(loss, expected["loss"], VECTORS["tolerance"])
    equal(gradient, expected["grad"], VECTORS["tolerance"])
    equal(surrogate.ratio[:, 0], expected["coef"], VECTORS["tolerance"])
    equal(surrogate.loss[:, 0].detach(), expected["row_loss"], VECTORS["tolerance"])
    assert (surrogate.capped_low | surrogate.capped_high).int().tolist() == expected["clipped"]


def test_epsilon_high_bounds_positive_advantages_and_epsilon_negative_ones():
    gmpo = objective("gmpo", epsilon=0.2, epsilon_high=0.6)
    loss, gradient = loss_and_gradient(gmpo, inputs([[0.5, 0.1]], [1.0]))
    equal(loss, -exp(0.3))  # 0.5 is inside of 0.6: (0.5 + 0.1) / 2
    equal(gradient, [[-exp(0.3) / 2, -exp(0.3) / 2]])
    loss, gradient = loss_and_gradient(gmpo, inputs([[-0.5, 0.1]], [-1.0]))
    equal(loss, exp(-0.05))  # -0.5 is raised to -0.2: (-0.2 + 0.1) / 2
    equal(gradient, [[0.0, exp(-0.05) / 2]])


def test_epsilon_high_is_epsilon_unless_given():
    loss, _ = loss_and_gradient(objective("gmpo", epsilon=0.3), inputs([[2.0]], [1.0]))
    equal(loss, -exp(0.3))


def test_clip_marks_tell_low_from_high():
    surrogate = surrogate_of(
        objective("gmpo", epsilon=0.4), inputs([[1.0, 0.1, -0.9]] * 2, [1.0, -1.0])
    )
    assert surrogate.capped_high.tolist() == [[True, False, False], [False] * 3]
    assert surrogate.capped_low.tolist() == [[False] * 3, [False, False, True]]


def test_delta_bounds_runaway_tokens_of_negative_advantages():
    gmpo = objective("gmpo", epsilon=0.4, delta=1.0)
    x = inputs([[50.0, 0.0, 0.0, 0.0]], [-1.0])
    loss, gradient = loss_and_gradient(gmpo, x)
    equal(loss, exp(0.25))  # (1 + 0 + 0 + 0) / 4
    equal(gradient, [[0.0] + [exp(0.25) / 4] * 3])
    assert surrogate_of(gmpo, x).capped_high.tolist() == [[True, False, False, False]]


def test_delta_leaves_positive_advantages_to_the_window():
    loss, _ = loss_and_gradient(
        objective("gmpo", epsilon=0.4, delta=1.0), inputs([[50.0, 0.0]], [1.0])
    )
    equal(loss, -exp(0.2))


def test_sequence_level_clips_the_sum_before_it_is_divided_by_the_length():
    gmpo = objective("gmpo", epsilon=0.4, importance_sampling_level="sequence")
    x = inputs([[0.3, 0.3, -0.1], [0.3, 0.3, -0.1], [-0.1, 0.2, 0.0]], [1.0, -1.0, 1.0])
    loss, gradient = loss_and_gradient(gmpo, x)
    capped, free, inside = (
        exp(0.4 / 3),
        exp(0.5 / 3),
        exp(0.1 / 3),
    )  # sums 0.5 (capped to 0.4), 0.5 (A < 0: free), 0.1
    equal(loss, (-capped + free - inside) / 3)
    equal(gradient, [[0.0] * 3, [free / 9] * 3, [-inside / 9] * 3])
    assert surrogate_of(gmpo, x).capped_high.tolist() == [[True] * 3, [False] * 3, [False] * 3]


def test_a_row_of_zero_advantage_is_bounded_lest_zero_times_infinity_be_nan():
    x = inputs([[500.0, 0.0], [0.1, 0.1]], [0.0, 1.0])
    single = ObjectiveInputs(
        x.logps.detach().float().requires_grad_(),
        x.old_logps.float(),
        x.advantages.float(),
        x.mask,
        x.select,
    )
    loss, gradient = loss_and_gradient(objective("gmpo", epsilon=0.4), single)
    equal(loss, -exp(0.1) / 2, 1e-6)
    equal(gradient, [[0.0, 0.0], [-exp(0.1) / 4] * 2], 1e-6)


def test_only_selected_tokens_are_in_the_mean_and_in_its_length():
    x = inputs([[0.1, 9.0, 0.3]], [1.0], select=torch.tensor([[True, False, True]]))
    loss, gradient = loss_and_gradient(objective("gmpo", epsilon=0.4), x)
    equal(loss, -exp(0.2))
    equal(gradient, [[-exp(0.2) / 2, 0.0, -exp(0.2) / 2]])


def test_a_selection_outside_of_the_mask_is_none():
    x = inputs([[0.1, 0.3]], [1.0], mask=[[1, 0]], select=torch.tensor([[True, True]]))
    loss, gradient = loss_and_gradient(objective("gmpo", epsilon=0.4), x)
    equal(loss, -exp(0.1))
    equal(gradient, [[-exp(0.1), 0.0]])


def test_the_sequence_level_sums_and_counts_selected_tokens():
    x = inputs([[0.1, 9.0, 0.2]], [1.0], select=torch.tensor([[True, False, True]]))
    loss, gradient = loss_and_gradient(
        objective("gmpo", epsilon=0.4, importance_sampling_level="sequence"), x
    )
    equal(loss, -exp(0.15))
    equal(gradient, [[-exp(0.15) / 2, 0.0, -exp(0.15) / 2]])


@pytest.mark.parametrize(
    "options", [{}, {"importance_sampling_level": "sequence"}, {"mean_power": 2.0}], ids=str
)
def test_a_row_without_counted_tokens_costs_nothing_and_stays_in_the_denominator(options):
    x = inputs([[0.1, 0.1], [3.0, 3.0]], [1.0, 1.0], mask=[[1, 1], [0, 0]])
    gmpo = objective("gmpo", epsilon=0.4, **options)
    loss, gradient = loss_and_gradient(gmpo, x)
    equal(loss, -exp(0.1) / 2)
    equal(gradient, [[-exp(0.1) / 4] * 2, [0.0] * 2])
    equal(surrogate_of(gmpo, x).ratio[1], [1.0])


# Ratios (1.2, 0.8).  Gradient of the power mean M in logp_t: M r_t^p / sum_k r_k^p.
POWER_MEANS = {
    2.0: (sqrt(1.04), (1.44 / 2.08, 0.64 / 2.08)),  # sqrt((1.44 + 0.64) / 2)
    1.0: (1.0, (0.6, 0.4)),
    -1.0: (0.96, (0.4, 0.6)),  # 2 / (1 / 1.2 + 1 / 0.8)
    0.0: (sqrt(0.96), (0.5, 0.5)),
}


@pytest.mark.parametrize("power", POWER_MEANS)
def test_mean_power_gives_the_power_mean_of_the_ratios(power):
    mean, shares = POWER_MEANS[power]
    x = inputs([[log(1.2), log(0.8), 7.0]], [1.0], mask=[[1, 1, 0]])
    loss, gradient = loss_and_gradient(objective("gmpo", epsilon=0.4, mean_power=power), x)
    equal(loss, -mean)
    equal(gradient, [[-mean * shares[0], -mean * shares[1], 0.0]])


def test_the_power_mean_is_of_clipped_ratios():
    x = inputs([[log(9.0), log(0.8)]], [1.0])
    loss, gradient = loss_and_gradient(objective("gmpo", epsilon=log(1.2), mean_power=1.0), x)
    equal(loss, -1.0)  # (1.2 + 0.8) / 2
    equal(gradient, [[0.0, -0.4]])


@pytest.mark.parametrize("power", [2e-3, -2e-3, 5e-4])
def test_the_power_mean_passes_through_the_geometric_one(power):
    # log M_p = mean + p variance / 2 + O(p^2); the log-ratios have mean 0.1 and variance 0.04
    loss, _ = loss_and_gradient(
        objective("gmpo", epsilon=0.4, mean_power=power), inputs([[0.3, -0.1]], [1.0])
    )
    equal(loss, -exp(0.1 + power * 0.02), 2e-5)


def test_mean_power_final_is_reached_linearly():
    gmpo = objective("gmpo", epsilon=0.4, mean_power=1.0, mean_power_final=-1.0)
    x = inputs([[log(1.2), log(0.8)]], [1.0])
    for progress, power in ((0.0, 1.0), (0.5, 0.0), (1.0, -1.0), (1.2, -1.0)):
        loss, _ = loss_and_gradient(gmpo, x, progress=progress)
        equal(loss, -POWER_MEANS[power][0])
    equal(
        loss_and_gradient(gmpo, x, progress=0.25)[0], -(((sqrt(1.2) + sqrt(0.8)) / 2) ** 2)
    )  # power 1/2


def test_the_advantage_of_a_row_with_one_per_token_is_their_mean():
    x = inputs([[0.1, 0.3]], [[1.0, 2.0]])
    loss, gradient = loss_and_gradient(objective("gmpo", epsilon=0.4), x)
    equal(loss, -1.5 * exp(0.2))
    equal(gradient, [[-0.75 * exp(0.2)] * 2])
