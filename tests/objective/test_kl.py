"""The k3 divergence by hand: exp(q) - q - 1, q = ref_logp - logp; its slope in logp is 1 - exp(q)."""

from math import exp

import pytest
import torch

from gmpo.objective.types import Denominators
from tests.objective.cases import equal, inputs, log, loss_and_gradient, objective

MASK = [[1, 0, 0], [1, 1, 1]]
COUNTS = Denominators(
    num_rows=4, tokens=10, micro_batch_tokens=5, micro_batches=3, max_completion_length=8
)
K3 = 2 - log(2.0) - 1  # q = log 2 at every counted token
WEIGHTS = {  # of a token of the first row and of the second row in the loss
    "gmpo": (1 / 4, 1 / 12),
    "grpo": (1 / 4, 1 / 12),
    "dr_grpo": (1 / 32, 1 / 32),
    "dapo": (1 / 10, 1 / 10),
    "luspo": (1 / 4, 1 / 4),
}


def case(log_ratio=0.0, **fields):
    """No advantage, so that all loss is divergence."""
    reference = [[log(2.0), torch.nan, torch.inf], [log(2.0)] * 3]
    return inputs([[log_ratio] * 3] * 2, [0.0, 0.0], MASK, reference=reference, **fields)


def beta(loss_type, **options):
    return objective(
        "gmpo" if loss_type == "gmpo" else "grpo", loss_type=loss_type, beta=0.1, **options
    )


@pytest.mark.parametrize("loss_type", WEIGHTS)
def test_the_divergence_is_averaged_like_the_surrogate(loss_type):
    first, second = WEIGHTS[loss_type]
    loss, gradient = loss_and_gradient(beta(loss_type), case(), COUNTS)
    equal(loss, 0.1 * K3 * (first + 3 * second))
    equal(gradient, [[0.1 * (1 - 2) * first, 0.0, 0.0], [0.1 * (1 - 2) * second] * 3])


def test_the_divergence_keeps_unselected_tokens():
    select = torch.tensor([[False] * 3, [True, False, False]])
    for loss_type in ("gmpo", "dapo"):
        equal(
            loss_and_gradient(beta(loss_type), case(select=select), COUNTS)[0],
            loss_and_gradient(beta(loss_type), case(), COUNTS)[0],
        )


def test_the_bias_correction_weighs_each_token_by_its_ratio_with_its_gradient():
    loss, gradient = loss_and_gradient(
        beta("dapo", use_bias_correction_kl=True), case(log_ratio=0.3), COUNTS
    )
    equal(loss, 0.1 * 4 * K3 * exp(0.3) / 10)
    slope = 0.1 * exp(0.3) * (K3 + 1 - 2) / 10  # of k3 exp(d): exp(d) (k3 + k3')
    equal(gradient, [[slope, 0.0, 0.0], [slope] * 3])


def test_small_divergences_keep_their_digits():
    loss, _ = loss_and_gradient(objective(beta=1.0), inputs([[0.0]], [0.0], reference=[[1e-7]]))
    torch.testing.assert_close(loss.item(), 5e-15, rtol=1e-2, atol=0.0)  # q^2 / 2
