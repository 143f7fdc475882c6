import asyncio
import functools

import pytest
import torch

from gmpo.reward.functions import FunctionReward
from gmpo.reward.settings import RewardSettings
from gmpo.reward.sources import build_sources, columns_of, distinct_names
from gmpo.reward.types import RewardSource
from tests.reward.cases import assistant, call, rollout, user


def plain(completions, **kwargs):
    return [float(len(completion)) for completion in completions]


async def slow(completions, **kwargs):
    return [0.0] * len(completions)


class Judge:
    def __call__(self, completions, **kwargs):
        return [1.0] * len(completions)


class NamedJudge(Judge):
    __name__ = "referee"


class SlowJudge:
    async def __call__(self, completions, **kwargs):
        return [2.0] * len(completions)


labelled = functools.partial(plain, scale=2)
labelled.label = "a partial with attributes is not merged into one around it"

SHAPES = [
    (plain, "plain", False, [3.0]),
    (slow, "slow", True, [0.0]),
    (functools.partial(labelled, extra=1), "plain", False, [3.0]),
    (functools.partial(slow, scale=2), "slow", True, [0.0]),
    (Judge(), "Judge", False, [1.0]),
    (NamedJudge(), "referee", False, [1.0]),
    (SlowJudge(), "SlowJudge", True, [2.0]),
    (Judge().__call__, "__call__", False, [1.0]),
]


@pytest.mark.parametrize(("function", "name", "asynchronous", "scores"), SHAPES)
def test_every_kind_of_callable_is_a_source_with_a_name(function, name, asynchronous, scores):
    (source,) = build_sources(function)
    assert isinstance(source, RewardSource)
    assert (source.name, source.asynchronous) == (name, asynchronous)
    answer = source.score(call([rollout(completion="abc")]))
    assert (asyncio.run(answer) if asynchronous else answer) == scores


def test_a_function_gets_everything_by_keyword():
    seen = {}

    def spy(**kwargs):
        seen.update(kwargs)
        return [0.0, 0.0]

    asked = call([rollout("a", "b", [3, 4]), rollout("c", "d", [5])], {"answer": [1, None]})
    FunctionReward(spy).score(asked)
    assert seen == {
        "prompts": ["a", "c"],
        "completions": ["b", "d"],
        "completion_ids": [[3, 4], [5]],
        "opened": ["", ""],
        "answer": [1, None],
        "trainer_state": "state",
        "log_extra": asked.log_extra,
        "log_metric": asked.log_metric,
    }


def test_a_function_without_kwargs_gets_what_its_signature_names():
    def spy(answer, completions, *, scale=3, missing="default"):
        return [(answer, completions, scale, missing)]

    columns = {"answer": ["4"], "level": [2], "scale": [7]}
    assert FunctionReward(spy).score(call([rollout()], columns)) == [(["4"], ["4"], [7], "default")]


def test_arguments_that_a_partial_has_bound_by_position_are_not_passed_again():
    def spy(prefix, completions):
        return [prefix + completion for completion in completions]

    source = FunctionReward(functools.partial(spy, "x"))
    assert source.score(call([rollout(completion="y")], {"prefix": ["z"]})) == ["xy"]


def test_a_decorated_function_gets_what_it_takes_itself():
    @torch.no_grad()
    def graded(completions, answer):
        return [float(value) for value in answer]

    assert FunctionReward(graded).score(call([rollout()], {"answer": ["7"], "level": [1]})) == [7.0]


def test_a_decorator_that_adds_an_argument_gets_everything():
    def inner(completions, scale):
        return [scale]

    @functools.wraps(inner)
    def outer(**kwargs):
        return inner(kwargs["completions"], float(kwargs["answer"][0]))

    source = FunctionReward(outer)
    assert source.name == "inner"
    assert source.score(call([rollout()], {"answer": ["7"]})) == [7.0]


def test_a_required_column_is_missed_beside_kwargs_too():
    def graded(completions, solution, **kwargs):
        return []

    with pytest.raises(ValueError, match=r"'graded' needs 'solution'.*does not have.*answer"):
        FunctionReward(graded).check_columns(["prompt", "answer"])


@pytest.mark.parametrize("name", ["accuracy", "number_match", "code"])
def test_builtin_rewards_miss_their_columns_before_the_run(name):
    (source,) = build_sources(name)
    with pytest.raises(ValueError, match=f"'{name}' needs .*'(answer|tests)'"):
        source.check_columns(["prompt", "level"])


def test_reserved_columns_are_refused_before_the_run():
    with pytest.raises(ValueError, match=r"'trainer_state'.*Rename"):
        FunctionReward(plain).check_columns(["prompt", "trainer_state"])


def test_what_can_t_be_called_by_keyword_is_refused():
    with pytest.raises(ValueError, match=r"takes \*args only"):
        build_sources(lambda *args: [0.0])
    with pytest.raises(ValueError, match=r"needs 'self'.*pass the method of an object"):
        FunctionReward(Judge.__call__).check_columns(["prompt"])


def test_rows_of_a_group_do_not_share_what_can_be_changed():
    """A reward that works a list off used to leave nothing of it to the group's other rows."""

    def counts(cases, tree):
        taken = []
        for left, branch in zip(cases, tree, strict=True):
            taken.append(float(len(left) + len(branch["leaves"])))
            left.clear()
            branch["leaves"].clear()
        return taken

    cases, tree = ["a", "b", "c"], {"leaves": [1]}
    shared = {"cases": [cases] * 3, "tree": [tree] * 3}
    assert FunctionReward(counts).score(call([rollout()] * 3, shared)) == [4.0, 4.0, 4.0]
    assert (cases, tree) == (["a", "b", "c"], {"leaves": [1]})


def test_a_callable_without_a_signature_gets_everything():
    class Opaque:
        __signature__ = "not a signature"

        def __call__(self, **kwargs):
            return sorted(kwargs)

    names = {"completion_ids", "completions", "opened", "log_extra", "log_metric", "prompts"}
    assert set(FunctionReward(Opaque()).score(call([rollout()]))) == names | {"trainer_state"}


def test_a_column_that_a_function_needs_is_named_when_it_is_missing():
    def graded(completions, answer, level):
        return []

    with pytest.raises(ValueError, match=r"'graded' needs 'level'.*does not have.*answer"):
        FunctionReward(graded).score(call([rollout()], {"answer": [1]}))


def test_positional_only_parameters_are_refused_when_the_source_is_built():
    def old_style(completions, /):
        return []

    with pytest.raises(ValueError, match=r"old_style.*positional-only"):
        build_sources(old_style)


def test_what_a_function_does_to_its_arguments_stays_with_it():
    def vandal(prompts, completions, completion_ids, answer):
        prompts[0].append("more")
        prompts[0][0]["content"] = "other"
        completions.clear()
        completion_ids[0].clear()
        answer.clear()
        return [0.0]

    chat = rollout([user("2 + 2 =")], [assistant("4")])
    columns = {"answer": ["4"]}
    FunctionReward(vandal).score(call([chat], columns))
    assert chat == rollout([user("2 + 2 =")], [assistant("4")])
    assert columns == {"answer": ["4"]}


@pytest.mark.parametrize("container", [list, tuple])
def test_a_list_or_tuple_gives_a_source_each_and_stays_as_it_is(container):
    rewards = container([plain, "think_format", slow, plain, plain])
    before = container(rewards)
    sources = build_sources(rewards, settings=RewardSettings(reward_weights=[1.0] * 5))
    assert [source.name for source in sources] == [
        "plain",
        "think_format",
        "slow",
        "plain_2",
        "plain_3",
    ]
    assert rewards == before


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["a", "b"], ["a", "b"]),
        (["a", "a", "a"], ["a", "a_2", "a_3"]),
        (["a", "a_2", "a"], ["a", "a_2", "a_3"]),
        (["a", "a", "a_2"], ["a", "a_2", "a_2_2"]),
    ],
)
def test_names_are_told_apart(names, expected):
    assert distinct_names(names) == expected


def test_an_object_with_a_name_and_a_score_is_a_source_as_it_is():
    class Elsewhere:
        name = "elsewhere"
        asynchronous = True

        async def score(self, call):
            return [None] * len(call.rollouts)

    source = Elsewhere()
    assert build_sources([source]) == [source]


def test_a_name_of_a_builtin_or_of_a_function_in_a_file_needs_no_model(tmp_path):
    file = tmp_path / "own.py"
    file.write_text("def flat(completions):\n    return [0.25] * len(completions)\n")
    sources = build_sources(["think_format", f"{file}:flat", "repetition_penalty(ngram_size=2)"])
    assert [source.name for source in sources] == ["think_format", "flat", "repetition_penalty"]
    assert sources[1].score(call([rollout()])) == [0.25]
    assert sources[0].score(call([rollout(completion="<think>a</think>b")])) == [1.0]


REFUSED = [
    (None, {}, "no reward"),
    ([], {}, "no reward"),
    ((), {}, "no reward"),
    (3, {}, r"3 \(int\)"),
    ([plain, None], {}, r"None \(NoneType\)"),
    ([[plain]], {}, r"\(list\)"),
    (Judge, {}, r"class Judge.*Judge\(\.\.\.\)"),
    ("", {}, "not a local folder"),
    ("./models/reward", {}, "not a local folder"),
    ("/models/reward", {}, "not a local folder"),
    ("~/models/reward", {}, "not a local folder"),
    ("a/b/c", {}, "not a local folder"),
    ("../no_reward", {}, "not a local folder"),
    ("accuracies(", {}, "no reward 'accuracies|can't be read"),
    ("own.py:nothing", {}, "no file"),
    (
        plain,
        {"settings": RewardSettings(reward_weights=[1.0, 2.0])},
        r"2 weights for 1 reward source.*must match",
    ),
    ([plain, slow], {"settings": RewardSettings(reward_weights=[])}, "must match"),
    (plain, {"settings": RewardSettings(reward_weights=[0.0])}, "are all 0"),
    (
        [plain, slow],
        {"reward_processing_classes": [None]},
        "1 reward_processing_classes for 2.*must match",
    ),
]


@pytest.mark.parametrize(("rewards", "options", "message"), REFUSED)
def test_what_is_no_reward_is_refused_with_the_reason(rewards, options, message):
    with pytest.raises(ValueError, match=message):
        build_sources(rewards, **options)


def test_everything_is_looked_at_before_a_model_is_loaded(monkeypatch):
    monkeypatch.setattr(
        "gmpo.reward.sources.load_model_reward", lambda *_: pytest.fail("a model was loaded")
    )
    with pytest.raises(ValueError, match="not a local folder"):
        build_sources(["owner/model", "./missing"])


def test_columns_leave_out_what_rewards_get_from_the_rollout():
    rows = [
        {"prompt": "a", "answer": 1, "completion": "x"},
        {"prompt": "b", "level": 2, "completion_ids": [1]},
    ]
    assert columns_of(rows) == {"answer": [1, None], "level": [None, 2]}


@pytest.mark.parametrize(
    "name", ["prompts", "completions", "opened", "trainer_state", "log_extra", "log_metric"]
)
def test_a_column_with_the_name_of_an_argument_is_refused(name):
    with pytest.raises(ValueError, match=f"'{name}'.*Rename"):
        columns_of([{"answer": 1}, {name: 2}])


def test_the_same_source_twice_is_refused():
    class Elsewhere:
        name = "elsewhere"
        asynchronous = False

        def score(self, call):
            return [None] * len(call.rollouts)

    one = Elsewhere()
    with pytest.raises(ValueError, match="same RewardSource twice"):
        build_sources([one, one])
    assert one.name == "elsewhere"
