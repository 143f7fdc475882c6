import math
import os
from typing import get_type_hints

import pytest

from gmpo.cli.options import ScriptOptions
from gmpo.cli.parse import parse, parse_flags
from gmpo.cli.yaml_text import read_yaml
from gmpo.config import GMPOConfig, GRPOConfig

BASICS = ("--model", "org/tiny", "--dataset", "rows.jsonl")


@pytest.fixture
def config_file(tmp_path):
    def write(text):
        path = tmp_path / "run.yaml"
        path.write_text(text)
        return str(path)

    return write


def test_flags_win_over_the_file_and_the_file_over_the_defaults(config_file):
    path = config_file(
        "model: org/tiny\ndataset: rows.jsonl\nnum_generations: 4\ntemperature: 0.7\n"
    )
    script, config = parse(["--config", path, "--num_generations", "2", "--model", "org/other"])
    assert (script.model, script.dataset) == ("org/other", "rows.jsonl")
    assert (config.num_generations, config.temperature, config.top_p) == (2, 0.7, 1.0)


def test_a_flag_may_be_written_with_dashes_or_an_equals_sign():
    _, config = parse([*BASICS, "--num-generations=4", "--learning-rate", "2e-5"])
    assert (config.num_generations, config.learning_rate) == (4, 2e-5)


BOOLEANS = sorted(
    name
    for owner in (GMPOConfig, ScriptOptions)
    for name, declared in get_type_hints(owner).items()
    if declared in (bool, bool | None)
)


@pytest.mark.parametrize("name", BOOLEANS)
def test_every_boolean_takes_a_value_or_is_true_alone(name):
    flag = f"--{name}"
    for arguments, value in (
        ([], True),
        (["true"], True),
        (["yes"], True),
        (["false"], False),
        (["0"], False),
    ):
        assert parse_flags([flag, *arguments], GMPOConfig) == {name: value}
    assert parse_flags([flag, "--seed", "3"], GMPOConfig) == {name: True, "seed": 3}
    with pytest.raises(ValueError, match=f"--{name}.*invalid boolean value: 'maybe'"):
        parse_flags([flag, "maybe"], GMPOConfig)


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("scale_rewards", "false", "none"),
        ("scale_rewards", "batch", "batch"),
        ("include_num_input_tokens_seen", "non_padding", "non_padding"),
        ("include_num_input_tokens_seen", "true", "all"),
    ],
)
def test_an_option_of_booleans_and_words_takes_both_as_a_flag_and_in_the_file(
    config_file, name, text, value
):
    of_flag, of_file = ["--" + name, text], ["--config", config_file(f"{name}: '{text}'")]
    for arguments in (of_flag, of_file):
        assert getattr(parse([*BASICS, "--use_cpu", *arguments])[1], name) == value


def test_a_word_for_a_boolean_in_the_file_is_refused(config_file):
    with pytest.raises(
        ValueError, match=r"bf16='maybe' in .*run.yaml is no boolean: use true or false"
    ):
        parse([*BASICS, "--config", config_file("bf16: maybe")])


def test_the_algorithm_decides_the_config_wherever_it_is_given(config_file):
    path = config_file("algorithm: grpo\n")
    _, of_file = parse([*BASICS, "--config", path])
    _, of_flag = parse([*BASICS, "--config", path, "--algorithm", "gmpo"])
    assert type(of_file) is GRPOConfig
    assert of_file.epsilon == 0.2
    assert type(of_flag) is GMPOConfig
    assert of_flag.epsilon == 0.4


def test_the_output_folder_is_named_after_the_model_and_the_algorithm():
    assert parse(BASICS)[1].output_dir == os.path.abspath("tiny-GMPO")
    assert parse([*BASICS, "--output_dir", "here"])[1].output_dir == os.path.abspath("here")


def test_rewards_are_one_or_a_list_and_add_up_over_flags(config_file):
    assert parse([*BASICS, "--reward", "a", "--reward", "b", "c"])[0].reward == ["a", "b", "c"]
    assert parse([*BASICS, "--config", config_file("reward: a")])[0].reward == ["a"]
    assert parse([*BASICS, "--config", config_file("reward: [a, b]"), "--reward", "c"])[
        0
    ].reward == ["c"]


def test_mappings_are_yaml_in_the_file_and_json_or_yaml_in_flags(config_file):
    path = config_file(
        "dataset_kwargs: {size: 5}\ngeneration_kwargs:\n  stop_strings: [x]\npeft: {r: 8}\n"
    )
    script, config = parse([*BASICS, "--config", path, "--peft", "{r: 16}"])
    assert script.dataset_kwargs == {"size": 5}
    assert config.generation_kwargs == {"stop_strings": ["x"]}
    assert script.peft == {"r": 16}
    assert parse([*BASICS, "--generation_kwargs", '{"min_length": 1}'])[1].generation_kwargs == {
        "min_length": 1
    }


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-6", 1e-6),
        ("2.5", 2.5),
        ("1.", 1.0),
        (".inf", math.inf),
        ("3", 3),
        ("'3'", "3"),
        ("true", True),
        ("no", "no"),
        ("off", "off"),
        ("2025-01-02", "2025-01-02"),
        ("v1.5", "v1.5"),
        ("", None),
    ],
)
def test_scalars_of_the_file_are_what_they_look_like(config_file, text, value):
    content = read_yaml(config_file(f"option: {text}"))
    assert content == {"option": value}
    assert type(content["option"]) is type(value)


def test_no_as_a_strategy_and_false_as_a_switch_both_act(config_file):
    path = config_file(
        "save_strategy: no\nshuffle_dataset: false\nscale_rewards: false\nlearning_rate: 1e-5\n"
    )
    _, config = parse([*BASICS, "--config", path])
    assert config.save_strategy == "no"
    assert config.shuffle_dataset is False
    assert config.scale_rewards == "none"
    assert config.learning_rate == 1e-5


def test_text_for_a_number_in_the_file_is_read_as_a_flags_would_be(config_file):
    assert parse([*BASICS, "--config", config_file("num_generations: '4'")])[1].num_generations == 4
    with pytest.raises(ValueError, match=r"num_generations='four' in .*run.yaml is no int"):
        parse([*BASICS, "--config", config_file("num_generations: four")])


@pytest.mark.parametrize(
    ("name", "closest"),
    [
        ("learning_rte", "learning_rate"),
        ("num_generation", "num_generations"),
        ("datset", "dataset"),
        ("model_name_or_path", "model"),  # what TRL's scripts call it
        ("reward_funcs", "reward"),
    ],
)
def test_an_unknown_option_is_refused_with_the_closest_one_in_flags_and_in_the_file(
    config_file, name, closest
):
    with pytest.raises(ValueError, match=rf"no option --{name}. Did you mean '--{closest}'\?"):
        parse([*BASICS, f"--{name}", "1"])
    with pytest.raises(
        ValueError, match=rf"no option {name} \(in .*run.yaml\). Did you mean '{closest}'\?"
    ):
        parse([*BASICS, "--config", config_file(f"{name}: 1")])


def test_no_option_is_taken_for_another_that_begins_like_it():
    with pytest.raises(ValueError, match="no option --num_gen"):
        parse([*BASICS, "--num_gen", "4"])


def test_a_file_name_without_its_flag_is_refused():
    with pytest.raises(ValueError, match=r"'run.yaml' has no option before it.*--config FILE"):
        parse(["run.yaml"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- model\n- dataset\n", "holds a list, not a mapping"),
        ("model: [", "is not YAML"),
        ("just words", "holds a str"),
    ],
)
def test_a_file_that_is_no_mapping_is_refused(config_file, text, message):
    with pytest.raises(ValueError, match=message):
        parse([*BASICS, "--config", config_file(text)])


def test_an_empty_file_is_an_empty_mapping(config_file):
    assert parse([*BASICS, "--config", config_file("# nothing yet\n")])[0].model == "org/tiny"


def test_a_missing_file_is_named():
    with pytest.raises(FileNotFoundError, match=r"nowhere.yaml"):
        parse([*BASICS, "--config", "nowhere.yaml"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--dataset", "d"), "There is no model"),
        (("--model", "m"), "There is no dataset"),
        ((*BASICS, "--algorithm", "ppo"), "algorithm='ppo' is not one of 'gmpo', 'grpo'"),
        ((*BASICS, "--dataset_kwargs", "[1]"), "dataset_kwargs=.* is not a mapping"),
        ((*BASICS, "--temperature", "0"), "temperature=0.0 is out of range"),
        ((*BASICS, "--num_generations", "many"), "invalid int value: 'many'"),
        ((*BASICS, "--temperature"), "expected one argument"),
    ],
)
def test_illegal_values_are_refused_with_what_was_got(arguments, message):
    with pytest.raises(ValueError, match=message):
        parse(arguments)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seed: 1\nseed: 2\n", r"run.yaml is not YAML: .*duplicate key \"seed\""),
        ("num-generations: 4\nnum_generations: 2\n", "gives num_generations twice"),
        ("algorithm: [gmpo]\n", r"algorithm=\['gmpo'\]"),
    ],
)
def test_what_the_file_says_twice_or_wrongly_is_refused(config_file, text, message):
    with pytest.raises(ValueError, match=f"(?s){message}"):
        parse([*BASICS, "--config", config_file(text)])


def test_numbers_and_words_are_those_of_yaml_1_2(config_file):
    text = "a: 010\nb: 1:30\nc: 0o10\nd: yes\n"
    assert read_yaml(config_file(text)) == {"a": 10, "b": "1:30", "c": 8, "d": "yes"}


def test_a_file_in_another_encoding_is_named(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_bytes("run_name: caf\u00e9".encode("latin-1"))
    with pytest.raises(ValueError, match=r"run.yaml is not text in UTF-8"):
        read_yaml(str(path))


def test_keys_of_the_file_may_have_dashes(config_file):
    _, config = parse([*BASICS, "--config", config_file("num-generations: 4\n")])
    assert config.num_generations == 4


def test_a_tilde_is_the_home_folder_in_every_path(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "run.yaml").write_text("output_dir: ~/out\nmodel: ~/m\neval_dataset: ~/e.csv\n")
    flags = ["--config", "~/run.yaml", "--dataset", "~/a.jsonl", "--resume", "~/out/checkpoint-1"]
    script, config = parse(flags)
    home = str(tmp_path)
    assert (script.model, script.dataset) == (f"{home}/m", f"{home}/a.jsonl")
    assert (script.eval_dataset, script.resume) == (f"{home}/e.csv", f"{home}/out/checkpoint-1")
    assert config.output_dir == f"{home}/out"


def test_mappings_of_the_trainer_are_yaml_in_flags_too():
    _, config = parse([*BASICS, "--generation_kwargs", "{min_length: 1}"])
    assert config.generation_kwargs == {"min_length": 1}


def test_several_files_and_patterns_are_one_dataset(tmp_path):
    for name in ("b.jsonl", "a.jsonl"):
        (tmp_path / name).write_text("{}")
    both = [str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")]
    model = ["--model", "m", "--dataset"]
    assert parse([*model, *both])[0].dataset == both
    assert parse([*model, str(tmp_path / "*.jsonl")])[0].dataset == both
    with pytest.raises(FileNotFoundError, match=r"no file like .*csv"):
        parse([*model, str(tmp_path / "*.csv")])
    with pytest.raises(ValueError, match="There is no dataset"):
        parse([*model, ""])


@pytest.mark.parametrize(
    ("flag", "hint"),
    [
        ("--lora_r", r"--peft '\{r: \.\.\.\}'"),
        ("--lora-target-modules", r"--peft '\{target_modules: "),
        ("--load_in_4bit", r"--quantization '\{load_in_4bit: "),
        ("--use_peft", r"--peft '\{r: "),
    ],
)
def test_the_peers_flags_for_adapters_are_answered_with_ours(flag, hint):
    with pytest.raises(
        ValueError,
        match=f"There is no option {flag.replace('-t', '_t').replace('-m', '_m')}.*{hint}",
    ):
        parse([*BASICS, flag, "8"])


@pytest.mark.parametrize("loss_type", ["dapo", "grpo"])
def test_a_loss_type_without_its_algorithm_is_refused(loss_type):
    flags = [*BASICS, "--loss_type", loss_type]
    with pytest.raises(ValueError, match="would do nothing with algorithm='gmpo'"):
        parse(flags)
    assert parse([*flags, "--algorithm", "grpo"])[1].loss_type == loss_type
