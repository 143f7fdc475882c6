"""What the sampler/trainer correction is for, exactly: expectations by enumeration of every completion.

An engine samples at another temperature than the trainer believes.  Rows are all completions, weighted by the engine's
probability; the loss is linear in a positive factor of the advantage, so the weights go there.
"""

from itertools import product

import pytest
import torch
from torch import Tensor

from gmpo.objective.types import Denominators, ObjectiveInputs
from tests.objective.cases import double, objective

VOCABULARY = 3
ONE_ROW = Denominators(
    num_rows=1, tokens=1, micro_batch_tokens=1, micro_batches=1, max_completion_length=1
)


def policy(length: int) -> tuple[Tensor, Tensor, Tensor]:
    """Logits [V^length, length, V] looked up from a table that is learned, the completions and their rewards."""
    generator = torch.Generator().manual_seed(3)
    table = torch.randn(
        1 + VOCABULARY, VOCABULARY, generator=generator, dtype=torch.float64
    ).requires_grad_()
    completions = torch.tensor(list(product(range(VOCABULARY), repeat=length)))
    rewards = torch.randn(len(completions), generator=generator, dtype=torch.float64)
    return table, completions, rewards


def token_logps(table: Tensor, completions: Tensor, temperature: float) -> Tensor:
    """[rows, length]: each token is drawn given the one before it (the table's last row at the start)."""
    start = torch.full((len(completions), 1), VOCABULARY)
    context = torch.cat([start, completions[:, :-1]], 1)
    return (
        (table[context] / temperature)
        .log_softmax(-1)
        .gather(-1, completions[..., None])
        .squeeze(-1)
    )


def gradients(
    algorithm: str, length: int, sampling_temperature: float, **options
) -> tuple[Tensor, Tensor]:
    """Of the expected loss as trained, and of minus the expected reward."""
    table, completions, rewards = policy(length)
    logps = token_logps(table, completions, 1.0)
    sampler_logps = token_logps(table, completions, sampling_temperature).detach()
    probability = sampler_logps.sum(-1, keepdim=True).exp()
    everything = torch.ones_like(logps, dtype=torch.bool)
    x = ObjectiveInputs(
        logps,
        logps.detach(),
        probability * rewards[:, None],
        everything,
        everything,
        sampler_logps=sampler_logps,
    )
    loss, _ = objective(algorithm, **options).loss(x, ONE_ROW)
    truth = -(logps.sum(-1).exp() * rewards).sum()
    trained, exact = (
        torch.autograd.grad(value, table, retain_graph=True)[0] for value in (loss, truth)
    )
    return trained, exact


CORRECTED = [  # (algorithm, loss type, length, mode, what the member divides a completion of that length by)
    ("gmpo", "gmpo", 1, "token_mask", 1),
    ("gmpo", "gmpo", 1, "geometric_mask", 1),
    ("gmpo", "gmpo", 3, "sequence_mask", 3),
    ("grpo", "grpo", 1, "token_mask", 1),
    ("grpo", "grpo", 3, "sequence_mask", 3),
    ("grpo", "luspo", 3, "sequence_mask", 1),
]


@pytest.mark.parametrize(("algorithm", "loss_type", "length", "mode", "divisor"), CORRECTED)
def test_the_corrected_gradient_is_the_policy_gradient(algorithm, loss_type, length, mode, divisor):
    options = {"vllm_importance_sampling_mode": mode, "vllm_importance_sampling_clip_max": None}
    trained, exact = gradients(algorithm, length, 1.7, loss_type=loss_type, **options)
    torch.testing.assert_close(trained * divisor, exact, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("algorithm", "loss_type"), [("gmpo", "gmpo"), ("grpo", "grpo")])
def test_without_correction_it_is_not(algorithm, loss_type):
    trained, exact = gradients(
        algorithm, 3, 1.7, loss_type=loss_type, vllm_importance_sampling_correction=False
    )
    assert (trained * 3 - exact).norm() > 0.2 * exact.norm()


@pytest.mark.parametrize(("algorithm", "loss_type"), [("gmpo", "gmpo"), ("grpo", "grpo")])
def test_a_sampler_that_agrees_needs_none(algorithm, loss_type):
    trained, exact = gradients(
        algorithm, 3, 1.0, loss_type=loss_type, vllm_importance_sampling_correction=False
    )
    torch.testing.assert_close(trained * 3, exact, rtol=1e-10, atol=1e-12)


def test_the_enumeration_is_complete():
    table, completions, _ = policy(3)
    torch.testing.assert_close(
        token_logps(table, completions, 1.7).sum(-1).exp().sum(), double(1.0)
    )
