"""Options of `transformers.TrainingArguments`: a value of another type or range is refused by name."""

import dataclasses

import pytest

from gmpo.config import GMPOConfig
from gmpo.option import annotation_of, declared_type, rules_of

INHERITED = {f.name: f for f in dataclasses.fields(GMPOConfig) if f.init and rules_of(f) is None}
WRONG_TYPES = {  # first declared type -> values that are of another
    "bool": ("yes", "false", 3, [True]),
    "int": (1.5, "10", True, [1]),
    "float": ("1", True, [0.9], float("nan"), float("inf")),
    "str": (3, ["x", 1], 1.5),
    "dict": (3, True, [1]),
    "list": (3, [None]),
}
# values that another one turns into a legal one, or that only a user's code reads
LEGAL_ANYWAY = {"resume_from_checkpoint": (True,)}
ODD = (None, True, -1, 0, 1.5, float("nan"), float("inf"), "abc", "", [], [1], {"a": 1}, b"x")


def cases():
    for name in INHERITED:
        declared = declared_type(GMPOConfig("unused"), name)
        for kind, values in WRONG_TYPES.items():
            if declared.startswith(kind):
                yield from (pytest.param(name, value, id=f"{name}={value!r}") for value in values)


@pytest.mark.parametrize(("name", "value"), cases())
def test_a_value_of_another_type_is_refused_by_name(tmp_path, name, value):
    if value in LEGAL_ANYWAY.get(name, ()):
        return
    with pytest.raises(ValueError) as caught:
        GMPOConfig(str(tmp_path), **{name: value})
    assert f"{name}={value!r}" in str(caught.value)


@pytest.mark.parametrize("name", INHERITED)
def test_an_odd_value_is_accepted_or_refused_by_name(tmp_path, name):
    for value in ODD:
        try:
            GMPOConfig(str(tmp_path), **{name: value})
        except ValueError as error:
            assert name in str(error), (value, str(error))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"adam_beta1": 1.0}, "adam_beta1=1.0 is out of range: it must be at least 0 and below 1"),
        ({"logging_steps": -1}, "logging_steps=-1 .*above 0"),
        ({"logging_steps": float("inf")}, "logging_steps=inf .*finite"),
        ({"beta": float("inf")}, "beta=inf .*finite"),
        ({"repetition_penalty": float("inf")}, "repetition_penalty=inf .*finite"),
        ({"seed": 2**32}, "seed=4294967296"),
        ({"max_steps": 0}, "max_steps=0 .*at least 1, or -1"),
        (
            {"eval_strategy": "step"},
            "eval_strategy='step' is not one of 'no', .*Did you mean 'steps'",
        ),
        ({"optim": "adamw"}, "optim='adamw' is not one of"),
        ({"lr_scheduler_type": "cosin"}, r"lr_scheduler_type='cosin' .*Did you mean 'cosine'\?"),
        ({"log_level": "loud"}, "log_level='loud' is not one of"),
        ({"report_to": "wanb"}, r"report_to='wanb' .*Did you mean 'wandb'\?"),
        ({"gradient_checkpointing_kwargs": "{bad"}, "gradient_checkpointing_kwargs='{bad' .*JSON"),
        ({"accelerator_config": True}, r"accelerator_config=True \(bool\) is not a dict"),
    ],
    ids=str,
)
def test_what_is_wrong_is_told_with_the_remedy(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        GMPOConfig(str(tmp_path), **options)


@pytest.mark.parametrize("name", ["epsilon", "epsilon_high", "delta"])
def test_an_infinite_clip_bound_means_no_clipping(tmp_path, name):
    assert getattr(GMPOConfig(str(tmp_path), **{name: float("inf")}), name) == float("inf")


def test_folders_may_be_paths(tmp_path):
    assert GMPOConfig(tmp_path / "out").output_dir == str(tmp_path / "out")


def test_a_declared_type_survives_the_argument_parser():
    """HfArgumentParser overwrites `field.type`."""
    assert annotation_of(GMPOConfig, "seed") is int


@pytest.mark.parametrize(
    "options",
    [
        {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 500},
        {"save_strategy": "best"},
        {"lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "epoch"},
    ],
    ids=str,
)
def test_models_are_ranked_by_reward_unless_a_metric_is_given(tmp_path, options):
    """The Trainer would take the loss, which is near 0 by construction."""
    options = {"num_generations_eval": 2, "per_device_eval_batch_size": 2, **options}
    config = GMPOConfig(str(tmp_path), **options)
    assert (config.metric_for_best_model, config.greater_is_better) == ("reward", True)
    if "lr_scheduler_type" in options:
        assert config.lr_scheduler_kwargs == {"mode": "max"}
    chosen = GMPOConfig(str(tmp_path), metric_for_best_model="entropy", **options)
    assert chosen.metric_for_best_model == "entropy"
