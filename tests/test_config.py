"""The configuration: names and defaults of the documented interface, legal values, batch arithmetic."""

import copy
import dataclasses
import json
import pickle
from pathlib import Path

import pytest
from transformers import TrainingArguments

from gmpo.config import STAGE_SETTINGS, GMPOConfig, GRPOConfig, changed_options
from gmpo.option import rules_of

DOCUMENTED = json.loads((Path(__file__).parent / "config_fields.json").read_text())
NEWER = {
    "entropy_coef": 0.0,
    "use_adaptive_entropy": False,
    "entropy_coef_min": 0.0,
    "entropy_coef_max": 1.0,
    "entropy_coef_delta": 0.005,
    "entropy_target": 0.2,
    "log_multimodal": True,
    "batch_layout": "auto",
    "max_tokens_per_chunk": None,
    "zero_signal_groups": "skip",
    "logps_support": "sampled",
    "mean_power": 0.0,
    "mean_power_final": None,
}
FIELDS = {f.name: f for f in dataclasses.fields(GMPOConfig)}
OURS = [f for settings in STAGE_SETTINGS for f in dataclasses.fields(settings)]


@pytest.fixture
def make(tmp_path):
    return lambda **options: GMPOConfig(str(tmp_path / "out"), **options)


DECLARED = {
    "output_dir": "'trainer_output'",  # the Trainer puts it in the place of None
    "vllm_importance_sampling_mode": "'geometric_mask'",  # as GMPO's own ratio
}


@pytest.mark.parametrize("entry", DOCUMENTED, ids=lambda entry: entry["name"])
def test_documented_options_have_their_documented_default(entry):
    field = FIELDS[entry["name"]]
    if entry["name"] in DECLARED:
        assert repr(field.default) == DECLARED[entry["name"]]
    elif entry["default"] == "<factory>":
        assert field.default_factory is not dataclasses.MISSING
    else:
        assert repr(field.default) == entry["default"]


@pytest.mark.parametrize("name", NEWER)
def test_newer_options_have_their_default(name):
    assert FIELDS[name].default == NEWER[name]


def test_one_positional_argument_is_enough_on_a_cpu(tmp_path):
    config = GMPOConfig(str(tmp_path))
    assert config.output_dir == str(tmp_path)
    assert config.epsilon == 0.4
    assert config.bf16 is False
    assert GRPOConfig(str(tmp_path)).epsilon == 0.2


def test_no_option_of_a_stage_shadows_one_of_another_or_of_the_trainer():
    names = [f.name for f in OURS]
    assert len(names) == len(set(names))
    assert not set(names) & {f.name for f in dataclasses.fields(TrainingArguments)}


@pytest.mark.parametrize("field", OURS, ids=lambda field: field.name)
def test_every_option_says_what_it_does(field):
    assert len(rules_of(field).help.split()) >= 4


ILLEGAL = [
    ({"temperature": 0.0}, "temperature=0.0 .*above 0"),
    ({"temperature": float("nan")}, "temperature=nan"),
    ({"top_p": 1.5}, "top_p=1.5 .*at most 1"),
    ({"top_p": 0.0}, "top_p=0.0"),
    ({"top_k": -1}, "top_k=-1 .*at least 0"),
    ({"top_k": 2.5}, "top_k=2.5 .*whole number"),
    ({"min_p": -0.1}, "min_p"),
    ({"epsilon": 0.0}, "epsilon=0.0"),
    ({"epsilon": -0.2}, "epsilon=-0.2"),
    ({"epsilon": "wide"}, "epsilon='wide' .*number"),
    ({"num_generations": 1}, "num_generations=1 .*at least 2"),
    ({"num_generations": None}, "num_generations=None"),
    ({"num_iterations": 0}, "num_iterations=0"),
    ({"top_entropy_quantile": 0.0}, "top_entropy_quantile=0.0"),
    ({"top_entropy_quantile": 3.0}, "top_entropy_quantile=3.0"),
    ({"ref_model_mixup_alpha": 1.5}, "ref_model_mixup_alpha=1.5"),
    ({"scale_rewards": "std"}, "scale_rewards='std' is not one of 'group', 'batch', 'none'"),
    ({"loss_type": "ppo"}, "loss_type='ppo'"),
    ({"batch_layout": "sparse"}, "batch_layout='sparse'"),
    ({"beta": True}, "beta=True .*number"),
    ({"disable_dropout": "yes"}, "disable_dropout='yes' .*True or False"),
    ({"model_init_kwargs": "{bad"}, "model_init_kwargs='{bad'"),
    ({"chat_template_kwargs": 3}, "chat_template_kwargs=3 .*dict"),
    (
        {"steps_per_generation": 2, "generation_batch_size": 24},
        "generation_batch_size=24 and .*=2 contradict.* are 16",
    ),
    ({"generation_batch_size": 12}, "generation_batch_size=12 .*8 or 16"),
    ({"num_generations": 3}, "num_generations=3.*6 or 9"),
    ({"sync_ref_model": True}, "sync_ref_model=True needs a reference.*beta above 0"),
    ({"log_completions_hub_repo": "me/x"}, "log_completions_hub_repo='me/x'.* Set log_completions"),
    ({"num_completions_to_print": 3}, "num_completions_to_print=3 .*Set log_completions"),
    ({"log_unique_prompts": True}, "log_unique_prompts=True .*Set log_completions"),
    ({"ref_model_mixup_alpha": 0.1}, "ref_model_mixup_alpha=0.1 .*Set sync_ref_model"),
    ({"ref_model_sync_steps": 3}, "ref_model_sync_steps=3 .*Set sync_ref_model"),
    ({"liger_kernel_config": {"rope": False}}, "liger_kernel_config=.*Set use_liger_kernel"),
    ({"fsdp_config": {"cpu_offload": True}}, "fsdp_config=.*Set fsdp"),
    ({"optim_target_modules": ["q_proj"]}, "optim_target_modules=.*optim='adamw"),
    ({"accelerator_config": {"even_batches": False}}, "accelerator_config with even_batches=False"),
    ({"dataloader_in_order": False}, "dataloader_in_order=False .*prefetch"),
    ({"batch_eval_metrics": True}, "batch_eval_metrics=True .*whole evaluation set"),
    ({"fp16": True, "use_cpu": True}, "fp16=True .*bf16=True"),
    ({"use_vllm": True, "vllm_enable_sleep_mode": True, "use_cpu": True}, "this run has no GPU"),
    (
        {"label_smoothing_factor": 0.1},
        "label_smoothing_factor=0.1 has no effect: there are no labels",
    ),
    ({"label_names": ["x"]}, "label_names="),
    ({"average_tokens_across_devices": False}, "whole optimizer batch"),
    ({"train_sampling_strategy": "sequential"}, "shuffle_dataset=False"),
    ({"length_column_name": "n"}, "length_column_name='n'"),
    ({"auto_find_batch_size": True}, "max_tokens_per_chunk"),
    (
        {"multi_objective_aggregation": "normalize_then_sum", "scale_rewards": "none"},
        "scale_rewards='none'",
    ),
    ({"warmup_ratio": 0.1, "warmup_steps": 3}, "warmup_ratio=0.1 and warmup_steps=3"),
    (
        {"use_vllm": True, "top_p": 0.9},
        "top_p=0.9 can't be scored.*vLLM does not report.*logps_support='full'",
    ),
    ({"use_vllm": True, "generation_kwargs": {"min_tokens": 4}}, "min_tokens=4 can't be scored"),
    ({"use_vllm": True, "top_k": 20, "use_cpu": True}, "needs vLLM on a GPU"),
    ({"use_vllm": True, "generation_kwargs": {"num_beams": 2}}, "has \\['num_beams'\\]"),
    (
        {"use_vllm": True, "vllm_structured_outputs_regex": "a+"},
        "vllm_structured_outputs_regex='a\\+' can't be scored",
    ),
    (
        {"generation_kwargs": {"sequence_bias": {(3,): 1.0}}},
        "sequence_bias=.*changes the logits.*logps_support='full'",
    ),
    ({"generation_kwargs": {"do_sample": False}}, "always 0.*logps_support='full'"),
    ({"generation_kwargs": {"temperature": 0.0}}, "always 0.*logps_support='full'"),
    (
        {"eval_strategy": "steps", "per_device_eval_batch_size": 4},
        "per_device_eval_batch_size=4.*num_generations_eval",
    ),
]


@pytest.mark.parametrize(("options", "message"), ILLEGAL, ids=lambda value: str(value)[:60])
def test_an_illegal_value_is_refused_with_option_value_and_remedy(make, options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)


@pytest.mark.parametrize(
    "options",
    [
        {"use_vllm": True, "top_p": 0.9, "logps_support": "full"},
        {
            "use_vllm": True,
            "top_p": 0.9,
            "generation_kwargs": {"top_p": 1.0},
        },  # generation_kwargs win
        {
            "use_vllm": True,
            "temperature": 0.7,
            "generation_kwargs": {"stop": ["x"], "max_tokens": 3},
        },
        {
            "top_p": 0.9,
            "top_k": 5,
            "min_p": 0.1,
            "repetition_penalty": 1.2,
            "generation_kwargs": {"typical_p": 0.5},
        },
        {"generation_kwargs": {"do_sample": False}, "logps_support": "full"},
    ],
    ids=str,
)
def test_sampling_whose_log_probs_are_known_is_accepted(make, options):
    assert make(**options).logps_support == options.get("logps_support", "sampled")


def test_an_unknown_option_is_refused_with_the_closest_name(make):
    with pytest.raises(ValueError, match=r"no option 'epsilom'. Did you mean 'epsilon'\?"):
        make(epsilom=0.2)


@pytest.mark.parametrize(
    "field", [f for f in OURS if rules_of(f).later], ids=lambda field: field.name
)
def test_what_is_not_there_yet_is_refused_and_never_ignored(make, field):
    other = {
        bool: lambda: not field.default,
        str: lambda: (rules_of(field).choices or ["x"] * 2)[-1],
    }
    value = other.get(type(field.default), lambda: 3)()
    with pytest.raises(ValueError, match=f"{field.name}=.*not available yet"):
        make(**{field.name: value})


@pytest.mark.parametrize(
    ("options", "steps", "rows", "prompts"),
    [
        ({}, 1, 8, 1),
        ({"gradient_accumulation_steps": 4}, 4, 32, 4),
        ({"steps_per_generation": 6, "num_generations": 4}, 6, 48, 12),
        ({"generation_batch_size": 64, "per_device_train_batch_size": 4}, 16, 64, 8),
    ],
)
def test_batch_arithmetic(make, options, steps, rows, prompts):
    config = make(**options)
    assert config.steps_per_generation == steps
    assert config.generation_batch_size == rows
    assert config.prompts_per_collection == prompts
    assert config.rows_per_rank == rows


SIZES = ("steps_per_generation", "generation_batch_size")
COPIES = {
    "itself": lambda config: config,
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "pickle": lambda config: pickle.loads(pickle.dumps(config)),
}


@pytest.mark.parametrize(
    ("options", "changes", "steps", "rows"),
    [
        # neither size given: gradient_accumulation_steps micro-batches of 8 rows
        ({}, {"learning_rate": 1e-5}, 1, 8),
        ({}, {"per_device_train_batch_size": 16}, 1, 16),
        ({}, {"gradient_accumulation_steps": 3}, 3, 24),
        ({}, {"generation_batch_size": 32}, 4, 32),
        ({}, {"steps_per_generation": 4}, 4, 32),
        # one given: it stays, and the other follows
        ({"generation_batch_size": 32}, {"learning_rate": 1e-5}, 4, 32),
        ({"generation_batch_size": 32}, {"per_device_train_batch_size": 4}, 8, 32),
        ({"generation_batch_size": 32}, {"generation_batch_size": 64}, 8, 64),
        ({"steps_per_generation": 4}, {"learning_rate": 1e-5}, 4, 32),
        (
            {"steps_per_generation": 4},
            {"per_device_train_batch_size": 4, "num_generations": 4},
            4,
            16,
        ),
        # equal to what would have been worked out before the change, but given
        ({}, {"per_device_train_batch_size": 4, "generation_batch_size": 8}, 2, 8),
        # back to the default
        (
            {"steps_per_generation": 4},
            {"steps_per_generation": None, "generation_batch_size": None},
            1,
            8,
        ),
        # the same thing twice is no contradiction, and the steps are what was given
        (
            {"steps_per_generation": 4, "generation_batch_size": 32},
            {"per_device_train_batch_size": 4},
            4,
            16,
        ),
    ],
)
@pytest.mark.parametrize("copied", COPIES, ids=COPIES)
def test_a_replaced_option_wins_over_sizes_that_were_worked_out(
    make, options, changes, steps, rows, copied
):
    config = dataclasses.replace(COPIES[copied](make(**options)), **changes)
    assert (config.steps_per_generation, config.generation_batch_size) == (steps, rows)
    for name in changes.keys() - SIZES:
        assert getattr(config, name) == changes[name]


def test_a_replaced_size_that_contradicts_a_given_one_is_refused(make):
    with pytest.raises(
        ValueError, match="generation_batch_size=64 and steps_per_generation=4 contradict"
    ):
        dataclasses.replace(make(steps_per_generation=4), generation_batch_size=64)


def test_a_size_taken_from_another_config_is_given(make):
    other = make(gradient_accumulation_steps=4)  # 32 rows
    assert make(generation_batch_size=other.generation_batch_size).steps_per_generation == 4


@pytest.mark.parametrize(
    "options", [{}, {"steps_per_generation": 4}, {"generation_batch_size": 32}], ids=str
)
@pytest.mark.parametrize(
    "written", [dict, lambda values: json.loads(json.dumps(values))], ids=["dict", "json"]
)
def test_a_config_can_be_made_of_what_to_dict_says(make, options, written):
    config = make(
        temperature=0.7, warmup_ratio=0.1, scale_rewards=False, eval_strategy="steps", **options
    )
    values = config.to_dict()
    assert {type(values[name]) for name in SIZES} == {int}
    assert GMPOConfig(**written(values)).to_dict() == values


def test_the_clip_window_is_inert_with_one_optimizer_step_per_collection(make):
    assert make(gradient_accumulation_steps=2).clip_window_is_inert
    assert not make(steps_per_generation=2).clip_window_is_inert
    assert not make(num_iterations=2).clip_window_is_inert


def test_old_names_still_act(make):
    config = make(scale_rewards=False, vllm_importance_sampling_cap=2.0, warmup_ratio=0.25)
    assert config.scale_rewards == "none"
    assert config.vllm_importance_sampling_clip_max == 2.0
    assert config.get_warmup_steps(100) == 25
    assert make(warmup_ratio=1.0).get_warmup_steps(100) == 100
    assert make(scale_rewards=True).scale_rewards == "group"


@pytest.mark.parametrize("value", [None, False])
def test_batches_may_be_said_not_to_be_dispatched(make, value):
    """It is what gmpo sets for streams, and what TRL's error tells to set."""
    config = make(accelerator_config={"dispatch_batches": value})
    assert config.accelerator_config.dispatch_batches is value


def test_json_strings_are_read_as_dicts(make):
    config = make(generation_kwargs='{"top_k": 3}', model_init_kwargs='{"dtype": "float32"}')
    assert config.generation_kwargs == {"top_k": 3}
    assert config.model_init_kwargs == {"dtype": "float32"}


def test_an_output_folder_that_cannot_be_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is a file"):
        GMPOConfig(str(tmp_path / "file" / "out"))


def test_changed_options_are_those_that_differ_from_the_defaults(make):
    config = make(epsilon=0.3, temperature=0.7)
    changed = changed_options(config)
    assert changed["epsilon"] == 0.3
    assert changed["temperature"] == 0.7
    assert "top_p" not in changed
