"""Which rows of a collection each micro-step trains on."""

import torch

from gmpo.data.micro_batches import mixed_seed, pack_signal_rows, split_into_micro_batches

GROUP = torch.tensor([0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3])


def test_every_pass_visits_each_row_once():
    parts = split_into_micro_batches(GROUP, rows=4, passes=2, seed=1)
    assert [len(part) for part in parts] == [4] * 6
    for one_pass in (parts[:3], parts[3:]):
        assert torch.cat(one_pass).sort().values.tolist() == list(range(12))


def test_groups_stay_together_and_passes_differ():
    first, second = (
        [
            GROUP[part].tolist()
            for part in split_into_micro_batches(GROUP, rows=3, passes=2, seed=5)[half]
        ]
        for half in (slice(0, 4), slice(4, 8))
    )
    assert all(len(set(part)) == 1 for part in first + second)
    assert first != second


def test_the_seed_names_the_order():
    same = [
        torch.cat(split_into_micro_batches(GROUP, rows=3, passes=1, seed=s)).tolist()
        for s in (2, 2, 3)
    ]
    assert same[0] == same[1] != same[2]


def test_mixed_seeds_do_not_collide_on_small_numbers():
    seeds = {mixed_seed(a, b, c) for a in range(12) for b in range(12) for c in range(12)}
    assert len(seeds) == 12**3
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_carrying_rows_of_an_optimizer_step_come_together():
    micro_batches = [torch.tensor(rows) for rows in ([4, 5], [0, 1], [2, 3], [6, 7], [1, 0])]
    carrying = torch.tensor([True, True, False, False, False, True, True, True])
    found = pack_signal_rows(micro_batches, carrying, first=2, window=2)
    # the first step has 4, 5, 0, 1 of which 4 is silent; the second 2, 3, 6, 7; the third one micro-batch alone
    assert [rows.tolist() for rows in found] == [[5, 0], [1, 4], [6, 7], [2, 3], [1, 0]]
