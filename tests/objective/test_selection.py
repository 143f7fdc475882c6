"""Which rows and tokens receive a policy gradient."""

import pytest
import torch

from gmpo.objective.selection import entropy_threshold, high_entropy_tokens
from tests.objective.cases import double, equal, inputs, loss_and_gradient, objective

NAN = float("nan")


@pytest.mark.parametrize(
    ("share", "threshold"),
    [
        (1.0, 0.0),
        (0.5, 2.0),
        (0.25, 3.0),
        (0.4, 2.4),
        (0.01, 3.96),
    ],  # position (1 - share) * 4 in 0, 1, 2, 3, 4
)
def test_the_threshold_is_the_quantile_of_the_share_that_is_kept(share, threshold):
    equal(entropy_threshold(double([3.0, 1.0, 4.0, 0.0, 2.0]), share), threshold)


@pytest.mark.parametrize("share", [0.05, 0.2, 0.37, 0.8, 0.999])
def test_the_threshold_is_that_of_torch(share):
    entropies = torch.rand(1001, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    equal(entropy_threshold(entropies, share), torch.quantile(entropies, 1 - share))


def test_more_tokens_than_torch_takes_have_a_threshold():
    many = torch.arange(2**24 + 5, dtype=torch.float32)
    with pytest.raises(RuntimeError):
        torch.quantile(many, 0.75)
    assert entropy_threshold(many, 0.25).item() == 0.75 * (2**24 + 4)


def test_no_token_gives_a_threshold_that_none_reaches():
    assert entropy_threshold(torch.empty(0), 0.2).item() == torch.inf


def test_tokens_at_the_threshold_are_kept_and_uncounted_ones_are_not():
    mask = torch.tensor([[True, True, True, False]])
    entropy = torch.tensor([[0.5, 1.0, 2.0, 9.0]])
    kept = high_entropy_tokens(mask, entropy, torch.tensor(1.0))
    assert kept.tolist() == [[False, True, True, False]]


# A < 0 and mean(sampler_logp - logp) = 0.5, 0.7; A > 0 with 0.7.  sampler_logp - logp = -log_ratio - difference.
DRIFTED = {"log_ratio": [[-0.5, -0.5], [-0.5, -0.9], [-0.5, -0.9]], "advantages": [-1.0, -1.0, 1.0]}
OFF = {"vllm_importance_sampling_correction": False}


@pytest.mark.parametrize("algorithm", ["gmpo", "grpo"])
def test_drifted_rows_of_negative_advantage_are_dropped(algorithm):
    options = {"epsilon": 5.0, "loss_type": "gmpo" if algorithm == "gmpo" else "grpo"}
    plain = loss_and_gradient(objective(algorithm, **options), inputs(**DRIFTED))[1]
    loss, gradient = loss_and_gradient(
        objective(algorithm, off_policy_mask_threshold=0.6, **options), inputs(**DRIFTED)
    )
    equal(gradient, plain * double([[1.0], [0.0], [1.0]]))  # denominators stay
    assert torch.isfinite(loss)


def test_the_drift_is_from_the_sampler_where_it_reported_and_from_the_old_policy_elsewhere():
    # the sampler is 0.2 above the old policy for the first token: mean drift 0.6 in the first row, without it 0.5
    sampler = [[-0.2, NAN], [0.0, NAN], [0.0, NAN]]
    masked = objective("gmpo", off_policy_mask_threshold=0.55, epsilon=5.0, **OFF)
    gradient = loss_and_gradient(masked, inputs(**DRIFTED, sampler=sampler))[1]
    assert (gradient != 0).any(1).tolist() == [False, False, True]
    gradient = loss_and_gradient(masked, inputs(**DRIFTED))[1]
    assert (gradient != 0).any(1).tolist() == [True, False, True]


def test_the_drift_is_of_counted_tokens():
    x = inputs([[-0.1, -9.0]], [-1.0], mask=[[1, 0]])
    gradient = loss_and_gradient(objective("gmpo", off_policy_mask_threshold=0.5), x)[1]
    assert gradient[0, 0] != 0


def test_a_drift_at_the_threshold_is_kept():
    gmpo = objective("gmpo", off_policy_mask_threshold=0.25, epsilon=0.4)
    gradient = loss_and_gradient(gmpo, inputs([[-0.25]], [-1.0]))[1]
    assert gradient[0, 0] != 0


def test_a_dropped_row_of_unbounded_ratio_leaves_no_trace():
    x = inputs([[800.0, -2000.0]], [-1.0])
    for options in (
        {"loss_type": "grpo"},
        {"loss_type": "grpo", "importance_sampling_level": "sequence"},
    ):
        loss, gradient = loss_and_gradient(objective(off_policy_mask_threshold=0.5, **options), x)
        equal(loss, 0.0)
        equal(gradient, [[0.0, 0.0]])
