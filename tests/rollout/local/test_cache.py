"""The arithmetic of rows that come and go."""

import pytest
import torch

from gmpo.rollout.local.cache import after_removal, grouping


@pytest.mark.parametrize(
    ("count", "removed", "order"),
    [
        (6, [1, 4], [0, 5, 2, 3]),
        (3, [2], [0, 1]),
        (3, [0], [2, 1]),
        (4, [0, 1, 2, 3], []),
        (5, [0, 1], [3, 4, 2]),
        (2, [], [0, 1]),
    ],
)
def test_the_last_ones_fill_the_gaps(count, removed, order):
    assert after_removal(count, removed) == order


def test_rows_of_unlike_groups_form_a_rectangle_and_come_back():
    groups = grouping([1, 0, 1, 1], 3, torch.device("cpu"))
    assert (groups.num_prompts, groups.width) == (3, 3)
    assert groups.row.tolist() == [1, 0, 0, 0, 2, 3, 0, 0, 0]
    rectangle = torch.arange(10, 14)[groups.row].view(3, 3)
    assert rectangle[groups.prompt, groups.place].tolist() == [10, 11, 12, 13]


def test_rows_that_stand_in_order_need_no_index():
    assert grouping([0, 0, 1, 1], 2, torch.device("cpu")).row is None
    assert grouping([0, 1, 1], 2, torch.device("cpu")).row is not None
