"""Where gmpo means something else than the peer, by name, with the reason.  test_losses.py leaves these cases out.

Each difference is shown to be there, so that the list can't go stale; that our side of it is right is checked by closed
forms in tests/objective.
"""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.parity.cases import MEMBERS, Case, case
from tests.parity.ours import loss_and_gradients
from tests.parity.peer import Peer

pytestmark = pytest.mark.parity


def truncated(base: Case) -> Case:
    """With completions that ran into the length limit, and are to be masked."""
    rows = {**base.rows, "truncated": torch.tensor([True, False] * 3)}
    return replace(base, rows=rows, other={"mask_truncated_completions": True})


def with_unreported(base: Case) -> Case:
    """Off the old policy by 0.25 nats per token, and without any of the sampler's log-probs."""
    logps = base.rows["logps"]
    moved = {"old_logps": logps + 0.25, "sampler_logps": torch.full_like(logps, torch.nan)}
    return replace(base, rows={**base.rows, **moved})


def with_runaway(base: Case, advantage: float) -> Case:
    """With one token whose ratio overflows."""
    old_logps, advantages = base.rows["old_logps"].clone(), base.rows["advantages"].clone()
    old_logps[0, 0], advantages[0] = base.rows["logps"][0, 0] - 10_000, advantage
    return replace(base, rows={**base.rows, "old_logps": old_logps, "advantages": advantages})


DIFFERENCES = {
    # The peer's GMPO reads none of these options; spec: they act for every member.
    "gmpo_at_the_sequence_level": case("gmpo", seed=1, importance_sampling_level="sequence"),
    "gmpo_with_a_sequence_correction": case("gmpo", seed=2, mode="sequence_truncate"),
    "gmpo_with_a_token_correction": case("gmpo", seed=3, mode="token_mask"),
    "gmpo_with_an_off_policy_mask": case("gmpo", seed=4, off_policy_mask_threshold=0.05),
    "gmpo_with_a_bias_corrected_kl": case("gmpo", seed=5, beta=0.1, use_bias_correction_kl=True),
    "gmpo_with_delta": case("gmpo", seed=6, delta=0.6),
    "gmpo_with_an_entropy_bonus": case("gmpo", seed=7, entropy_coef=0.05),
    # Each token's KL is weighed by its own ratio, at both levels; the peer takes the completion's.
    "bias_corrected_kl_at_the_sequence_level": case(
        "grpo", seed=8, beta=0.1, use_bias_correction_kl=True, importance_sampling_level="sequence"
    ),
    # The bonus is the mean over the tokens of the optimizer batch; the peer averages the means of its micro-batches.
    "entropy_bonus_over_several_micro_batches": case(
        "grpo", seed=9, entropy_coef=0.5, micro_batches=2
    ),
    # A token that the sampler reported nothing of counts with the old policy's log-prob; the peer takes no drift.
    "off_policy_mask_with_unreported_tokens": with_unreported(
        case("grpo", seed=15, off_policy_mask_threshold=0.05)
    ),
}
SAME = {  # combinations that the grid leaves out
    **{
        f"{member}_with_truncated_completions": truncated(case(member, seed=seed))
        for seed, member in enumerate(MEMBERS, 40)
        if member != "gmpo"  # the peer's adds the advantage of a row without tokens to the loss
    },
    **{
        f"{member}_with_a_bonus_beside_a_selection_by_entropy": case(
            member, seed=seed, entropy_coef=0.5, top_entropy_quantile=0.5, micro_batches=2
        )
        for seed, member in enumerate(("grpo", "dapo", "bnpo", "sapo"), 60)
    },
    "a_bonus_beside_truncated_completions": truncated(case("dapo", seed=70, entropy_coef=0.5)),
}
OVERFLOWS = {  # The peer's loss or gradient is NaN, since it bounds the ratio after taking the exponential.
    "gmpo_without_advantage": with_runaway(case("gmpo", seed=20), advantage=0.0),
    "clipped_with_a_positive_advantage": with_runaway(case("grpo", seed=21), advantage=1.0),
    "sapo": with_runaway(case("sapo", seed=22), advantage=1.0),
}


@pytest.fixture(scope="module")
def answers(peer: Peer) -> dict[str, dict[str, Tensor]]:
    cases = {**DIFFERENCES, **SAME, **OVERFLOWS}
    return dict(zip(cases, peer.losses(list(cases.values())), strict=True))


def differ(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> bool:
    return any(
        not torch.allclose(ours[name], theirs[name], rtol=1e-3, atol=1e-6) for name in theirs
    )


@pytest.mark.parametrize("name", DIFFERENCES)
def test_the_peer_means_something_else(name, answers):
    assert differ(loss_and_gradients(DIFFERENCES[name]), answers[name])


@pytest.mark.parametrize("name", SAME)
def test_the_peer_means_the_same(name, answers):
    ours = loss_and_gradients(SAME[name])
    for part, expected in answers[name].items():
        torch.testing.assert_close(ours[part], expected, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("name", OVERFLOWS)
def test_a_runaway_token_breaks_the_peer_alone(name, answers):
    ours = loss_and_gradients(OVERFLOWS[name])
    assert any(value.isnan().any() for value in answers[name].values())
    assert all(value.isfinite().all() for value in ours.values())


def test_a_row_without_tokens_adds_its_advantage_to_the_peers_gmpo_and_nothing_to_ours(peer):
    empty = case("gmpo", seed=30, empty=True)
    (theirs,) = peer.losses([empty])
    ours = loss_and_gradients(empty)
    advantages: Any = empty.rows["advantages"]
    torch.testing.assert_close(
        ours["loss"], theirs["loss"] + advantages[-1] / len(advantages), rtol=1e-10, atol=0
    )
    torch.testing.assert_close(ours["logps"], theirs["logps"], rtol=1e-10, atol=1e-12)


def test_the_peer_divides_by_the_collections_average_of_tokens_and_we_by_the_optimizer_batchs_own(
    peer,
):
    first = case("dapo", seed=31, windows=2, other_tokens=7)
    (theirs,) = peer.losses([first])
    own = float(first.rows["mask"].sum())
    ours = loss_and_gradients(first)
    assert own != (own + 7) / 2
    torch.testing.assert_close(
        ours["logps"] * own, theirs["logps"] * (own + 7) / 2, rtol=1e-10, atol=1e-12
    )
