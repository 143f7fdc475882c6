"""Options that a comparison of two runs can't show: each has a function that shows it."""

import contextlib
import math
import os
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from accelerate.parallelism_config import ParallelismConfig
from datasets import Dataset
from transformers import EarlyStoppingCallback, TrainingArguments

from gmpo.config import GMPOConfig
from gmpo.reward.score import score
from gmpo.reward.sources import build_sources
from tests.options.runs import ROWS, SCENARIOS, Run, Scenario, build, fresh_run, run
from tests.reward.cases import rollout
from tests.reward.vicious import HARMED, PROCESS, vicious

# -- what a run shows --------------------------------------------------------------------------------------------------


def counts_memory(run: Run) -> bool:
    return any("mem_" in name for entry in run.trainer.state.log_history for name in entry)


# -- fakes -------------------------------------------------------------------------------------------------------------


class Recorder:
    """Keeps the calls of the attribute that it stands for."""

    def __init__(self, result: Any = None):
        self.calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        self.result = result

    def __call__(self, *args: Any, **keywords: Any) -> Any:
        self.calls.append((args, keywords))
        return self.result


class Hub:
    """The hub's interface, as far as a Trainer uses it."""

    def __init__(self):
        self.created: list[dict[str, Any]] = []
        self.uploads: list[dict[str, Any]] = []
        self.busy = False

    def create_repo(self, name, **options):
        self.created.append({"name": name, **options})
        return type("Url", (), {"repo_id": f"me/{name}"})()

    def upload_folder(self, **options):
        self.uploads.append(options)
        job = Future()
        if not self.busy:
            job.set_result(None)
        return job


def pushed(monkeypatch: Any, **options: Any) -> Hub:
    """What reaches the hub of a run that saves twice."""
    hub = Hub()
    hub.busy = options.pop("busy", False)
    monkeypatch.setattr("transformers.trainer.hf_api", lambda: hub)
    monkeypatch.setattr("transformers.utils.hub.PushInProgress.wait_until_done", lambda self: None)
    fresh_run(SCENARIOS["saving"], push_to_hub=True, **options)
    return hub


def tracked(monkeypatch: Any, **options: Any) -> dict[str, dict[str, Any]]:
    """The keywords that trackio gets: of `init`, and of `freeze` at the end."""
    import trackio

    init, freeze = Recorder(), Recorder("me/frozen")
    for name, fake in {
        "init": init,
        "freeze": freeze,
        "finish": Recorder(),
        "log": Recorder(),
    }.items():
        monkeypatch.setattr(trackio, name, fake)
    monkeypatch.setattr(trackio, "config", {}, raising=False)
    fresh_run(SCENARIOS["gmpo"], report_to="trackio", max_steps=1, **options)
    return {"init": init.calls[0][1], "freeze": freeze.calls[0][1] if freeze.calls else {}}


def config_of_rank(monkeypatch: Any, folder: Path, *, node: int, **options: Any) -> GMPOConfig:
    """The config as the first process of a node sees it."""
    config = GMPOConfig(str(folder), use_cpu=True, **options)
    monkeypatch.setattr(TrainingArguments, "process_index", node * 8)
    monkeypatch.setattr(TrainingArguments, "local_process_index", 0)
    return config


# -- ours --------------------------------------------------------------------------------------------------------------


def trust_remote_code(monkeypatch, folder):
    seen = {}

    def loader(name):
        owner = getattr(transformers, name)
        plain = owner.from_pretrained

        def load(*args, **keywords):
            seen.setdefault(name, set()).add(keywords.get("trust_remote_code"))
            return plain(*args, **keywords)

        monkeypatch.setattr(owner, "from_pretrained", load)

    loader("AutoModelForCausalLM")
    loader("AutoTokenizer")
    for trusted in (False, True):
        seen.clear()
        build(SCENARIOS["by path"], {"trust_remote_code": trusted}, folder / str(trusted))
        assert seen["AutoModelForCausalLM"] == {trusted}
        assert seen["AutoTokenizer"] <= {trusted, None} and trusted in seen["AutoTokenizer"]


def scored(completion, answer, folder, **options):
    """The reward of one completion from a function that may do harm."""
    (source,) = build_sources(vicious, settings=GMPOConfig(str(folder), use_cpu=True, **options))
    return score([source], [rollout("?", completion)], [{"answer": answer}]).rewards.item()


def reward_workers(monkeypatch, folder):
    assert scored(PROCESS, None, folder) == os.getpid()
    assert scored(PROCESS, None, folder, reward_workers=1) != os.getpid()


def reward_timeout(monkeypatch, folder):
    assert scored(HARMED, "short_sleep", folder, reward_workers=1) == 1.0
    assert math.isnan(scored(HARMED, "short_sleep", folder, reward_workers=1, reward_timeout=0.5))


def reward_memory_limit(monkeypatch, folder):
    assert scored(HARMED, "some_memory", folder, reward_workers=1) == 1.0
    limits = {"reward_workers": 1, "reward_memory_limit": 0.2}
    assert math.isnan(scored(HARMED, "some_memory", folder, **limits))


def sync_ref_model(monkeypatch, folder):
    still = run("gmpo", beta=0.1)
    moving = run("gmpo", beta=0.1, sync_ref_model=True, ref_model_sync_steps=1)
    for name, value in still.trainer.reference.model.state_dict().items():
        assert torch.equal(value, still.start[name])
        assert not torch.equal(
            moving.trainer.reference.model.state_dict()[name], moving.start[name]
        )


def ds3_gather_for_generation(monkeypatch, folder):
    gathered = []

    @contextlib.contextmanager
    def whole(model, *, inner):
        gathered.append(inner)
        yield

    monkeypatch.setattr("gmpo.rollout.generation_mode.full_model", whole)
    for engine in ("shared_prefix", "generate"):
        for gather in (True, False):
            gathered.clear()
            fresh_run(
                SCENARIOS["gmpo"],
                ds3_gather_for_generation=gather,
                generation_engine=engine,
                max_steps=1,
            )
            assert gathered and all(inner == gather for inner in gathered), (engine, gather)


def use_vllm(monkeypatch, folder):
    made = []

    class Engine:
        def __init__(self, settings, policy, tokenizer, **options):
            made.append(settings.vllm_mode)

    monkeypatch.setattr("gmpo.rollout.vllm.colocated.ColocatedEngine", Engine)
    monkeypatch.setattr("gmpo.rollout.vllm.server.ServerEngine", Engine)
    build(SCENARIOS["gmpo"], {}, folder / "without")
    build(SCENARIOS["gmpo"], {"use_vllm": True}, folder / "colocated")
    build(SCENARIOS["gmpo"], {"use_vllm": True, "vllm_mode": "server"}, folder / "server")
    assert made == ["colocate", "server"]


def log_unique_prompts(monkeypatch, folder):
    from gmpo.report import tables

    shown = []
    monkeypatch.setitem(tables.TRACKERS, "tensorboard", lambda rows, *rest: shown.append(len(rows)))
    for unique in (False, True):
        options = {"log_completions": True, "report_to": "tensorboard", "max_steps": 1}
        fresh_run(SCENARIOS["gmpo"], log_unique_prompts=unique, **options)
    assert shown == [16, 4]


def log_completions_hub_repo(monkeypatch, folder):
    import huggingface_hub

    made = []

    class Scheduler:
        lock = contextlib.nullcontext()

        def __init__(self, **options):
            made.append(options)

        def trigger(self):
            return type("Job", (), {"result": lambda job: None})()

        def stop(self):
            pass

    monkeypatch.setattr(huggingface_hub, "CommitScheduler", Scheduler)
    result = fresh_run(
        SCENARIOS["gmpo"], log_completions=True, log_completions_hub_repo="me/texts", max_steps=1
    )
    (options,) = made
    assert options["repo_id"] == "me/texts" and options["repo_type"] == "dataset"
    assert options["folder_path"] == result.folder / "out" / "completions"


# -- the model and the machine -----------------------------------------------------------------------------------------


def full_determinism(monkeypatch, folder):
    enable = Recorder()
    monkeypatch.setattr("transformers.trainer.enable_full_determinism", enable)
    build(SCENARIOS["gmpo"], {}, folder / "without")
    assert not enable.calls
    build(SCENARIOS["gmpo"], {"full_determinism": True, "seed": 5}, folder / "with")
    assert enable.calls[0][0] == (5,)


def tf32(monkeypatch, folder):
    enable = Recorder()
    monkeypatch.setattr("transformers.training_args.enable_tf32", enable)
    monkeypatch.setattr("transformers.training_args.is_torch_tf32_available", lambda: True)
    for wanted in (True, False):
        GMPOConfig(str(folder), tf32=wanted)
    assert [args for args, _ in enable.calls] == [(True,), (False,)]
    monkeypatch.setattr("transformers.training_args.is_torch_tf32_available", lambda: False)
    with pytest.raises(ValueError, match="tf32"):
        GMPOConfig(str(folder), tf32=True)


def torch_compile(monkeypatch, folder):
    options = {
        "batch_layout": "padded",
        "generation_engine": "generate",
        "max_steps": 1,
        "steps_per_generation": 1,
    }
    plain = run("gmpo", **options)
    compiled = fresh_run(
        SCENARIOS["gmpo"], **options, torch_compile=True, torch_compile_backend="eager"
    )
    assert plain.trainer.model_wrapped is plain.trainer.model
    assert compiled.trainer.model_wrapped._orig_mod is compiled.trainer.model
    assert (
        compiled.trainer.unwrapped_policy() is compiled.trainer.model
    )  # completions are not made by the compiled one
    for name, value in plain.trainer.model.state_dict().items():
        torch.testing.assert_close(compiled.trainer.model.state_dict()[name], value)


def compiled_with(monkeypatch, **options):
    """What torch.compile is called with for the policy of a run."""
    compile_ = Recorder()
    monkeypatch.setattr(torch, "compile", lambda model, **kw: compile_(**kw) or model)
    fresh_run(SCENARIOS["gmpo"], max_steps=1, batch_layout="padded", **options)
    return [keywords for _, keywords in compile_.calls]


def torch_compile_backend(monkeypatch, folder):
    (keywords,) = compiled_with(monkeypatch, torch_compile_backend="eager")
    assert keywords["backend"] == "eager"


def torch_compile_mode(monkeypatch, folder):
    (keywords,) = compiled_with(monkeypatch, torch_compile_mode="reduce-overhead")
    assert keywords["mode"] == "reduce-overhead"


def gradient_checkpointing_kwargs(monkeypatch, folder):
    from transformers import modeling_utils

    plain = modeling_utils.checkpoint
    seen = set()

    def checkpoint(*arguments, **keywords):
        seen.add(keywords["use_reentrant"])
        return plain(*arguments, **keywords)

    monkeypatch.setattr(modeling_utils, "checkpoint", checkpoint)
    for reentrant in (True, False):
        seen.clear()
        options = {"gradient_checkpointing_kwargs": {"use_reentrant": reentrant}}
        fresh_run(SCENARIOS["gmpo"], max_steps=1, gradient_checkpointing=True, **options)
        assert seen == {reentrant}


def continuous_batching_config(monkeypatch, folder):
    from transformers import ContinuousBatchingConfig

    made = []
    plain = ContinuousBatchingConfig.__init__

    def init(self, *arguments, **keywords):
        plain(self, *arguments, **keywords)
        made.extend([self.page_size] if keywords else [])  # not one made for its defaults

    monkeypatch.setattr(ContinuousBatchingConfig, "__init__", init)
    sizes = []
    for config in ({"page_size": 16}, {"page_size": 32}):
        made.clear()
        options = {"use_transformers_continuous_batching": True, "max_steps": 1}
        result = fresh_run(
            SCENARIOS["gmpo"], transformers_continuous_batching_config=config, **options
        )
        assert result.collections
        sizes.append(set(made))
    assert sizes == [{16}, {32}]


def dataloader_pin_memory(monkeypatch, folder):
    """The loader pins where there is a GPU; on a CPU torch itself leaves it."""
    for pinned in (True, False):
        options = {"use_cpu": False, "dataloader_pin_memory": pinned}
        trainer = build(SCENARIOS["eval"], options, folder / str(pinned))
        assert trainer.get_train_dataloader().pin_memory is pinned
        assert trainer.get_eval_dataloader().pin_memory is pinned


def use_liger_kernel(monkeypatch, folder):
    apply = Recorder()
    monkeypatch.setattr("transformers.trainer.apply_liger_kernel", apply)
    fresh_run(SCENARIOS["gmpo"], max_steps=1)
    assert not apply.calls
    result = fresh_run(
        SCENARIOS["gmpo"], use_liger_kernel=True, liger_kernel_config={"rope": False}, max_steps=1
    )
    assert apply.calls == [((result.trainer.model, {"rope": False}), {})]


def torch_empty_cache_steps(monkeypatch, folder):
    trainer = build(SCENARIOS["gmpo"], {"torch_empty_cache_steps": 2}, folder)
    empty = Recorder()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", empty)
    counts = []
    for step in range(4):
        trainer.state.global_step = step
        trainer._release_cache()
        counts.append(len(empty.calls))
    assert counts == [1, 1, 2, 2]


def use_cpu(monkeypatch, folder):
    states = partial_states(monkeypatch)
    GMPOConfig(str(folder), use_cpu=True)
    GMPOConfig(str(folder))
    assert [keywords.get("cpu", False) for keywords in states] == [True, False]


# -- logs --------------------------------------------------------------------------------------------------------------


def logging_nan_inf_filter(monkeypatch, folder):
    def broken(trainer):
        step = trainer.training_step

        def last_is_nan(*args, **keywords):
            loss = step(*args, **keywords)
            return loss * float("nan") if trainer.state.global_step == 1 else loss

        trainer.training_step = last_is_nan
        return contextlib.nullcontext()

    losses = {
        on: [
            entry["loss"]
            for entry in fresh_run(Scenario(around=broken), logging_nan_inf_filter=on).logs
        ]
        for on in (True, False)
    }
    assert losses[True][1] == losses[True][1] and losses[False][1] != losses[False][1]


@contextlib.contextmanager
def verbosity_kept():
    before = transformers.logging.get_verbosity()
    yield
    transformers.logging.set_verbosity(before)


def logging_dir(monkeypatch, folder):
    fresh_run(
        SCENARIOS["gmpo"], report_to="tensorboard", logging_dir=str(folder / "events"), max_steps=1
    )
    (file,) = folder.rglob("*tfevents*")
    assert file.parent == folder / "events"
    other = fresh_run(SCENARIOS["gmpo"], report_to="tensorboard", max_steps=1)
    assert len(list(other.folder.rglob("*tfevents*"))) == 1


def log_level(monkeypatch, folder):
    with verbosity_kept():
        build(SCENARIOS["gmpo"], {"log_level": "error"}, folder)
        assert transformers.logging.get_verbosity() == transformers.logging.ERROR


def log_level_replica(monkeypatch, folder):
    config = config_of_rank(
        monkeypatch, folder, node=1, log_level_replica="critical", log_on_each_node=False
    )
    assert config.get_process_log_level() == transformers.logging.CRITICAL


def log_on_each_node(monkeypatch, folder):
    seen = [
        config_of_rank(
            monkeypatch, folder, node=1, log_on_each_node=on, log_level="info"
        ).get_process_log_level()
        for on in (True, False)
    ]
    assert seen == [transformers.logging.INFO, transformers.logging.WARNING]


def debug(monkeypatch, folder):
    watch = Recorder()
    monkeypatch.setattr("transformers.trainer.DebugUnderflowOverflow", watch)
    result = fresh_run(SCENARIOS["gmpo"], debug="underflow_overflow", max_steps=1)
    assert watch.calls == [((result.trainer.model,), {})]


def run_name(monkeypatch, folder):
    assert tracked(monkeypatch, run_name="first")["init"]["name"] == "first"


def project(monkeypatch, folder):
    assert tracked(monkeypatch, project="letters")["init"]["project"] == "letters"


def trackio_space_id(monkeypatch, folder):
    assert tracked(monkeypatch, trackio_space_id="me/space")["init"]["space_id"] == "me/space"


def trackio_bucket_id(monkeypatch, folder):
    assert tracked(monkeypatch, trackio_bucket_id="me/bucket")["init"]["bucket_id"] == "me/bucket"


def accelerator_config(monkeypatch, folder):
    given = {"gradient_accumulation_kwargs": {"sync_each_batch": True}}
    trainer = build(SCENARIOS["gmpo"], {"accelerator_config": given}, folder)
    assert trainer.accelerator.gradient_state.plugin_kwargs["sync_each_batch"] is True
    trainer = build(SCENARIOS["gmpo"], {}, folder)
    assert "sync_each_batch" not in trainer.accelerator.gradient_state.plugin_kwargs
    for name, value in {
        "split_batches": True,
        "dispatch_batches": True,
        "even_batches": False,
    }.items():
        with pytest.raises(ValueError, match=rf"accelerator_config with {name}={value}"):
            GMPOConfig(str(folder), accelerator_config={name: value})


def trackio_static_space_id(monkeypatch, folder):
    from transformers.integrations import TrackioCallback

    config = GMPOConfig(str(folder), trackio_static_space_id="me/static")
    freeze = Recorder("me/static")
    callback = TrackioCallback()
    monkeypatch.setattr(callback._trackio, "freeze", freeze)
    callback._space_id = "me/space"
    callback._freeze_space(config, build(SCENARIOS["gmpo"], {}, folder).model)
    assert freeze.calls[0][1]["new_space_id"] == "me/static"


# -- evaluation --------------------------------------------------------------------------------------------------------


def eval_use_gather_object(monkeypatch, folder):
    from gmpo.distributed import all_gather_as_objects

    used = Recorder()
    monkeypatch.setattr(
        "gmpo.distributed.all_gather_as_objects",
        lambda value: (used(value), all_gather_as_objects(value))[1],
    )
    fresh_run(SCENARIOS["evaluate"])
    assert not used.calls
    fresh_run(SCENARIOS["evaluate"], eval_use_gather_object=True)
    assert used.calls


def eval_accumulation_steps(monkeypatch, folder):
    from transformers.trainer_pt_utils import EvalLoopContainer

    moves = []
    plain = EvalLoopContainer.to_cpu_and_numpy
    monkeypatch.setattr(
        EvalLoopContainer, "to_cpu_and_numpy", lambda self: (moves.append(1), plain(self))[1]
    )
    fresh_run(SCENARIOS["evaluate"])
    without = len(moves)
    fresh_run(SCENARIOS["evaluate"], eval_accumulation_steps=1)
    assert len(moves) - without > without


def include_for_metrics(monkeypatch, folder):
    def figures(prediction):
        return {
            "inputs": int(prediction.inputs is not None),
            "losses": int(prediction.losses is not None),
        }

    rows = Dataset.from_list(ROWS[:3])
    scenario = Scenario(
        {"num_generations_eval": 2, "per_device_eval_batch_size": 4},
        arguments=lambda _: {"eval_dataset": rows, "compute_metrics": figures},
        act=lambda trainer: trainer.evaluate(),
    )
    for wanted in ([], ["inputs"], ["loss"]):
        seen = fresh_run(scenario, include_for_metrics=wanted).evaluation
        assert (seen["eval_inputs"], seen["eval_losses"]) == ("inputs" in wanted, "loss" in wanted)


# -- saving ------------------------------------------------------------------------------------------------------------


def output_dir(monkeypatch, folder):
    fresh_run(SCENARIOS["saving"], output_dir=str(folder / "elsewhere"), max_steps=1)
    assert {"metrics.jsonl", "checkpoint-1"} <= set(os.listdir(folder / "elsewhere"))


def save_on_each_node(monkeypatch, folder):
    seen = [
        config_of_rank(monkeypatch, folder, node=1, save_on_each_node=on).should_save
        for on in (True, False)
    ]
    assert seen == [True, False]


def resume_from_checkpoint(monkeypatch, folder):
    first = fresh_run(SCENARIOS["saving"], max_steps=1)
    checkpoint = str(first.folder / "out" / "checkpoint-1")
    again = fresh_run(SCENARIOS["gmpo"], resume_from_checkpoint=checkpoint)
    assert [entry["step"] for entry in again.logs] == [1, 2]
    assert len(again.collections) == 0  # the second step's rows are in the checkpoint


def restore_callback_states(monkeypatch, folder):
    patience = {}
    for restore in (False, True):
        options = {
            "eval_strategy": "steps",
            "eval_steps": 1,
            "metric_for_best_model": "reward",
            "save_steps": 1,
        }
        rows = Dataset.from_list(ROWS[:2])

        def arguments(_, rows=rows):
            return {
                "eval_dataset": rows,
                "callbacks": [EarlyStoppingCallback(early_stopping_patience=5)],
            }

        scenario = Scenario(
            {**options, "num_generations_eval": 2, "save_strategy": "steps"}, arguments=arguments
        )
        first = fresh_run(scenario, max_steps=1)

        def fresh_callback(_, rows=rows):
            return {
                "eval_dataset": rows,
                "callbacks": [EarlyStoppingCallback(early_stopping_patience=9)],
            }

        scenario = Scenario(scenario.options, arguments=fresh_callback)
        again = fresh_run(
            scenario,
            resume_from_checkpoint=str(first.folder / "out" / "checkpoint-1"),
            restore_callback_states_from_checkpoint=restore,
        )
        (callback,) = [
            c
            for c in again.trainer.callback_handler.callbacks
            if isinstance(c, EarlyStoppingCallback)
        ]
        patience[restore] = callback.early_stopping_patience
    assert patience == {False: 9, True: 5}


def push_to_hub(monkeypatch, folder):
    assert len(pushed(monkeypatch).uploads) == 2
    quiet = Hub()
    monkeypatch.setattr("transformers.trainer.hf_api", lambda: quiet)
    fresh_run(SCENARIOS["saving"])
    assert not quiet.created and not quiet.uploads


def hub_token(monkeypatch, folder):
    hub = pushed(monkeypatch, hub_token="secret")
    assert {call["token"] for call in [*hub.created, *hub.uploads]} == {"secret"}


def hub_private_repo(monkeypatch, folder):
    assert pushed(monkeypatch, hub_private_repo=True).created[0]["private"] is True


def hub_model_id(monkeypatch, folder):
    assert pushed(monkeypatch, hub_model_id="letters").created[0]["name"] == "letters"


def hub_strategy(monkeypatch, folder):
    paths = {
        strategy: [
            call.get("path_in_repo") for call in pushed(monkeypatch, hub_strategy=strategy).uploads
        ]
        for strategy in ("end", "every_save", "all_checkpoints")
    }
    assert paths["end"] == []
    assert paths["every_save"] == [None, None]
    assert paths["all_checkpoints"] == [None, "checkpoint-1", None, "checkpoint-2"]


def hub_always_push(monkeypatch, folder):
    assert len(pushed(monkeypatch, busy=True).uploads) == 1
    assert len(pushed(monkeypatch, busy=True, hub_always_push=True).uploads) == 2


def hub_revision(monkeypatch, folder):
    assert {call["revision"] for call in pushed(monkeypatch, hub_revision="draft").uploads} == {
        "draft"
    }


# -- several ranks -----------------------------------------------------------------------------------------------------


def partial_states(monkeypatch) -> list[dict[str, Any]]:
    """The keywords of every PartialState that a config makes from now on."""
    from accelerate import PartialState

    made = []

    def state(**keywords):
        made.append(keywords)
        return PartialState()

    state._shared_state = PartialState._shared_state
    monkeypatch.setattr("transformers.training_args.PartialState", state)
    return made


def ddp_backend(monkeypatch, folder):
    states = partial_states(monkeypatch)
    GMPOConfig(str(folder), ddp_backend="gloo", use_cpu=True)
    assert states[-1]["backend"] == "gloo"


def ddp_timeout(monkeypatch, folder):
    states = partial_states(monkeypatch)
    GMPOConfig(str(folder), ddp_timeout=7)
    assert states[-1]["timeout"].total_seconds() == 7


def parallelism_config(monkeypatch, folder):
    trainer = build(SCENARIOS["gmpo"], {}, folder)
    sizes = ParallelismConfig(dp_replicate_size=1)
    trainer.args.parallelism_config = sizes
    assert trainer._build_accelerator_args()["parallelism_config"] is sizes
    with pytest.raises(ValueError, match="cp_size=2"):
        GMPOConfig(str(folder), parallelism_config=ParallelismConfig(cp_size=2))


def fsdp(monkeypatch, folder):
    assert GMPOConfig(str(folder), fsdp=True).fsdp_plugin_args["fsdp_version"] == 2
    assert GMPOConfig(str(folder)).fsdp_plugin_args is None


def fsdp_config(monkeypatch, folder):
    config = GMPOConfig(str(folder), fsdp=True, fsdp_config={"version": 1, "cpu_offload": True})
    assert config.fsdp_plugin_args["fsdp_version"] == 1
    assert config.fsdp_plugin_args["cpu_offload"] is True
    with pytest.raises(ValueError, match=r"fsdp_config=.*without fsdp"):
        GMPOConfig(str(folder), fsdp_config={"cpu_offload": True})


def deepspeed(monkeypatch, folder):
    import importlib.util

    if importlib.util.find_spec("deepspeed") is None:
        with pytest.raises(ValueError, match=r"deepspeed is set, but .*not installed"):
            GMPOConfig(str(folder), deepspeed={"zero_optimization": {"stage": 3}})
    else:
        config = GMPOConfig(str(folder), deepspeed={"zero_optimization": {"stage": 3}})
        assert config.hf_deepspeed_config.is_zero3()
