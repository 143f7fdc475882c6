import pickle
import sys

import pytest

from gmpo.reward import builtin
from gmpo.reward.builtin import (
    Accuracy,
    Cosine,
    Repetition,
    RepetitionPenalty,
    SoftOverlongPunishment,
    ThinkFormat,
    accuracy,
    number_match,
    think_format,
)
from gmpo.reward.by_name import REWARDS, find_reward, is_reward_spec, load_reward
from gmpo.reward.code import Code
from gmpo.reward.reasoning_gym import task_rows
from gmpo.reward.score import score
from gmpo.reward.sources import build_sources
from gmpo.reward.text import final_number, whole_number
from tests.reward.cases import assistant, rollout, user

NUMBERS = [
    ("18", "18"),
    ("so it is 3, no, 4.", "4"),
    ("\\boxed{7} or 8", "7"),
    ("\\boxed{1} then \\boxed{x = \\text{the } {2}}", "2"),
    ("He pays 3 * 4 = 12\n#### 12 dollars", "12"),
    ("1,234,567.50 euros", "1234567.5"),
    ("$1,000", "1000"),
    ("(1,2)", "2"),
    ("12,34", "34"),
    ("1,2345", "2345"),
    ("-5", "-5"),
    ("= −5", "-5"),
    ("10-5", "5"),
    ("+3", "3"),
    (".5", "1/2"),
    ("1/2", "1/2"),
    ("\\frac{1}{2}", "1/2"),
    ("-\\dfrac{ 3 }{ 4 }", "-3/4"),
    ("50%", "50"),
    ("5km", "5"),
    ("4 at v2", "4"),
    ("007", "7"),
]


@pytest.mark.parametrize(("text", "number"), NUMBERS)
def test_the_final_number_of_a_text(text, number):
    assert str(final_number(text)) == str(final_number(number)) and final_number(text) is not None
    assert number_match([text], [number]) == [1.0]
    assert number_match([text], [number + "1"]) == [0.0]


@pytest.mark.parametrize(
    "text", ["", "none", "x2", "1/0", "\\boxed{}", "3 \\boxed{none}", "9" * 5000]
)
def test_a_text_without_a_final_number(text):
    assert final_number(text) is None
    assert number_match([text], ["3"]) == [0.0]
    assert number_match(["3"], [text]) == [None]


def test_numbers_are_compared_exactly():
    golds = ["1/2", "1/3", "1000"]
    assert number_match(["0.50", "0.3333333333333333", "1e3"], golds) == [1.0, 0.0, 1.0]


@pytest.mark.parametrize("reward", ["number_match", "accuracy"])
def test_the_gold_answer_may_come_from_either_column_and_be_missing(reward):
    function = load_reward(reward)
    assert function(["4", "4", "4"], answer=[4, None, "5"]) == [1.0, None, 0.0]
    assert function(["4", "4", "4"], solution=["2 + 2\n#### 4", "\\boxed{4}", None]) == [
        1.0,
        1.0,
        None,
    ]
    assert function(["4", "4", "4"], answer=["4", None, "5"], solution=["5", "4", "4"]) == [
        1.0,
        1.0,
        0.0,
    ]


@pytest.mark.parametrize("reward", ["number_match", "accuracy"])
def test_a_dataset_without_gold_answers_is_refused(reward):
    with pytest.raises(
        ValueError, match=f"'{reward}' needs the gold answer.*'answer' or 'solution'"
    ):
        load_reward(reward)(["4"])


@pytest.mark.parametrize("reward", ["number_match", "accuracy"])
def test_thoughts_are_no_answers(reward):
    completions = [
        "<think>\\boxed{4}</think> so \\boxed{5}",
        "\\boxed{5}</think> 4",
        "<think> \\boxed{4}",
    ]
    assert load_reward(reward)(completions, answer=["4"] * 3) == [0.0, 1.0, 0.0]


CONVERSATIONS = [
    ([assistant("4")], 1.0),
    ([assistant("5"), {"role": "tool", "content": "4"}, assistant("4")], 1.0),
    ([assistant("5"), {"role": "tool", "content": "4"}], 0.0),
    (
        [
            assistant(
                [
                    {"type": "text", "text": "it is "},
                    {"type": "image"},
                    {"type": "text", "text": "4"},
                ]
            )
        ],
        1.0,
    ),
    ([{"role": "assistant", "content": None, "tool_calls": []}], 0.0),
    ([], 0.0),
]


@pytest.mark.parametrize(("completion", "expected"), CONVERSATIONS)
def test_the_last_assistant_message_is_what_counts(completion, expected):
    assert number_match([completion], answer=["4"]) == [expected]


FORMATS = [
    ("<think>a</think>b", 1.0),
    ("\n<think>\na\n</think>\n\nb\nc", 1.0),
    ("<think></think>", 1.0),
    ("<think>a</think>b</think>", 0.0),
    ("<think>a<think>b</think>c", 0.0),
    ("<think>a</think>b<think>c</think>", 0.0),
    ("<think>a", 0.0),
    ("a</think>b", 0.0),
    ("b<think>a</think>", 0.0),
    ("</think>a<think>", 0.0),
    ("<Think>a</Think>b", 0.0),
    ("", 0.0),
]


@pytest.mark.parametrize(("text", "expected"), FORMATS)
def test_the_think_format(text, expected):
    assert think_format([text, [assistant(text)]]) == [expected, expected]


@pytest.mark.parametrize(
    ("cache", "lengths", "expected"),
    [
        (4, [0, 6, 7, 8, 9, 10, 11], [0, 0, -0.25, -0.5, -0.75, -1, -1]),  # free up to 10 - 4
        (0, [9, 10, 11], [0, 0, -1]),
        (10, [0, 5, 10], [0, -0.5, -1]),
    ],
)
def test_the_punishment_of_long_completions_grows_over_the_cache(cache, lengths, expected):
    punishment = SoftOverlongPunishment(max_completion_length=10, cache=cache)
    assert punishment(completion_ids=[[1] * length for length in lengths]) == expected


@pytest.mark.parametrize(
    ("settings", "text", "expected"),
    [
        ({}, "a b c d", 0.0),
        ({}, "a a a a", -0.5),  # two trigrams, one distinct
        ({}, "a A a a", -0.5),
        ({}, "a b", 0.0),
        ({}, "", 0.0),
        ({"ngram_size": 1, "max_penalty": -2.0}, "a b a a", -1.0),  # four words, two distinct
        ({"ngram_size": 2}, "a b a b a", -0.5),  # ab ba ab ba
    ],
)
def test_the_penalty_is_the_share_of_ngrams_that_are_repeats(settings, text, expected):
    assert RepetitionPenalty(**settings)([text, [assistant(text)]]) == [expected, expected]


@pytest.mark.parametrize(
    "make",
    [
        lambda: SoftOverlongPunishment(max_completion_length=10, cache=11),
        lambda: SoftOverlongPunishment(max_completion_length=10, cache=-1),
        lambda: RepetitionPenalty(ngram_size=0),
        lambda: Repetition(max_penalty=0.5),
        lambda: Repetition(unit="letters"),
        lambda: ThinkFormat(opening=""),
        lambda: Cosine(max_completion_length=0),
        lambda: Code(timeout_s=0),
    ],
)
def test_settings_that_make_no_sense_are_refused(make):
    with pytest.raises(ValueError, match=r"must|at most"):
        make()


SETTINGS = {
    "cosine": "cosine(max_completion_length=4)",
    "length": "length(max_completion_length=2, cache=1)",
    "soft_overlong_punishment": "soft_overlong_punishment(max_completion_length=2, cache=1)",
}
SCORES = {  # of a right and of a wrong answer, two tokens each, worked out by hand
    "accuracy": [1.0, 0.0],
    "number_match": [1.0, 0.0],
    "code": [None, None],
    "reasoning_gym": [1.0, 0.0],
    "cosine": [0.75, -0.75],
    "think_format": [1.0, 0.0],
    "bare_number": [0.0, 0.0],
    "repetition": [0.0, 0.0],
    "repetition_penalty": [0.0, -0.5],
    "length": [-1.0, -1.0],
    "soft_overlong_punishment": [-1.0, -1.0],
}


@pytest.mark.parametrize("name", REWARDS)
def test_every_name_of_the_table_works_from_python(name):
    pytest.importorskip("reasoning_gym")
    (row,) = task_rows("chain_sum", {"size": 1, "max_terms": 2, "max_digits": 1})
    (source,) = build_sources(SETTINGS.get(name, name))
    assert source.name == SETTINGS.get(name, name).partition("(")[0].replace(
        "length", "soft_overlong_punishment"
    )

    wrong = int(row["answer"]) + 1
    chats = [
        rollout([user("?")], [assistant(f"<think>a</think>{row['answer']}")]),
        rollout([user("?")], [assistant(f"{wrong} {wrong} {wrong} {wrong}")]),
    ]
    rewards = score([source], chats, [{**row, "tests": None}] * 2).rewards[:, 0].tolist()
    expected = [float("nan") if value is None else value for value in SCORES[name]]
    assert rewards == pytest.approx(expected, nan_ok=True)


def test_the_help_lists_the_table():
    from gmpo.cli.help import reward_lines

    text = "\n".join(reward_lines())
    assert all(entry.about in text for entry in REWARDS.values())
    for name in REWARDS:
        needs_settings = name in ("cosine", "length", "soft_overlong_punishment")
        assert f"  {name}{'(...)' if needs_settings else ''} " in text


@pytest.mark.parametrize("spec", [*REWARDS, *SETTINGS.values()])
def test_rewards_can_be_pickled(spec):
    if spec in SETTINGS:
        return
    function = load_reward(spec)
    assert pickle.loads(pickle.dumps(function)) == function


def test_a_bare_word_is_never_looked_up_on_the_hub(monkeypatch):
    monkeypatch.setattr("gmpo.reward.sources.load_model_reward", lambda *_: pytest.fail("loaded"))
    with pytest.raises(ValueError, match=r"no reward 'bare_nmber'\. Did you mean 'bare_number'\?"):
        build_sources("bare_nmber")


def test_rewards_take_what_another_reward_got():
    everything = {"prompts": ["?"], "trainer_state": None, "log_metric": None, "level": [1]}
    got = {"completions": ["<think>a</think>4"], "completion_ids": [[1, 2]], **everything}
    rows = {"answer": ["4"], "tests": [None]}
    for name in REWARDS.keys() - {"reasoning_gym"}:
        assert len(load_reward(SETTINGS.get(name, name))(**got, **rows)) == 1


def test_builtin_rewards_say_what_they_do():
    for entry in REWARDS.values():
        assert (entry.make or type(entry.function)).__doc__ and entry.about


# -- text that the prompt began ----------------------------------------------------------------------


def test_a_thought_that_the_prompt_opened_has_the_format():
    texts = ["First...\n</think>\nThe answer is 4.", "First... 4", "<think>a</think>4"]
    opened = ["<think>\n"] * 3
    assert think_format(texts, opened=opened) == [1.0, 0.0, 0.0]
    assert think_format([[assistant(text)] for text in texts], opened=opened) == [1.0, 0.0, 0.0]


@pytest.mark.parametrize("reward", [number_match, accuracy])
def test_a_thought_that_never_ends_is_no_answer_wherever_it_began(reward):
    texts, golds = ["so it is 4", "hm </think> 4"], ["4", "4"]
    assert reward(texts, answer=golds, opened=["<think>\n"] * 2) == [0.0, 1.0]
    assert reward(texts, answer=golds, opened=["", ""]) == [1.0, 1.0]


def test_a_prefilled_answer_is_read_with_what_follows():
    assert number_match(["2}"], answer=["42"], opened=["so \\boxed{4"]) == [1.0]


def test_functions_see_what_the_prompt_opened():
    def spy(completions, opened):
        return [float(text == "<think>\n") for text in opened]

    one = rollout()
    one.prompt.opened = "<think>\n"
    assert score(build_sources(spy), [one, rollout()], [{}] * 2).rewards.tolist() == [[1.0], [0.0]]


# -- numbers -------------------------------------------------------------------------------------------

WHOLE = [
    ("10{,}000", "10000"),
    ("1{,}000", "1000"),
    ("1e5", "100000"),
    ("3 \\times 10^5", "300000"),
    ("3\\times10^{-1}", "3/10"),
    ("10^3", "1000"),
    ("11,\\! 111,\\! 111", "11111111"),
    ("\\frac12", "1/2"),
    ("1\\frac{1}{2}", "3/2"),
    ("$18", "18"),
    ("18 dollars", "18"),
    ("\\$32,\\!348", "32348"),
    ("90^\\circ", "90"),
    ("15\\mbox{ cm}^2", "15"),
    ("50\\%", "50"),
    ("x=5", "5"),
    ("$\\frac{1}{2}$", "1/2"),
    ("\\boxed{-7}", "-7"),
]
NOT_WHOLE = [
    "\\sqrt{2}",
    "2\\pi",
    "(3, 4)",
    "x=2y+3",
    "5x",
    "2i",
    "52_8",
    "3 or 4",
    "10-5",
    "\\frac{1}{x}",
    "[0,1]",
    "1e9999999",
]


@pytest.mark.parametrize(("gold", "number"), WHOLE)
def test_golds_are_numbers_however_they_are_written(gold, number):
    assert str(whole_number(gold)) == number
    assert number_match([f"so \\boxed{{{gold}}}", "1234567"], [gold, gold]) == [1.0, 0.0]


@pytest.mark.parametrize("gold", NOT_WHOLE)
def test_golds_that_are_no_numbers_are_not_graded(gold):
    assert number_match(["2", gold], [gold, gold]) == [None, None]


# -- length, repetition, delimiters ---------------------------------------------------------------------


def test_cosine_goes_from_bound_to_bound():
    """At 0, half and all of the length, and beyond: cos(0) = 1, cos(pi / 2) = 0, cos(pi) = -1."""
    pytest.importorskip("math_verify")
    reward = Cosine(max_completion_length=4)
    ids = [[], [1, 2], [1] * 4, [1] * 9]
    assert reward(["4"] * 4, ids, answer=["4"] * 4) == pytest.approx([1.0, 0.75, 0.5, 0.5])
    assert reward(["5"] * 4, ids, answer=["4"] * 4) == pytest.approx([-1.0, -0.75, -0.5, -0.5])
    assert reward(["5"], [[1]], answer=["no mathematics at all"]) == [None]


def test_repetition_counts_ngrams_of_tokens():
    reward = Repetition(ngram_size=2)
    assert reward(completion_ids=[[1, 2, 3, 4], [5] * 5, [1], []]) == [0.0, -0.75, 0.0, 0.0]


def test_tags_and_delimiters_are_the_user_s_choice():
    pytest.importorskip("math_verify")
    assert ThinkFormat("[THINK]", "[/THINK]")(["[THINK]a[/THINK]b", "<think>a</think>b"]) == [1, 0]
    reward = Accuracy(delimiters=["Answer:", "Final:"])
    assert reward(["3 Answer: 4", "4", "Answer: 4 Final: 3"], answer=["4"] * 3) == [1.0, 0.0, 0.0]


# -- by name -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A working directory with a file and a package of rewards; imports are forgotten afterwards."""
    (tmp_path / "own_rewards.py").write_text(
        "from own_words import WORD\n"
        "calls = []\n"
        "def count(completions):\n    calls.append(WORD)\n    return [float(len(calls))] * len(completions)\n"
        "def make(scale, *, shift=0):\n    return lambda completions: [scale + shift for _ in completions]\n"
        "def number(of):\n    return of\n"
        "NUMBER = 3\n"
    )
    (tmp_path / "own_words.py").write_text("WORD = 'word'\n")
    package = tmp_path / "own_package"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "rewards.py").write_text(
        "def zero(completions):\n    return [0.0] * len(completions)\n"
    )
    (package / "broken.py").write_text("import not_there_at_all\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        del sys.modules[name]


def test_a_function_in_a_file_is_found_with_what_it_imports(own):
    assert load_reward("own_rewards.py:count")(["a", "b"]) == [1.0, 1.0]
    assert load_reward(f"{own}/own_rewards.py:count")(["a"]) == [
        2.0
    ]  # the same module, imported once
    assert load_reward("own_rewards.py:make(scale=2, shift=1)")(["a"]) == [3]


@pytest.mark.parametrize("spec", ["own_package.rewards:zero", "own_package.rewards.zero"])
def test_a_function_in_a_package_is_found_from_the_working_directory(own, spec):
    assert load_reward(spec)(["a"]) == [0.0]


def test_settings_reach_a_builtin_factory():
    assert load_reward("repetition_penalty(ngram_size=1, max_penalty=-2.0)")(["a a"]) == [-1.0]
    assert load_reward(" soft_overlong_punishment (max_completion_length=4, cache=2)")(
        [[1, 2, 3]]
    ) == [-0.5]


UNKNOWN = [
    ("acuracy", "no reward 'acuracy'. Did you mean 'accuracy'\\?"),
    ("qqqqqq", "no reward 'qqqqqq'. Built in are accuracy, bare_number"),
    ("", "no reward ''"),
    (
        "soft_overlong_punishment",
        r"needs settings: soft_overlong_punishment\(max_completion_length.*=\.\.\., \.\.\.\)', in quotes",
    ),
    ("bare_number(strict=True)", "'bare_number' takes no settings.*strict"),
    (
        "repetition_penalty(ngrams=2)",
        r"unexpected keyword argument 'ngrams'.*It takes \(ngram_size",
    ),
    ("repetition_penalty(2)", "can't be read"),
    ("repetition_penalty(ngram_size=os.getpid())", "can't be read"),
    ("repetition_penalty(ngram_size=2", "can't be read"),
    ("repetition_penalty(**{})x", "can't be read"),
    ("missing.py:count", "no file.*missing.py"),
    ("own_rewards.py:counts", "no function 'counts'. Did you mean 'count'\\?"),
    ("own_rewards.py:NUMBER", r"3 \(int\), not a function"),
    ("own_rewards.py:number(of=2)", r"gives 2 \(int\), which is not a function"),
    ("own_package.nothing:zero", "no module 'own_package.nothing'"),
    ("nothing_at_all:zero", "no module 'nothing_at_all'"),
]


@pytest.mark.parametrize(("spec", "message"), UNKNOWN)
def test_what_is_not_there_is_refused_with_the_closest_name(own, spec, message):
    with pytest.raises(ValueError, match=message):
        load_reward(spec)


def test_a_module_that_fails_to_import_fails_with_its_own_error(own):
    with pytest.raises(ModuleNotFoundError, match="not_there_at_all"):
        load_reward("own_package.broken:zero")


def test_a_file_that_fails_to_import_is_not_half_there(own):
    (own / "half.py").write_text("def f(completions): return []\nraise RuntimeError('half')\n")
    for _ in range(2):
        with pytest.raises(RuntimeError, match="half"):
            load_reward("half.py:f")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("accuracy", True),
        ("soft_overlong_punishment", True),
        ("a.py:f", True),
        ("make(x=1)", True),
        ("owner/model", False),
        ("model-1.5", False),
        ("./folder", False),
    ],
)
def test_a_function_s_name_is_told_from_a_model_s(text, expected):
    assert is_reward_spec(text) is expected


@pytest.mark.parametrize(
    ("text", "found"),
    [("owner/model", "owner/model"), ("owner/model-1.5_b", "owner/model-1.5_b")],
)
def test_an_id_with_an_owner_names_a_model(text, found):
    assert find_reward(text) == found


@pytest.mark.parametrize("path", ["C:\\rm", "./rm", "~/rm", "a/b/c", "", "rewards.py", "a/"])
def test_a_path_that_leads_nowhere_is_refused(path):
    with pytest.raises(ValueError, match=r"not a local folder|file without a function"):
        find_reward(path)


def test_a_folder_is_a_model_wherever_it_is(tmp_path, monkeypatch):
    (tmp_path / "accuracy").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path))
    assert find_reward("~/accuracy") == str(tmp_path / "accuracy")


def test_accuracy_says_what_to_install(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install 'gmpo\[math\]'"):
        load_reward("accuracy")


def test_the_module_needs_neither_torch_nor_math_verify():
    import subprocess

    code = f"import sys, {builtin.__name__}; print([m for m in ('torch', 'math_verify', 'sympy') if m in sys.modules])"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]"
