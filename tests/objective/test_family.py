"""Properties that the rest of gmpo asks every member of the family for, held against its loss.

A row without signal may stay out of the passes only where it adds nothing, and rows may be packed
into other micro-batches only where that changes nothing.
"""

from dataclasses import replace

import pytest
import torch

from gmpo.objective.family import FAMILY, Member
from gmpo.objective.settings import LOSS_TYPES
from gmpo.objective.types import Denominators
from tests.objective.cases import counts, equal, inputs, loss_and_gradient, objective

LOG_RATIO = [[0.1, 0.3, -0.2], [0.2, 0.0, 0.4], [-0.1, 0.0, 0.1], [0.3, 0.3, 0.3]]
ADVANTAGES = [1.0, -0.5, 0.7, -2.0]
MASK = [[1, 1, 0], [1, 0, 0], [1, 1, 1], [1, 1, 1]]


def member(name, **options):
    """Return the objective of a member of the family."""
    if name == "gmpo":
        return objective("gmpo", **options)
    if name == "cispo":
        options["epsilon_high"] = 5.0
    return objective(loss_type=name, **options)


def gradient_in_micro_batches(objective, cuts):
    """Return the gradient of the four rows, [4, 3], trained on in micro-batches of these rows."""
    x = inputs(LOG_RATIO, ADVANTAGES, MASK)
    whole = counts(x)
    total = torch.zeros((), dtype=torch.float64)
    for rows in cuts:
        tensors = {name: getattr(x, name) for name in x.__slots__}
        cut = replace(x, **{n: t[rows] for n, t in tensors.items() if t is not None})
        denominators = replace(
            whole, micro_batch_tokens=float(cut.mask.sum()), micro_batches=float(len(cuts))
        )
        total = total + objective.loss(cut, denominators)[0]
    return torch.autograd.grad(total, x.logps)[0]


def test_loss_types_are_the_members_but_gmpo():
    assert set(LOSS_TYPES) == set(FAMILY) - {"gmpo"}


@pytest.mark.parametrize("name", FAMILY)
def test_members_know_if_micro_batches_change_their_update(name):
    here = gradient_in_micro_batches(member(name), [[0, 1], [2, 3]])
    repacked = gradient_in_micro_batches(member(name), [[0], [1, 2, 3]])
    fewer = gradient_in_micro_batches(member(name), [[0, 1, 2, 3]])
    changed = not torch.allclose(here, repacked) or not torch.allclose(here, fewer)
    assert member(name).depends_on_micro_batches == changed


@pytest.mark.parametrize("name", FAMILY)
def test_a_threshold_taken_in_micro_batches_depends_on_them(name):
    assert member(name, top_entropy_quantile=0.5).depends_on_micro_batches


@pytest.mark.parametrize("count", ["micro_batch_tokens", "micro_batches", "micro_batch_selected"])
def test_a_new_denominator_of_the_micro_batch_is_found(count):
    def mean(values, mask, denominators):
        return values.sum() / getattr(denominators, count)

    assert Member(FAMILY["grpo"].surrogate, mean).depends_on_micro_batches


@pytest.mark.parametrize("name", FAMILY)
def test_rows_without_advantage_add_nothing(name):
    x = inputs(LOG_RATIO, [0.0] * 4, MASK, sampler=[[0.1, -0.2, 0.3]] * 4)
    loss, gradient = loss_and_gradient(member(name), x)
    assert member(name).zero_advantage_is_inert(entropy_coef=0.0)
    equal(loss, 0.0)
    equal(gradient, torch.zeros(4, 3))


@pytest.mark.parametrize("name", FAMILY)
def test_kl_and_entropy_bonus_make_rows_without_advantage_count(name):
    assert not member(name, beta=0.1).zero_advantage_is_inert(entropy_coef=0.0)
    assert not member(name).zero_advantage_is_inert(entropy_coef=0.1)

    entropy = torch.ones(4, 3, dtype=torch.float64)
    x = inputs(LOG_RATIO, [0.0] * 4, MASK, reference=[[0.5] * 3] * 4, entropy=entropy)
    _, gradient = loss_and_gradient(member(name, beta=0.1), x)
    assert gradient.abs().sum() > 0
    loss, _ = loss_and_gradient(member(name), x, entropy_coef=0.1)
    equal(loss, -0.1)  # all entropies are 1


def test_denominators_name_every_count_of_a_micro_batch():
    """`Member.depends_on_micro_batches` varies these: another one would need to be varied too."""
    local = {name for name in Denominators.__slots__ if name.startswith("micro_batch")}
    assert local == {"micro_batch_tokens", "micro_batches", "micro_batch_selected"}
