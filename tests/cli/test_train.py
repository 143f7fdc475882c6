import json
import sys
from types import SimpleNamespace

import pytest
from transformers.trainer_callback import PrinterCallback, ProgressCallback

import gmpo
from gmpo.cli import train
from gmpo.cli.main import main
from gmpo.config import GMPOConfig, GRPOConfig
from gmpo.report.progress import ProgressLines
from gmpo.reward.builtin import NumberMatch
from gmpo.reward.reasoning_gym import bare_number, reasoning_gym
from tests.tiny import tiny_model


class FakeTrainer:
    """Stands in for the trainer: keeps what it is told, and leaves the files that a run leaves."""

    made: "FakeTrainer"

    def __init__(self, **arguments):
        self.arguments = arguments
        self.callbacks = [ProgressCallback, PrinterCallback]
        self.calls = []
        type(self).made = self

    def remove_callback(self, callback):
        self.callbacks.remove(callback)

    def add_callback(self, callback):
        self.callbacks.append(callback)

    def train(self, resume_from_checkpoint=None):
        self.calls.append(("train", resume_from_checkpoint))
        with open(self.arguments["args"].output_dir + "/metrics.jsonl", "w") as file:
            file.write('{"step": 1, "reward": 0.5}\n')

    def save_model(self, folder):
        self.calls.append(("save_model", folder))

    def is_world_process_zero(self):
        return True

    def create_model_card(self, dataset_name):
        self.calls.append(("create_model_card", dataset_name))

    def push_to_hub(self, dataset_name):
        self.calls.append(("push_to_hub", dataset_name))


@pytest.fixture
def trainer(monkeypatch):
    tokenizer = SimpleNamespace(chat_template=None)
    monkeypatch.setattr(train, "load_tokenizer", lambda name, **options: tokenizer)
    for name in ("GMPOTrainer", "GRPOTrainer"):
        monkeypatch.setattr(gmpo, name, type(name, (FakeTrainer,), {}), raising=False)
    return SimpleNamespace(tokenizer=tokenizer)


@pytest.fixture
def rows(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(
        "".join(json.dumps({"prompt": f"{i} + 1?", "answer": str(i + 1)}) + "\n" for i in range(4))
    )
    return str(path)


@pytest.fixture
def command(tmp_path, rows):
    """Runs `gmpo train` on four rows; gives the exit status."""

    def run(*flags):
        (tmp_path / "out").mkdir(exist_ok=True)
        basics = [
            "--model",
            "tiny",
            "--dataset",
            rows,
            "--output_dir",
            str(tmp_path / "out"),
            "--use_cpu",
            "true",
        ]
        return main(["train", *basics, *flags])

    return run


def test_the_trainer_gets_model_rows_rewards_and_config(trainer, command):
    assert command("--reward", "number_match", "--temperature", "0.5") == 0
    arguments = gmpo.GMPOTrainer.made.arguments
    assert arguments["model"] == "tiny"
    assert arguments["reward_funcs"] == [NumberMatch()]
    assert arguments["train_dataset"]["prompt"] == ["0 + 1?", "1 + 1?", "2 + 1?", "3 + 1?"]
    assert arguments["eval_dataset"] is None
    assert arguments["processing_class"] is trainer.tokenizer
    assert arguments["peft_config"] is None
    assert type(arguments["args"]) is GMPOConfig
    assert arguments["args"].temperature == 0.5


def test_the_algorithm_picks_trainer_and_config(trainer, command):
    assert command("--reward", "number_match", "--algorithm", "grpo", "--loss_type", "dr_grpo") == 0
    assert type(gmpo.GRPOTrainer.made.arguments["args"]) is GRPOConfig


def test_prompts_become_messages_where_the_tokenizer_has_a_chat_template(trainer, command):
    trainer.tokenizer.chat_template = "{{ messages }}"
    command("--reward", "number_match")
    assert gmpo.GMPOTrainer.made.arguments["train_dataset"][0]["prompt"] == [
        {"role": "user", "content": "0 + 1?"}
    ]
    command("--reward", "number_match", "--prompt_format", "text")
    assert gmpo.GMPOTrainer.made.arguments["train_dataset"][0]["prompt"] == "0 + 1?"


def test_our_lines_take_the_place_of_the_trainers_bar_and_printer(trainer, command):
    command("--reward", "number_match")
    callbacks = gmpo.GMPOTrainer.made.callbacks
    assert [type(callback) for callback in callbacks] == [ProgressLines]


def test_after_training_the_model_is_saved_and_the_user_told_where(
    trainer, command, tmp_path, capsys
):
    pytest.importorskip("matplotlib")
    command("--reward", "number_match")
    out = tmp_path / "out"
    calls = gmpo.GMPOTrainer.made.calls
    assert [name for name, _ in calls] == ["train", "save_model", "create_model_card"]
    assert dict(calls)["save_model"] == str(out)
    assert (out / "training_curves.png").read_bytes().startswith(b"\x89PNG")
    shown = capsys.readouterr().out
    for line in (str(out / "metrics.jsonl"), str(out / "training_curves.png")):
        assert line in shown
    assert shown.splitlines()[-2:] == [
        "from transformers import AutoModelForCausalLM",
        f'model = AutoModelForCausalLM.from_pretrained("{out}")',
    ]


def test_a_report_that_fails_leaves_the_run_a_success(trainer, command, monkeypatch):
    def broken(*arguments, **options):
        raise ImportError("no matplotlib")

    monkeypatch.setattr(train, "training_curves", broken)
    monkeypatch.setattr(gmpo.GMPOTrainer, "create_model_card", broken)
    assert command("--reward", "number_match") == 0


def test_pushing_to_the_hub_is_asked_for(trainer, command, rows):
    command("--reward", "number_match", "--push_to_hub", "true")
    assert gmpo.GMPOTrainer.made.calls[-1] == ("push_to_hub", rows)


@pytest.mark.parametrize(("flag", "passed"), [((), None), (("--resume", "latest"), True)])
def test_latest_resumes_from_the_last_checkpoint(trainer, command, flag, passed):
    command("--reward", "number_match", *flag)
    assert ("train", passed) in gmpo.GMPOTrainer.made.calls


def test_a_checkpoint_folder_is_passed_on_and_must_exist(trainer, command, tmp_path, capsys):
    folder = tmp_path / "checkpoint-3"
    assert command("--reward", "number_match", "--resume", str(folder)) == 2
    assert "no checkpoint folder" in capsys.readouterr().err
    folder.mkdir()
    assert command("--reward", "number_match", "--resume", str(folder)) == 2
    assert "is not a checkpoint: it has no trainer_state.json" in capsys.readouterr().err
    (folder / "trainer_state.json").write_text("{}")
    command("--reward", "number_match", "--resume", str(folder))
    assert ("train", str(folder)) in gmpo.GMPOTrainer.made.calls


def test_a_mapping_for_peft_makes_an_adapter_and_code_that_loads_one(trainer, command, capsys):
    peft = pytest.importorskip("peft")
    command("--reward", "number_match", "--peft", "{r: 4, target_modules: [q_proj]}")
    adapter = gmpo.GMPOTrainer.made.arguments["peft_config"]
    assert isinstance(adapter, peft.LoraConfig)
    assert (adapter.r, adapter.target_modules, adapter.task_type) == (4, {"q_proj"}, "CAUSAL_LM")
    assert "from peft import AutoPeftModelForCausalLM" in capsys.readouterr().out


def test_an_unknown_option_of_peft_is_refused(trainer, command, capsys):
    pytest.importorskip("peft")
    assert command("--reward", "number_match", "--peft", "{lora_alfa: 4}") == 2
    assert "Did you mean 'lora_alpha'?" in capsys.readouterr().err


def test_a_task_is_scored_by_its_own_verifier_unless_told_otherwise(trainer, tmp_path):
    pytest.importorskip("reasoning_gym")
    basics = [
        "train",
        "--model",
        "tiny",
        "--dataset",
        "reasoning_gym:chain_sum",
        "--dataset_kwargs",
        "{size: 4}",
    ]
    basics += ["--output_dir", str(tmp_path), "--use_cpu", "true"]
    main(basics)
    assert gmpo.GMPOTrainer.made.arguments["reward_funcs"] == [reasoning_gym]
    main(
        [
            *basics,
            "--reward",
            "reasoning_gym",
            "--reward",
            "bare_number",
            "--reward_weights",
            "1",
            "0.2",
        ]
    )
    assert gmpo.GMPOTrainer.made.arguments["reward_funcs"] == [reasoning_gym, bare_number]
    assert gmpo.GMPOTrainer.made.arguments["args"].reward_weights == [1.0, 0.2]


def test_a_tasks_evaluation_draws_other_entries_and_shared_prompts_are_counted(
    trainer, tmp_path, capsys
):
    pytest.importorskip("reasoning_gym")
    path = tmp_path / "run.yaml"
    path.write_text(f"""
model: tiny
dataset: reasoning_gym:chain_sum
dataset_kwargs: {{size: 150, max_terms: 2, max_digits: 1}}
eval_dataset: reasoning_gym:chain_sum
eval_dataset_kwargs: {{size: 50}}
eval_strategy: steps
output_dir: {tmp_path}
use_cpu: true
""")
    main(["train", "--config", str(path)])
    arguments = gmpo.GMPOTrainer.made.arguments
    training, evaluation = (
        set(arguments["train_dataset"]["prompt"]),
        arguments["eval_dataset"]["prompt"],
    )
    assert json.loads(arguments["eval_dataset"][0]["task_settings"])["seed"] == 150
    assert len(evaluation) == 50
    shared = sum(prompt in training for prompt in evaluation)
    assert shared > 0  # there are 200 such sums
    assert f"{shared} of 50 evaluation prompts are training prompts too." in capsys.readouterr().err


def test_rows_for_evaluation_and_a_strategy_need_each_other(trainer, command, rows, capsys):
    assert command("--reward", "number_match", "--eval_dataset", rows) == 2
    assert "eval_strategy is 'no'" in capsys.readouterr().err
    assert command("--reward", "number_match", "--eval_strategy", "epoch") == 2
    assert "needs rows" in capsys.readouterr().err


def test_without_a_reward_there_is_nothing_to_train_for(trainer, command, capsys):
    assert command() == 2
    assert "There is no reward" in capsys.readouterr().err


def test_a_reward_is_a_name_a_function_in_a_file_or_a_model(trainer, command, tmp_path):
    (tmp_path / "mine.py").write_text(
        "def short(completions):\n    return [float(len(c) < 9) for c in completions]\n"
    )
    command("--reward", "bare_number", f"{tmp_path}/mine.py:short", "org/reward-model")
    named, own, model = gmpo.GMPOTrainer.made.arguments["reward_funcs"]
    assert named is bare_number
    assert own(["12345678", "123456789"]) == [1.0, 0.0]
    assert model == "org/reward-model"


def test_a_mistyped_reward_is_refused_with_the_closest_one(trainer, command, capsys):
    assert command("--reward", "bare_numbr") == 2
    assert "Did you mean 'bare_number'?" in capsys.readouterr().err


def test_a_users_file_that_fails_keeps_its_traceback(trainer, command, tmp_path):
    (tmp_path / "mine.py").write_text("import no_such_package_at_all\n")
    with pytest.raises(ModuleNotFoundError, match="no_such_package_at_all"):
        command("--reward", f"{tmp_path}/mine.py:short")


def test_a_dry_run_prints_the_arithmetic_and_makes_nothing(
    trainer, command, tmp_path, capsys, monkeypatch
):
    def loads(*arguments, **options):
        raise AssertionError("a dry run loads neither tokenizer nor weights")

    monkeypatch.setattr(train, "load_tokenizer", loads)
    monkeypatch.setattr(gmpo, "GMPOTrainer", loads)
    assert command("--reward", "number_match", "--dry-run", "--num_train_epochs", "1") == 0
    shown = capsys.readouterr().out
    assert "# a collection: 1 prompts x 8 = 8 completions" in shown
    assert shown.splitlines()[-1] == "# optimizer steps: 4"
    assert list((tmp_path / "out").iterdir()) == []


def test_help_explains_our_options_and_lists_the_inherited_ones(capsys):
    assert main(["train", "--help"]) == 0
    shown = capsys.readouterr().out
    assert "--epsilon " in shown
    assert "[0.4]" in shown
    for name in ("--dataset ", "--log_completions ", "max_grad_norm", "--config "):
        assert name in shown


def test_train_can_be_started_as_a_module_by_a_launcher():
    import subprocess

    done = subprocess.run(
        [sys.executable, "-m", "gmpo.cli", "train", "--datset", "x"], capture_output=True, text=True
    )
    assert done.returncode == 2
    assert (
        done.stderr.splitlines()[0]
        == "gmpo train: There is no option --datset. Did you mean '--dataset'?"
    )


def test_a_dry_run_prints_a_config_file(tmp_path, capsys):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "a"}\n' * 8)
    model = tmp_path / "tiny"
    tiny_model().save_pretrained(model)
    arguments = [
        "train",
        "--model",
        str(model),
        "--dataset",
        str(rows),
        "--reward",
        "think_format",
        "--use_cpu",
        "true",
    ]
    assert (
        main(
            [
                *arguments,
                "--steps_per_generation",
                "2",
                "--output_dir",
                str(tmp_path / "out"),
                "--dry-run",
            ]
        )
        == 0
    )
    first = capsys.readouterr().out
    (tmp_path / "again.yaml").write_text(first)
    assert main(["train", "--config", str(tmp_path / "again.yaml"), "--dry-run"]) == 0
    assert capsys.readouterr().out == first


def test_a_dry_run_looks_at_model_and_rewards_too(tmp_path, capsys):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "a"}\n')
    start = ["train", "--dataset", str(rows), "--dry-run"]
    for wrong, told in (
        (["--model", "./nope", "--reward", "think_format"], "nothing is there"),
        (["--model", "m", "--reward", "nope.py:x"], "nope.py"),
        (["--model", "m", "--reward", "rewards.py"], "write rewards.py:NAME"),
        (["--model", "m", "--reward", "qwertz"], "bare_number"),
        (
            ["--model", "m", "--reward", "bare_number", "--reward_weights", "1", "2"],
            "has 2 weights",
        ),
        (["--model", "m", "--reward", "bare_number", "--peft", "{rank: 8}"], "no option 'rank'"),
        (
            ["--model", str(tmp_path), "--reward", "bare_number", "--output_dir", str(tmp_path)],
            "holds the model",
        ),
    ):
        assert main([*start, *wrong]) == 2
        assert told in capsys.readouterr().err


def test_an_empty_file_is_called_empty(tmp_path, capsys):
    (tmp_path / "rows.jsonl").write_text("")
    assert (
        main(
            [
                "train",
                "--model",
                "m",
                "--dataset",
                str(tmp_path / "rows.jsonl"),
                "--reward",
                "accuracy",
                "--dry-run",
            ]
        )
        == 2
    )
    assert "rows.jsonl is empty" in capsys.readouterr().err


def test_ctrl_c_ends_with_a_line_and_its_own_status(monkeypatch, capsys):
    def interrupted(arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr("gmpo.cli.train.run", interrupted)
    assert main(["train"]) == 130
    assert capsys.readouterr().err == "gmpo train: interrupted.\n"


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        ("number_match", "needs a dataset column 'answer' or 'solution'"),
        ("rewards.py:graded", "'graded' needs 'solution'"),
        ("rewards.py:free", "Rename the columns"),
    ],
)
def test_a_dry_run_looks_at_columns(tmp_path, monkeypatch, capsys, reward, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "config.json").write_text("{}")
    rows = [{"prompt": "a", **({"prompts": 1} if "free" in reward else {})}] * 8
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "rewards.py").write_text(
        "def graded(completions, solution, **kwargs):\n    return []\n"
        "def free(completions, **kwargs):\n    return []\n"
    )
    flags = ["--model", "./m", "--dataset", "rows.jsonl", "--reward", reward, "--use_cpu"]
    assert main(["train", *flags, "--dry-run"]) == 2
    assert message in capsys.readouterr().err


def test_quantization_is_a_mapping_of_bitsandbytes(trainer, command, capsys):
    assert command("--reward", "number_match", "--quantization", "{load_in_8bit: true}") == 0
    assert gmpo.GMPOTrainer.made.arguments["quantization_config"].load_in_8bit is True
    assert command("--reward", "number_match", "--quantization", "{load_in_4bits: true}") == 2
    assert "Did you mean 'load_in_4bit'" in capsys.readouterr().err
