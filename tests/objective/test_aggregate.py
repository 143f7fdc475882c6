"""Two rows of lengths 1 and 3, advantages 1 and 2, unmoved: token losses -1 | -2 -2 -2, with given denominators."""

import pytest

from gmpo.objective.types import Denominators
from tests.objective.cases import equal, inputs, loss_and_gradient, objective

MASK = [[1, 0, 0], [1, 1, 1]]
COUNTS = Denominators(
    num_rows=4, tokens=10, micro_batch_tokens=5, micro_batches=3, max_completion_length=8
)

BY_HAND = {  # loss, gradient of the first row's token, gradient of each of the second row's tokens
    "grpo": (-(1 + 2) / 4, -1 / 4, -2 / 3 / 4),
    "bnpo": (-7 / 5 / 3, -1 / 15, -2 / 15),
    "dr_grpo": (-7 / (4 * 8), -1 / 32, -2 / 32),
    "dapo": (-7 / 10, -1 / 10, -2 / 10),
    "luspo": (-7 / 4, -1 / 4, -2 / 4),
}


@pytest.mark.parametrize("loss_type", BY_HAND)
def test_each_loss_type_divides_by_its_own_count(loss_type):
    expected, first, second = BY_HAND[loss_type]
    loss, gradient = loss_and_gradient(
        objective(loss_type=loss_type), inputs([[0.0] * 3] * 2, [1.0, 2.0], MASK), COUNTS
    )
    equal(loss, expected)
    equal(gradient, [[first, 0.0, 0.0], [second] * 3])


def test_gmpo_divides_by_the_rows_of_the_optimizer_batch():
    loss, gradient = loss_and_gradient(
        objective("gmpo"), inputs([[0.0] * 3] * 2, [1.0, 2.0], MASK), COUNTS
    )
    equal(loss, -(1 + 2) / 4)
    equal(gradient, [[-1 / 4, 0.0, 0.0], [-2 / 3 / 4] * 3])


@pytest.mark.parametrize("loss_type", ["bnpo", "dapo"])
def test_a_batch_without_counted_tokens_has_no_loss(loss_type):
    nothing = Denominators(
        num_rows=1, tokens=0, micro_batch_tokens=0, micro_batches=1, max_completion_length=8
    )
    loss, gradient = loss_and_gradient(
        objective(loss_type=loss_type), inputs([[0.0]], [1.0], [[0]]), nothing
    )
    equal(loss, 0.0)
    equal(gradient, [[0.0]])
