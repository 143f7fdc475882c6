"""zero_signal_groups="resample": other prompts are drawn for groups without signal."""

import pytest
import torch
from datasets import Dataset, IterableDataset

from gmpo.collect import places_of, replaced_rows
from gmpo.data.resample import ReplacementPrompts, prompt_key
from gmpo.data.sampler import Rows

DULL = [{"prompt": "a " * n + "b"} for n in range(1, 7)]
LIVELY = [{"prompt": "c " * n + "d"} for n in range(1, 7)]


class Reward:
    """Half of the completions of a lively prompt are right; those of a dull one are all wrong."""

    def __init__(self):
        self.calls, self.prompts = 0, []

    def __call__(self, prompts, completions, **columns):
        self.calls += 1
        self.prompts.append(prompts)
        return [float(prompt.startswith("c") and i % 2) for i, prompt in enumerate(prompts)]


def trained_batches(trainer):
    """Train; the batch of each micro-step."""
    batches, step = [], trainer.training_step
    trainer.training_step = lambda model, inputs, *rest: (
        batches.append(inputs.batch) or step(model, inputs, *rest)
    )
    trainer.train()
    return batches


def logged(trainer, name):
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def test_prompts_without_signal_make_room_for_others(make_trainer):
    reward = Reward()
    trainer = make_trainer(
        reward_funcs=reward,
        train_dataset=Dataset.from_list(DULL + LIVELY),
        shuffle_dataset=False,
        zero_signal_groups="resample",
        max_resamples=8,
        max_steps=1,
    )
    trained = trained_batches(trainer)
    assert reward.prompts[0] == [row["prompt"] for row in DULL[:4] for _ in range(4)]
    (batch,) = trained
    assert all(
        len(set(rows.tolist())) == 2 for rows in batch.advantages.view(-1, 4)
    )  # every group has a signal
    drawn = {prompt for prompts in reward.prompts[1:] for prompt in prompts}
    assert not drawn & {row["prompt"] for row in DULL[:4]}
    dropped = sum(len(prompts) for prompts in reward.prompts) - 16
    assert logged(trainer, "signal/dropped") == [pytest.approx(dropped / (16 + dropped))]
    assert logged(trainer, "frac_reward_zero_std") == [0.0]


def test_the_search_ends_after_max_resamples(make_trainer):
    reward = Reward()
    trainer = make_trainer(
        reward_funcs=reward,
        train_dataset=Dataset.from_list(DULL),
        zero_signal_groups="resample",
        max_resamples=2,
        max_steps=1,
    )
    trainer.train()
    assert [len(prompts) for prompts in reward.prompts] == [
        16,
        8,
        8,
    ]  # there are only two other prompts to draw
    assert logged(trainer, "signal/rows") == [0.0]


def test_a_collection_full_of_signal_is_left_alone(make_trainer):
    reward = Reward()
    make_trainer(
        reward_funcs=reward,
        train_dataset=Dataset.from_list(LIVELY),
        zero_signal_groups="resample",
        max_steps=1,
    ).train()
    assert reward.calls == 1


def test_a_stream_has_no_other_prompts_to_give(make_trainer):
    stream = IterableDataset.from_generator(lambda: iter(LIVELY))
    with pytest.raises(ValueError, match=r"zero_signal_groups='resample'.*iterable.*'skip'"):
        make_trainer(train_dataset=stream, zero_signal_groups="resample")


def test_max_resamples_alone_is_refused(make_trainer):
    with pytest.raises(
        ValueError, match="max_resamples=5 would do nothing with zero_signal_groups='skip'"
    ):
        make_trainer(max_resamples=5)


def test_spare_rows_are_other_prompts_each_once_in_the_order_of_the_seed():
    rows = [{"prompt": text} for text in "aabbccdd"]
    drawn = ReplacementPrompts(rows).draw(2, without={prompt_key({"prompt": "a"})}, seed=0)
    assert len({row["prompt"] for row in drawn}) == 2 and {"prompt": "a"} not in drawn
    assert len(ReplacementPrompts(rows).draw(9, without=set(), seed=0)) == 4
    orders = {
        tuple(row["prompt"] for row in ReplacementPrompts(rows).draw(4, without=set(), seed=seed))
        for seed in range(20)
    }
    assert len(orders) > 3
    again = ReplacementPrompts(rows).draw(4, without=set(), seed=7)
    assert again == ReplacementPrompts(rows).draw(4, without=set(), seed=7)


def test_ranks_replace_their_own_rows_of_groups_that_span_them():
    # Groups of 4 over ranks of 6 rows: rank 0 holds 0000 11, rank 1 holds 11 2222.
    # Groups 0 and 1 are replaced.
    chosen = {0: {"prompt": "x"}, 1: {"prompt": "y"}}
    old = {"prompt": "old"}
    first, second = Rows(0, 0, [old] * 6), Rows(0, 6, [old] * 6)
    assert places_of(first, chosen, 4) == [0, 1, 2, 3, 4, 5]
    assert places_of(second, chosen, 4) == [0, 1]
    part = replaced_rows(second, chosen, 4)
    assert part.offset == 6 and [row["prompt"] for row in part.items] == ["y", "y"]
    # without group 0 the rows of group 1 are the first of what is written again
    assert replaced_rows(second, {1: chosen[1]}, 4).offset == 2


def test_advantages_are_those_of_the_rows_that_are_trained_on(make_trainer):
    trainer = make_trainer(
        reward_funcs=Reward(),
        train_dataset=Dataset.from_list(DULL + LIVELY),
        zero_signal_groups="resample",
        scale_rewards="none",
        max_resamples=8,
        max_steps=1,
    )
    trained = trained_batches(trainer)
    torch.testing.assert_close(trained[0].advantages.view(-1, 4).abs(), torch.full((2, 4), 0.5))
