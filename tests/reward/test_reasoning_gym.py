import json

import pytest

from gmpo.reward import reasoning_gym as tasks
from gmpo.reward.reasoning_gym import (
    bare_number,
    evaluation_settings,
    reasoning_gym,
    stated_answer,
    task_rows,
)

pytest.importorskip("reasoning_gym")
SUMS = {"size": 4, "seed": 7, "min_terms": 2, "max_terms": 2, "max_digits": 2}


def scores(completions, *, task="chain_sum", settings=SUMS, row=0):
    """The reward of each of `completions` to the same row."""
    entry = task_rows(task, settings)[row]
    columns = {
        name: [entry[name]] * len(completions)
        for name in ("answer", "task", "task_settings", "task_index")
    }
    return reasoning_gym(completions, **columns)


def test_rows_are_the_entries_that_the_package_draws():
    import reasoning_gym as gym

    entries = gym.create_dataset("chain_sum", **SUMS)
    rows = task_rows("chain_sum", SUMS)
    assert [(row["prompt"], row["answer"]) for row in rows] == [
        (e["question"], e["answer"]) for e in entries
    ]
    assert [row["task_index"] for row in rows] == [0, 1, 2, 3]
    assert {row["task"] for row in rows} == {"chain_sum"}


def test_without_a_seed_the_rows_are_the_same_every_time():
    settings = {**SUMS}
    del settings["seed"]
    first = task_rows("chain_sum", settings)
    tasks.entries_of.cache_clear()
    assert task_rows("chain_sum", settings) == first
    assert json.loads(first[0]["task_settings"])["seed"] == 0


def test_evaluation_draws_entries_that_training_does_not():
    def entries(settings):  # reasoning_gym draws entry i of seed s from the number s + i
        return {settings["seed"] + i for i in range(settings["size"])}

    training = {"seed": 3, "size": 10}
    evaluation = evaluation_settings(training, {"size": 5})
    assert evaluation["size"] == 5
    assert entries(training).isdisjoint(entries(evaluation))
    shifted = task_rows("chain_sum", {**SUMS, "seed": 8})
    assert [row["prompt"] for row in task_rows("chain_sum", SUMS)[1:]] == [
        row["prompt"] for row in shifted[:-1]
    ]


def test_settings_for_evaluation_win_over_those_of_training():
    assert evaluation_settings({"size": 10, "max_terms": 2}, {"max_terms": 3, "seed": 1}) == {
        "size": 10, "max_terms": 3, "seed": 1,
    }  # fmt: skip
    assert evaluation_settings(None, None) == {"seed": 500}  # the package's own size is 500


@pytest.mark.parametrize(
    "answer", ["{0}", "The answer is {0}.", "12 + 3 = {0}\n", "so <answer> {0} </answer> or 5"]
)
def test_the_right_number_scores_1_wherever_it_is_stated(answer):
    gold = task_rows("chain_sum", SUMS)[0]["answer"]
    assert scores([answer.format(gold)]) == [1.0]


@pytest.mark.parametrize(
    "answer", ["1{0}", "{0}5", "{0} is wrong, it is 1", "no number", "", "<think>{0}"]
)
def test_anything_but_the_right_number_at_the_end_scores_0(answer):
    gold = task_rows("chain_sum", SUMS)[0]["answer"]
    assert scores([answer.format(gold)]) == [0.0]


def test_messages_are_scored_by_the_last_thing_that_the_assistant_says():
    gold = task_rows("chain_sum", SUMS)[0]["answer"]
    conversation = [
        {"role": "assistant", "content": "Let me see."},
        {"role": "assistant", "content": f"It is {gold}"},
    ]
    assert scores([conversation, conversation[:1]]) == [1.0, 0.0]


@pytest.mark.parametrize(
    ("text", "gold", "stated"),
    [
        ("10 - 15 = -5", "-5", "-5"),
        ("10-5", "5", "5"),  # a difference, not minus five
        ("= −5", "-5", "-5"),
        ("about 1,234,567.50 in all", "3", "1234567.50"),
        ("first 3, then 4.", "3", "4"),
        ("x2 and y3", "3", ""),
        ("6/8", "3/4", "6/8"),
        ("<answer>a</answer> <answer>\nb\n</answer>", "c", "b"),
        ("  the cat \n", "the cat", "the cat"),
        ("the cat", None, "the cat"),
    ],
)
def test_the_stated_answer_is_tagged_or_the_last_number_or_all(text, gold, stated):
    assert stated_answer(text, gold) == stated


def test_partial_scores_of_a_verifier_are_kept_where_they_mean_something():
    rows = task_rows("palindrome_generation", {"seed": 1, "size": 1})
    shown = scores(["xyx"], task="palindrome_generation", settings={"seed": 1, "size": 1})
    assert rows[0]["answer"] != "xyx"
    assert 0.0 < shown[0] < 1.0  # a palindrome, of other letters


def test_a_verifier_that_raises_gives_0():
    settings = {"seed": 1, "size": 1}
    gold = task_rows("prime_factorization", settings)[0]["answer"]
    with pytest.raises(ValueError, match="invalid literal"):
        tasks.entries_of("prime_factorization", '{"seed": 1, "size": 1}').score_answer(
            "ten", {"answer": gold}
        )
    assert scores(["ten", gold], task="prime_factorization", settings=settings) == [0.0, 1.0]


def test_an_entry_that_is_drawn_differently_now_is_an_error_and_no_wrong_reward():
    row = task_rows("chain_sum", SUMS)[0]
    with pytest.raises(ValueError, match="PYTHONHASHSEED"):
        reasoning_gym(["1"], ["another answer"], ["chain_sum"], [row["task_settings"]], [0])


def test_a_bare_number_is_a_number_and_nothing_else():
    texts = ["7", " -7 \n", "1,000.5", "7.", "the 7", "7 8", "", "seven", "1/2"]
    assert bare_number(texts) == [1.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 1.0]
    assert bare_number([[{"role": "assistant", "content": "7"}]]) == [1.0]


@pytest.mark.parametrize(
    ("task", "settings", "message"),
    [
        ("chain_sums", {}, r"no task 'chain_sums'. Did you mean 'reasoning_gym:chain_sum'\?"),
        ("chain_sum", {"max_trms": 2}, "max_trms"),
        ("chain_sum", {"max_terms": 0}, "max_terms must be >= min_terms"),
    ],
)
def test_a_wrong_task_or_setting_is_refused(task, settings, message):
    with pytest.raises(ValueError, match=message):
        task_rows(task, settings)


def test_tags_without_an_end_cost_no_time():
    """A pattern that looks for each tag's end took minutes for such a text."""
    assert stated_answer("<answer>" * 40000, "a b") == "<answer>" * 40000
    assert stated_answer("<answer>1</answer> <answer>2<answer>3</answer>", "a b") == "3"
