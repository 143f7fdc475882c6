import re

import pytest

from examples import chain_sum


def test_held_out_problems_are_different_and_always_the_same():
    problems = chain_sum.held_out(200)
    assert len({problem["prompt"] for problem in problems}) == len(problems) == 200
    assert chain_sum.held_out(200) == problems


def test_fewer_held_out_problems_are_the_first_of_them():
    assert [p["prompt"] for p in chain_sum.held_out(8)] == [
        p["prompt"] for p in chain_sum.held_out(200)[:8]
    ]


@pytest.mark.parametrize("seed", [0, 1, chain_sum.HELD_OUT_SEED // 10**6])
def test_no_held_out_problem_is_trained_on(
    seed,
):  # the last seed draws the held-out problems' own entries
    held_out = chain_sum.held_out(200)
    rows = chain_sum.training_rows(2000, seed=seed, without=held_out)
    assert len(rows) == 2000
    assert not {row["prompt"] for row in rows} & {problem["prompt"] for problem in held_out}


def test_another_seed_trains_on_other_problems():
    first, second = (chain_sum.training_rows(100, seed=seed, without=[]) for seed in (0, 1))
    assert [row["prompt"] for row in first] != [row["prompt"] for row in second]


def test_a_problem_adds_or_subtracts_two_numbers_of_one_or_two_digits():
    for row in chain_sum.training_rows(200, seed=0, without=[]):
        match = re.search(r": (\d{1,2}) ([+-]) (\d{1,2}) =$", row["prompt"])
        assert match is not None, row["prompt"]
        left, sign, right = match.groups()
        assert int(row["answer"]) == int(left) + (1 if sign == "+" else -1) * int(right)


@pytest.mark.parametrize(
    ("completion", "reward"),
    [
        ("71", 1.0),
        (" 71\n", 1.0),
        ("The answer is 71.", 2 / 17),  # 2 of 17 characters
        ("72", 0.0),
        ("", 0.0),
    ],
)
def test_the_verifier_pays_for_the_right_number_and_less_for_words_around_it(completion, reward):
    messages = [{"role": "assistant", "content": completion}]
    assert chain_sum.verifier([completion, messages], answer=["71", "71"]) == [reward, reward]


def test_an_exact_answer_is_the_number_with_nothing_but_white_space():
    assert chain_sum.exact(" -4\n", "-4")
    assert not any(chain_sum.exact(text, "-4") for text in ("-4.", "4", "5 - 9 = -4", ""))


@pytest.mark.parametrize(
    ("completion", "answer", "found"),
    [
        ("The final answer is 71.", "71", True),
        ("9-13 is -4, I think", "-4", True),
        ("12-4", "-4", False),  # subtracts
        ("12-4", "4", True),
        ("171", "71", False),
        ("7.5", "7", False),
        ("7.", "7", True),
        ("seven", "7", False),
    ],
)
def test_the_right_number_is_found_as_a_number_of_its_own(completion, answer, found):
    assert chain_sum.found(completion, answer) is found
