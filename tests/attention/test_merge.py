"""Merging two parts of attention, and sinks: by hand."""

import math

import torch

from gmpo.attention.merge import drain, merge, sink_gradient


def test_parts_weigh_by_the_sums_of_their_exponentials():
    output, lse = merge(
        torch.tensor([[1.0]]),
        torch.tensor([math.log(3)]),
        torch.tensor([[5.0]]),
        torch.tensor([math.log(1)]),
    )
    torch.testing.assert_close(output, torch.tensor([[2.0]]))  # (3 * 1 + 1 * 5) / 4
    torch.testing.assert_close(lse, torch.tensor([math.log(4)]))


def test_a_part_that_sees_nothing_weighs_nothing():
    output, lse = merge(
        torch.tensor([[1.0]]), torch.zeros(1), torch.tensor([[5.0]]), torch.tensor([-1e30])
    )
    assert output.item() == 1.0 and lse.item() == 0.0


def test_sinks_take_their_weight():
    # one score of log 3 and a sink of log 1: 3/4 of the value stays
    output, lse = drain(torch.tensor([[8.0]]), torch.tensor([math.log(3)]), torch.tensor([0.0]))
    torch.testing.assert_close(output, torch.tensor([[6.0]]))
    torch.testing.assert_close(lse, torch.tensor([math.log(4)]))


def test_the_gradient_of_a_sink():
    # d(8 * 3 / (3 + e^s))/ds at s = 0: -8 * 3 / 16
    found = sink_gradient(
        torch.tensor([[[1.0]]]),
        torch.tensor([[[6.0]]]),
        torch.tensor([[math.log(4)]]),
        torch.tensor([0.0]),
    )
    torch.testing.assert_close(found, torch.tensor([-1.5]))
