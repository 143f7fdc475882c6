"""A batch is cut into sets of rows that fit, groups whole where they can be."""

import pytest
import torch

from gmpo.policy.layout.chunks import balance, cut
from gmpo.policy.logprobs import LogProbs
from gmpo.policy.settings import PolicySettings
from tests.policy.cases import (
    assert_same_gradients,
    float64_throughout,
    gradients,
    make_batch,
    make_model,
    weighted_rows,
)
from tests.policy.layout.test_select import rows_of


def tree_tokens(batch):
    """Tokens of rows when each prompt is run once."""

    def tokens(rows):
        prompts = {id(batch.prompt_ids[row]): len(batch.prompt_ids[row]) for row in rows}
        return sum(prompts.values()) + sum(int(batch.lengths[row]) for row in rows)

    return tokens


def test_groups_stay_together_where_they_fit():
    batch = rows_of((10, [5, 5]), (10, [5, 5]), (4, [3, 3]))  # 20, 20 and 10 tokens
    assert sorted(cut(batch, tree_tokens(batch), 30)) == [[0, 1, 4, 5], [2, 3]]


def test_a_group_that_does_not_fit_is_halved_until_it_does():
    batch = rows_of((10, [5, 5, 5, 5]))  # 30 tokens; halves have 20
    assert cut(batch, tree_tokens(batch), 20) == [[0, 1], [2, 3]]
    assert cut(batch, tree_tokens(batch), 19) == [[0], [1], [2], [3]]


def test_a_row_that_does_not_fit_is_alone():
    batch = rows_of((10, [50, 2]), (3, [4]))
    assert sorted(cut(batch, tree_tokens(batch), 20)) == [[0], [1, 2]]


def test_sets_have_about_the_same_size():
    batch = rows_of(*[(2, [8])] * 12)  # 12 rows of 10 tokens; 50 fit into a set
    assert sorted(map(len, cut(batch, tree_tokens(batch), 50))) == [4, 4, 4]


def test_items_spread_evenly():
    # 8 | 7 | 6, then each to the emptiest: 5 to the third, 4 to the second, 3 to the first
    assert balance([3, 4, 5, 6, 7, 8], 3) == [[5, 0], [4, 1], [3, 2]]


@pytest.mark.parametrize("layout", ["auto", "padded", "packed", "shared_prefix"])
@pytest.mark.parametrize("limit", [1, 20, 45, 10_000])
def test_chunks_hold_every_row_once_and_keep_to_the_limit(layout, limit):
    batch, model = make_batch(groups=5, group_size=4), make_model("llama")
    logprobs = LogProbs(PolicySettings(batch_layout=layout, router_aux_loss_coef=0.0))
    for _ in range(2):  # before and after the first model is seen
        chunks = logprobs.cut_batch(batch, limit)
        assert sorted(torch.cat(chunks).tolist()) == list(range(20))
        for chunk in chunks:
            run = logprobs._prepare(model, batch.rows(chunk))
            assert run.layout.input_ids.numel() <= limit or len(chunk) == 1


def test_no_limit_is_one_chunk_and_no_rows_are_one_too():
    batch, logprobs = make_batch(), LogProbs(PolicySettings())
    assert [chunk.tolist() for chunk in logprobs.cut_batch(batch, None)] == [list(range(9))]
    none = batch.rows(torch.tensor([], dtype=torch.int64))
    assert [len(chunk) for chunk in logprobs.cut_batch(none, 10)] == [0]


@pytest.mark.parametrize("layout", ["padded", "packed", "shared_prefix"])
@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3-window", "qwen3-moe"])
def test_gradients_of_chunks_add_up_to_that_of_the_whole(name, layout):
    batch = make_batch()
    with float64_throughout():
        model, logprobs = make_model(name), LogProbs(PolicySettings(batch_layout=layout))

        def loss(rows):
            return logprobs.loss(
                model,
                batch.rows(rows),
                weighted_rows(batch.rows(rows), rows),
            )

        expected = gradients(loss(torch.arange(len(batch))), model)
        chunks = [
            *logprobs.cut_batch(batch, 20),
            torch.zeros(0, dtype=torch.int64),
        ]  # one of a rank that only takes part
        assert len(chunks) > 3
        found = gradients(sum(loss(chunk) for chunk in chunks), model)
    assert_same_gradients(found, expected, rtol=1e-10, atol=1e-10)
