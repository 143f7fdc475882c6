"""The life of a run: what is saved when it ends, how it ends, and what a resume may change."""

import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from datasets import Dataset
from safetensors.torch import load_file
from transformers import TrainerCallback

from gmpo.run.checkpoint import check_whole
from gmpo.run.signals import SignalWatch
from tests.trainer.conftest import PROMPTS, share_of_a
from tests.trainer.runs import KillAt, Killed, differences, outcome, same

SAVING = {"save_strategy": "steps", "save_steps": 2, "max_steps": 6, "learning_rate": 1e-2}


def folder_of(trainer, step):
    return Path(trainer.args.output_dir, f"checkpoint-{step}")


def weights_at(folder):
    return load_file(folder / "model.safetensors")


def fails_at_call(number, error):
    calls = []

    def judge(completions, **columns):
        calls.append(1)
        if len(calls) == number:
            raise error
        return share_of_a(completions)

    return judge


def steps_logged(trainer):
    lines = Path(trainer.args.output_dir, "metrics.jsonl").read_text().splitlines()
    return [record["step"] for record in map(json.loads, lines) if "loss" in record]


# -- what an error leaves ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (KeyError("judge"), KeyError),
        (SystemExit("no key"), RuntimeError),
        (KeyboardInterrupt(), KeyboardInterrupt),
    ],
)
def test_what_ends_a_collection_leaves_the_last_step(make_trainer, error, kind):
    whole = make_trainer(max_steps=6)
    whole.train()
    run = make_trainer(max_steps=6, reward_funcs=fails_at_call(3, error))
    with pytest.raises(kind) as caught:
        run.train()
    assert f"What was learned in 4 steps is in {folder_of(run, 4)}" in caught.value.__notes__[-1]
    again = make_trainer(max_steps=6)
    again.train(resume_from_checkpoint=True)
    assert same(outcome(again)["weights"], outcome(whole)["weights"])


def test_a_second_failure_at_the_same_step_is_saved_too(make_trainer):
    found = []
    for rate in (1e-3, 1e-1):
        run = make_trainer(reward_funcs=fails_at_call(2, KeyError()), learning_rate=rate)
        with pytest.raises(KeyError):
            run.train()
        assert same(weights_at(folder_of(run, 2)), dict(run.model.state_dict()))
        found.append(weights_at(folder_of(run, 2)))
    assert not same(*found)


@pytest.mark.parametrize("event", ["on_pre_optimizer_step", "on_optimizer_step"])
def test_an_error_within_the_update_leaves_no_weights_of_it(make_trainer, event):
    run = make_trainer(**SAVING, callbacks=[KillAt(event, 3, RuntimeError("stop"))])
    with pytest.raises(RuntimeError) as caught:
        run.train()
    assert not folder_of(run, 3).exists()
    assert "checkpoint-2" in caught.value.__notes__[-1]


@pytest.mark.parametrize("event", ["on_step_end", "on_log", "on_step_begin", "on_substep_end"])
def test_an_error_after_the_update_leaves_the_whole_step(make_trainer, tmp_path, event):
    whole = make_trainer(**SAVING | {"save_steps": 3}, output_dir=str(tmp_path / "whole"))
    whole.train()
    sizes = {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 4}
    sizes = sizes if event == "on_substep_end" else {}
    run = make_trainer(
        **{**SAVING, "save_steps": 100}, **sizes, callbacks=[KillAt(event, 3, RuntimeError("stop"))]
    )
    with pytest.raises(RuntimeError):
        run.train()
    check_whole(folder_of(run, 3))
    if not sizes:
        assert same(weights_at(folder_of(run, 3)), weights_at(folder_of(whole, 3)))


def test_a_full_disk_names_the_folder_and_keeps_the_former(make_trainer, monkeypatch):
    run = make_trainer(**SAVING)
    written = []

    def full(state, folder, name):
        written.append(name)
        if len(written) > 2:
            raise OSError(28, "No space left on device")
        return save(state, folder, name)

    from gmpo.run.checkpoint import save_state as save

    monkeypatch.setattr("gmpo.run.resumable.save_state", full)
    with pytest.raises(OSError, match="No space left") as caught:
        run.train()
    assert "checkpoint-2" in caught.value.__notes__[-1]
    assert not folder_of(run, 4).exists()
    assert not Path(run.args.output_dir, "_unfinished").exists()
    check_whole(folder_of(run, 2))


def flipped(content):
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


DAMAGES = {
    "missing": None,
    "empty": lambda content: b"",
    "half": lambda content: content[: len(content) // 2],
    "a byte less": lambda content: content[:-1],
    "a flipped bit": flipped,
    "zeros": lambda content: bytes(len(content)),
}


def test_damage_of_any_file_is_named_and_the_one_before_taken(make_trainer, caplog):
    moving = {"beta": 0.1, "sync_ref_model": True, "ref_model_sync_steps": 2}
    run = make_trainer(**SAVING | {"max_steps": 4}, **moving)
    run.train()
    files = [path for path in folder_of(run, 4).rglob("*") if path.is_file()]
    assert len(files) > 10
    for path in files:
        content = path.read_bytes()
        for damage in DAMAGES.values():
            path.unlink() if damage is None else path.write_bytes(damage(content))
            caplog.clear()
            assert run.folder.newest_whole()[0] == str(folder_of(run, 2)), path
            assert path.name in caplog.text and str(folder_of(run, 4)) in caplog.text
            path.write_bytes(content)
    assert run.folder.newest_whole()[0] == str(folder_of(run, 4))


# -- logs ----------------------------------------------------------------------------------------


def test_a_run_shorter_than_logging_steps_is_logged(make_trainer):
    run = make_trainer(max_steps=3, logging_steps=10, log_completions=True)
    run.train()
    assert steps_logged(run) == [3]
    figures = next(record for record in run.state.log_history if "loss" in record)
    assert figures["reward"] > 0
    completions = Path(run.args.output_dir, "completions")
    assert [file.name for file in completions.iterdir()] == ["train_000003.parquet"]


def test_logging_that_is_off_stays_off(make_trainer):
    run = make_trainer(max_steps=2, logging_strategy="no")
    run.train()
    assert steps_logged(run) == []


# -- resuming ------------------------------------------------------------------------------------


def test_a_finished_run_that_is_resumed_ends_at_once(make_trainer):
    run = make_trainer(**SAVING, lr_scheduler_type="constant")
    run.train()
    before = outcome(run)
    asked = []

    def never(completions, **columns):
        asked.append(1)
        return share_of_a(completions)

    again = make_trainer(**SAVING, lr_scheduler_type="constant", reward_funcs=never)
    output = again.train(resume_from_checkpoint=True)
    assert output.global_step == 6 and not asked
    after = outcome(again)
    assert differences(before | {"history": 0}, after | {"history": 0}) == []


def test_a_finished_run_goes_on_with_more_steps(make_trainer):
    make_trainer(**SAVING).train()
    again = make_trainer(**SAVING | {"max_steps": 8})
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 8
    assert steps_logged(again) == [1, 2, 3, 4, 5, 6, 7, 8]


def test_a_fresh_run_leaves_nothing_of_another_to_resume_from(make_trainer):
    make_trainer(**SAVING).train()
    run = make_trainer(**SAVING | {"save_steps": 1}, callbacks=[KillAt("on_save", 3)])
    with pytest.raises(Killed):
        run.train()
    again = make_trainer(**SAVING | {"save_steps": 1})
    again.train(resume_from_checkpoint=True)
    assert [record["step"] for record in again.state.log_history if "loss" in record] == [
        1,
        2,
        3,
        4,
        5,
        6,
    ]


def test_save_total_limit_counts_and_keeps(make_trainer):
    run = make_trainer(**SAVING | {"save_steps": 1, "save_total_limit": 2})
    run.train()
    assert sorted(p.name for p in Path(run.args.output_dir).glob("checkpoint-*")) == [
        "checkpoint-5",
        "checkpoint-6",
    ]


def test_the_best_checkpoint_is_known_by_its_place(make_trainer):
    options = {
        **SAVING,
        "eval_dataset": PROMPTS,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "load_best_model_at_end": True,
        "metric_for_best_model": "eval_reward",
        "save_total_limit": 1,
    }
    run = make_trainer(**options)
    run.train()
    best = Path(run.state.best_model_checkpoint)
    assert best.parent == Path(run.args.output_dir)
    assert same(weights_at(best), dict(run.model.state_dict()))


def two_step_trainer(make_trainer, step, **changes):
    run = make_trainer(**SAVING, lr_scheduler_type="constant", callbacks=[KillAt("on_save", step)])
    with pytest.raises(Killed):
        run.train()
    return make_trainer(**{**SAVING, "lr_scheduler_type": "constant", **changes})


@pytest.mark.parametrize(
    ("option", "value", "key"),
    [
        ("learning_rate", 1e-3, "lr"),
        ("weight_decay", 0.5, "weight_decay"),
        ("adam_beta1", 0.5, "betas"),
        ("adam_beta2", 0.5, "betas"),
        ("adam_epsilon", 1e-3, "eps"),
    ],
)
def test_options_of_the_optimizer_that_were_changed_act(make_trainer, option, value, key):
    again = two_step_trainer(make_trainer, 2, **{option: value})
    again.train(resume_from_checkpoint=True)
    found = again.optimizer.param_groups[0][key]
    wanted = {"adam_beta1": (0.5, 0.999), "adam_beta2": (0.9, 0.5)}.get(option, value)
    assert found == wanted
    if option == "learning_rate":
        assert [r["learning_rate"] for r in again.state.log_history if "loss" in r] == [
            1e-2,
            1e-2,
            1e-3,
            1e-3,
            1e-3,
            1e-3,
        ]


@pytest.mark.parametrize(
    "change",
    [
        {"num_generations": 2},
        {"per_device_train_batch_size": 4},
        {"num_iterations": 2},
        {"seed": 7},
        {"shuffle_dataset": False},
        {"optim": "sgd"},
    ],
    ids=str,
)
def test_options_that_a_resume_cannot_change_are_refused(make_trainer, change):
    again = two_step_trainer(make_trainer, 2, **change)
    with pytest.raises(ValueError, match=next(iter(change))):
        again.train(resume_from_checkpoint=True)


def test_another_dataset_and_another_model_are_refused(make_trainer):
    from tests.tiny import tiny_model

    other = Dataset.from_list([{"prompt": "a b", "wanted": "a"}] * 16)
    again = two_step_trainer(make_trainer, 2, train_dataset=other)
    with pytest.raises(ValueError, match="other prompts"):
        again.train(resume_from_checkpoint=True)
    again = make_trainer(**SAVING, model=tiny_model(intermediate_size=96))
    with pytest.raises(ValueError, match="another model"):
        again.train(resume_from_checkpoint=True)


def test_output_dir_is_absolute_at_once(make_trainer, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "elsewhere").mkdir()

    def moving(completions, **columns):
        os.chdir(tmp_path / "elsewhere")
        return share_of_a(completions)

    make_trainer(**SAVING, output_dir="run", reward_funcs=moving).train()
    assert {"checkpoint-2", "metrics.jsonl"} <= set(os.listdir(tmp_path / "run"))


# -- signals -------------------------------------------------------------------------------------


class SendAt(TrainerCallback):
    """Sends a signal to this process when `event` comes at `step`."""

    def __init__(self, event, step, number):
        def handler(args, state, control, **kwargs):
            if state.global_step == step:
                os.kill(os.getpid(), number)

        setattr(self, event, handler)


ENDS = {signal.SIGTERM: SystemExit, signal.SIGHUP: SystemExit, signal.SIGINT: KeyboardInterrupt}


@pytest.mark.parametrize("number", ENDS)
@pytest.mark.parametrize(
    ("event", "saved"), [("on_step_begin", 4), ("on_optimizer_step", 4), ("on_step_end", 3)]
)
def test_a_signal_acts_between_steps(make_trainer, tmp_path, capfd, number, event, saved):
    whole = make_trainer(**SAVING, output_dir=str(tmp_path / "whole"))
    whole.train()
    before = signal.getsignal(number)
    options = SAVING | {"save_steps": 100}
    run = make_trainer(**options, callbacks=[SendAt(event, 3, number)])
    with pytest.raises(ENDS[number]) as caught:
        run.train()
    assert getattr(caught.value, "code", 128 + number) == 128 + number
    assert signal.getsignal(number) == before
    assert (
        f"What was learned in {saved} steps is in {folder_of(run, saved)}" in capfd.readouterr().err
    )
    again = make_trainer(**options)
    again.train(resume_from_checkpoint=True)
    assert differences(outcome(whole), outcome(again)) == []


def test_a_signal_interrupts_a_collection_at_once(make_trainer):
    calls = []

    def judge(completions, **columns):
        calls.append(1)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
            calls.append("after")
        return share_of_a(completions)

    run = make_trainer(max_steps=6, reward_funcs=judge)
    with pytest.raises(SystemExit):
        run.train()
    assert calls == [1, 1]
    check_whole(folder_of(run, 2))


def test_a_forked_child_ends_as_if_nobody_watched():
    watch = SignalWatch()
    with watch.watching():
        child = os.fork()
        if child == 0:
            os.kill(os.getpid(), signal.SIGTERM)
            os._exit(0)
        _, status = os.waitpid(child, 0)
    assert os.WTERMSIG(status) == signal.SIGTERM
    assert watch.noted is None


def test_a_second_signal_leaves_at_once(make_trainer, monkeypatch):
    monkeypatch.setattr("gmpo.run.signals.ECHO_SECONDS", -1.0)
    sends = [SendAt("on_step_begin", 3, signal.SIGTERM) for _ in range(2)]
    run = make_trainer(max_steps=6, callbacks=sends)
    with pytest.raises(SystemExit) as caught:
        run.train()
    assert caught.value.code == 143
    assert not folder_of(run, 3).exists() and not folder_of(run, 4).exists()


PROGRAM = """
    import os, signal, sys
    from tests.trainer import conftest
    from pathlib import Path
    make = conftest.trainer_maker(Path(sys.argv[1]))
    calls = []
    def judge(completions, **columns):
        calls.append(1)
        if len(calls) == int(sys.argv[2]):
            os.kill(os.getpid(), int(sys.argv[3]))
        return conftest.share_of_a(completions)
    trainer = make(save_strategy="steps", save_steps=1, max_steps=8, steps_per_generation=4,
                   learning_rate=1e-2, log_completions=True, reward_funcs=judge,
                   train_dataset=conftest.PROMPTS)
    trainer.train(resume_from_checkpoint=sys.argv[4] == "resume")
"""


def run_program(*arguments):
    command = [sys.executable, "-c", textwrap.dedent(PROGRAM), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129), (signal.SIGINT, 130)]
)
def test_a_process_ends_with_the_code_of_its_signal(tmp_path, number, code):
    ended = run_program(tmp_path, 2, int(number), "fresh")
    assert ended.returncode == code
    assert "What was learned in 4 steps is in" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_a_process_killed_while_it_collects_resumes_to_the_bit(tmp_path):
    assert run_program(tmp_path / "killed", 2, int(signal.SIGKILL), "fresh").returncode == -9
    for folder, mode in (("killed", "resume"), ("whole", "fresh")):
        ended = run_program(tmp_path / folder, 99, 0, mode)
        assert ended.returncode == 0, ended.stderr
    found = [tmp_path / name / "out" / "checkpoint-8" for name in ("killed", "whole")]
    assert same(*map(weights_at, found))


def test_a_run_in_the_folder_of_its_own_model_is_refused(make_trainer, tmp_path):
    (tmp_path / "model").mkdir()
    folder = str(tmp_path / "model")
    with pytest.raises(ValueError, match="overwrite or move aside"):
        make_trainer(model=folder, output_dir=folder)
