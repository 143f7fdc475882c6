"""The entropy bonus and its controller."""

import json
import math
from dataclasses import replace

import pytest
import torch

from gmpo.objective.entropy_bonus import EntropyController
from gmpo.objective.settings import ObjectiveSettings
from gmpo.objective.types import Denominators
from tests.objective.cases import double, equal, inputs, objective

COUNTS = Denominators(
    num_rows=4, tokens=10, micro_batch_tokens=5, micro_batches=3, max_completion_length=8
)


@pytest.mark.parametrize("loss_type", ["gmpo", "dapo"])
def test_the_bonus_is_the_token_mean_of_the_entropy_over_the_optimizer_batch(loss_type):
    entropy = double([[0.5, 1.5, torch.nan]]).requires_grad_()
    select = torch.tensor([[True, False, False]])
    x = inputs([[0.0] * 3], [0.0], mask=[[1, 1, 0]], select=select, entropy=entropy)
    member = objective("gmpo" if loss_type == "gmpo" else "grpo", loss_type=loss_type)
    loss, _ = member.loss(x, COUNTS, entropy_coef=0.3)
    equal(loss.detach(), -0.3 * 2 / 10)  # unselected tokens count as well
    equal(torch.autograd.grad(loss, entropy)[0], [[-0.03, -0.03, 0.0]])


@pytest.mark.parametrize("loss_type", ["gmpo", "dapo"])
def test_beside_a_selection_the_bonus_is_the_mean_of_selected_tokens(loss_type):
    """Of 2 selected tokens of the micro-batch, one is here; there are 3 micro-batches."""
    entropy = double([[0.5, 1.5, torch.nan]]).requires_grad_()
    select = torch.tensor([[False, True, False]])
    x = inputs([[0.0] * 3], [0.0], mask=[[1, 1, 0]], select=select, entropy=entropy)
    algorithm = "gmpo" if loss_type == "gmpo" else "grpo"
    member = objective(algorithm, loss_type=loss_type, top_entropy_quantile=0.5)
    counts = replace(COUNTS, micro_batch_selected=2)
    loss, figures = member.loss(x, counts, entropy_coef=0.3)
    equal(loss.detach(), -0.3 * 1.5 / (2 * 3))
    equal(torch.autograd.grad(loss, entropy)[0], [[0.0, -0.05, 0.0]])
    assert [float(value) for value in figures.means["entropy/selected"]] == [1.5, 1.0]
    assert [float(value) for value in figures.means["entropy"]] == [2.0, 2.0]


def test_without_a_coefficient_the_entropy_gets_no_gradient():
    entropy = double([[0.5]]).requires_grad_()
    loss, _ = objective("gmpo").loss(inputs([[0.0]], [1.0], entropy=entropy), COUNTS)
    assert torch.autograd.grad(loss, entropy, allow_unused=True) == (None,)


def adaptive(**options):
    settings = {
        "use_adaptive_entropy": True,
        "entropy_target": 0.5,
        "entropy_coef_delta": 0.1,
        **options,
    }
    return EntropyController(ObjectiveSettings(**settings))


def test_a_constant_coefficient_stays_whatever_the_entropy():
    controller = EntropyController(ObjectiveSettings(entropy_coef=0.02))
    for entropy in (0.0, 9.0):
        controller.update(entropy)
        assert controller.coef == 0.02


def test_the_coefficient_rises_under_the_target_and_falls_above():
    controller = adaptive(entropy_coef=0.3)
    seen = []
    for entropy in (0.4, 0.5, 0.2, 0.6, 0.7, 0.1):
        controller.update(entropy)
        seen.append(controller.coef)
    # held: 0.4, 0.4 (on target), 0.5, 0.4, 0.3, 0.4; it acts at or under the target only
    assert seen == pytest.approx([0.4, 0.4, 0.5, 0.0, 0.0, 0.4])


def test_the_coefficient_stays_in_its_range():
    controller = adaptive(entropy_coef=0.95)
    for _ in range(3):
        controller.update(0.1)
    assert controller.coef == 1.0
    controller = adaptive(entropy_coef=0.05, entropy_coef_min=0.02)
    for _ in range(3):
        controller.update(0.9)
    assert controller.coefficient == 0.02


def test_the_start_is_moved_into_the_range():
    assert adaptive(entropy_coef=0.0, entropy_coef_min=0.1).coefficient == 0.1


def test_nothing_acts_before_an_entropy_is_known():
    assert adaptive(entropy_coef=0.3).coef == 0.0


def test_a_step_without_tokens_changes_nothing():
    controller = adaptive(entropy_coef=0.3)
    controller.update(0.4)
    controller.update(math.nan)
    assert controller.coef == pytest.approx(0.4)


def test_a_restored_controller_goes_on_as_the_saved_one():
    first, second = adaptive(entropy_coef=0.3), adaptive()
    first.update(0.4)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    for entropy in (0.2, 0.9, 0.3):
        assert second.coef == first.coef
        first.update(entropy)
        second.update(entropy)
    assert second.coef == first.coef != 0
