"""The order of work: prompts are read once, rows leave and enter, memory is bounded."""

import pytest
import torch

from gmpo.rollout.engine import Request, Sampling
from gmpo.rollout.local.sequence import StopCriteria, new_sequences, uniforms
from gmpo.types import Prompt
from tests.rollout.cases import requests, shared, tiny, tokens


@pytest.fixture
def passes():
    """Record the tokens of every forward pass of the decoder, [N] per pass."""

    def record(model):
        seen = []

        def look(module, args, kwargs):
            ids = kwargs["input_ids"][0].tolist()
            if ids != [0]:  # of the pass that measures a token
                seen.append(ids)

        model.register_forward_pre_hook(look, with_kwargs=True)
        return seen

    return record


ASKED = requests(4, 11, 1, 11, 20, count=5)
SAMPLING = Sampling(20, temperature=1.5)


@pytest.mark.parametrize("name", ["llama", "gemma3", "mistral"])
@pytest.mark.parametrize(
    "limits", [{"rows": 16}, {"rows": 2}, {"rows": 1}, {"prefill_tokens": 12}, {"cache_bytes": 1}]
)
def test_completions_do_not_depend_on_how_many_rows_find_room(name, limits):
    model = tiny(name)
    expected = tokens(shared(model, rows=64).generate(ASKED, SAMPLING))
    assert tokens(shared(model, **limits).generate(ASKED, SAMPLING)) == expected
    assert (
        len({len(ids) for group in expected for ids in group}) > 3
    )  # rows do finish at different times


def test_every_prompt_is_read_once_and_rows_do_the_rest(passes):
    model = tiny()
    seen = passes(model)
    groups = shared(model).generate(ASKED, SAMPLING)
    written = sum(len(ids) for group in tokens(groups) for ids in group)
    # The last token of a completion is never read, and the first comes from reading the prompt.
    assert sum(map(len, seen)) == sum(len(r.prompt.ids) for r in ASKED) + written - 25
    assert sorted(seen[0]) == sorted(token for request in ASKED for token in request.prompt.ids)


def test_finished_rows_leave_at_once(passes):
    model = tiny()
    seen = passes(model)
    groups = shared(model).generate(ASKED, SAMPLING)
    lengths = [len(ids) for group in tokens(groups) for ids in group]
    # In decode step t (from 1) those are at work whose completion has more than t tokens.
    assert [len(ids) for ids in seen[1:]] == [
        sum(n > t for n in lengths) for t in range(1, max(lengths))
    ]


def reads_prompts(ids: list[int]) -> bool:
    """Whether these are the tokens of one prompt or several, one after another."""
    firsts = [
        request.prompt.ids
        for request in ASKED
        if ids[: len(request.prompt.ids)] == request.prompt.ids
    ]
    return not ids or any(reads_prompts(ids[len(first) :]) for first in firsts)


@pytest.mark.parametrize("rows", [2, 7])
def test_waiting_rows_enter_when_others_leave_and_never_more_than_fit(passes, rows):
    model = tiny()
    seen = passes(model)
    shared(model, rows=rows).generate(ASKED, SAMPLING)
    steps = [len(ids) for ids in seen if not reads_prompts(ids)]
    assert max(steps) == rows
    assert sum(size == rows for size in steps) > len(steps) / 2


def test_the_memory_for_keys_and_values_is_bounded(passes):
    # A token takes 2 * 3 layers * 2 heads * 8 * 4 bytes = 384.  70 tokens hold a prompt and at most
    # 3 rows of 20.
    model = tiny()
    seen = passes(model)
    shared(model, cache_bytes=70 * 384).generate(ASKED, SAMPLING)
    prompts = {tuple(request.prompt.ids) for request in ASKED}
    assert max(len(ids) for ids in seen if tuple(ids) not in prompts) <= 3
    with pytest.raises(AssertionError):  # the limit is what bounds it
        seen.clear()
        shared(model).generate(ASKED, SAMPLING)
        assert max(len(ids) for ids in seen[1:]) <= 3


def test_completions_of_one_token_need_no_row(passes):
    model = tiny()
    seen = passes(model)
    groups = shared(model, rows=2).generate(ASKED, Sampling(1))
    assert all(len(ids) == 1 for group in tokens(groups) for ids in group)
    assert sum(map(len, seen)) == sum(len(r.prompt.ids) for r in ASKED)


def test_long_completions_outgrow_the_first_columns():
    model, asked = tiny("gemma3"), requests(3, 5, count=4)
    sampling = Sampling(110, temperature=1.5, extra={"min_new_tokens": 90})
    one, other = (tokens(shared(model, rows=rows).generate(asked, sampling)) for rows in (64, 3))
    assert one == other
    assert min(len(ids) for group in one for ids in group) >= 90


# -- a draft ---------------------------------------------------------------------------------------


def added(stop_criteria: StopCriteria, ids: list[int]):
    (sequence,) = new_sequences(Request(Prompt([1], ""), 1, 0))
    for token in ids:
        assert sequence.finish_reason is None
        stop_criteria.add(sequence, token, -0.5)
    return sequence


def test_ending_by_eos_budget_and_text():
    letters = dict(enumerate("abcdef"))
    stop_criteria = StopCriteria(
        (0, 5), 4, ("cd", "bb"), lambda ids: "".join(letters[i] for i in ids)
    )
    assert added(stop_criteria, [1, 0]).finish_reason == "stop"
    assert added(stop_criteria, [5]).finish_reason == "stop"
    assert added(stop_criteria, [1, 2, 1, 2]).finish_reason == "length"
    assert added(stop_criteria, [1, 2, 3]).finish_reason == "stop"
    assert added(stop_criteria, [2, 1, 1]).finish_reason == "stop"
    assert added(stop_criteria, [3, 2, 1]).finish_reason is None
    assert added(stop_criteria, [1, 2, 1, 0]).completion().logps == [-0.5] * 4


def test_random_numbers_are_a_function_of_seed_and_sample():
    def first(seed, number, count=600):
        numbers = uniforms(seed, number)
        return [next(numbers) for _ in range(count)]

    assert first(3, 1) == first(3, 1)
    assert first(3, 1)[:5] != first(3, 2)[:5]
    assert first(3, 1)[:5] != first(4, 1)[:5]
    assert first(-1, 0)[:5] != first(1, 0)[:5]
    assert all(0 <= number < 1 for number in first(3, 1))
    # Neighbouring seeds and samples are independent: the mean of 600 x 20 numbers is 1/2 to 5
    # standard errors.
    table = torch.tensor(
        [first(seed, number) for seed in range(4) for number in range(5)], dtype=torch.float64
    )
    assert abs(table.mean() - 0.5) < 5 * (1 / 12 / table.numel()) ** 0.5
    correlations = torch.corrcoef(table) - torch.eye(20)
    assert correlations.abs().max() < 5 / 600**0.5
