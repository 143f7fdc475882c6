"""Losses and their gradients against the peer's own code, over the whole family and everything that modifies it."""

import pytest
import torch

from tests.parity.cases import MEMBERS, Case, grid
from tests.parity.ours import loss_and_gradients
from tests.parity.peer import Peer

pytestmark = pytest.mark.parity
CASES = list(grid())


@pytest.fixture(scope="module")
def answers(peer: Peer) -> list[dict[str, torch.Tensor]]:
    return peer.losses(CASES)


def test_there_are_enough_cases():
    assert len(CASES) >= 500
    assert {case.member for case in CASES} == set(MEMBERS)


@pytest.mark.parametrize("member", MEMBERS)
def test_loss_and_gradient_are_the_peers(member, answers):
    for case, theirs in zip(CASES, answers, strict=True):
        if case.member == member:
            compare(case, loss_and_gradients(case), theirs)


def compare(case: Case, ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    for name, expected in theirs.items():
        torch.testing.assert_close(
            ours[name],
            expected,
            rtol=1e-5,
            atol=1e-8,
            msg=lambda text, n=name: f"{n} of {case.name}: {text}",
        )
