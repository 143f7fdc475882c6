"""Options with many choices: each of them is taken, or refused with what it lacks."""

import pytest
from transformers.trainer_utils import SchedulerType
from transformers.training_args import OptimizerNames

from tests.options.observables import optimizer, rates, weights
from tests.options.runs import SCENARIOS, build, run

BUILT_IN = {
    "adamw_torch": "AdamW",
    "adamw_torch_fused": "AdamW",
    "adafactor": "Adafactor",
    "sgd": "SGD",
    "adagrad": "Adagrad",
    "rmsprop": "RMSprop",
}
OTHERS = [name.value for name in OptimizerNames if name.value not in BUILT_IN]
NEEDED = {  # what a scheduler needs besides its name
    "cosine_with_min_lr": {"lr_scheduler_kwargs": {"min_lr": 1e-4}},
    "cosine_warmup_with_min_lr": {"lr_scheduler_kwargs": {"min_lr": 1e-4}},
    "warmup_stable_decay": {"lr_scheduler_kwargs": {"num_decay_steps": 1}},
}
BY_METRIC = ("reduce_lr_on_plateau", "greedy")


@pytest.mark.parametrize("name", BUILT_IN)
def test_an_optimizer_of_torch_or_transformers_moves_the_weights(name):
    result = run("gmpo", optim=name)
    assert optimizer(result) == BUILT_IN[name]
    assert weights(result) != weights(run("built"))


@pytest.mark.parametrize("name", OTHERS)
def test_an_optimizer_of_another_package_names_what_it_lacks(tmp_path, name):
    given = {"optim": name}
    if name.startswith(("galore", "apollo")):
        given["optim_target_modules"] = ["q_proj"]
    trainer = build(SCENARIOS["gmpo"], given, tmp_path)
    with pytest.raises((ImportError, ValueError), match=r"(?i)install|import|requires|need"):
        trainer.create_optimizer()


@pytest.mark.parametrize("name", [s.value for s in SchedulerType if s.value not in BY_METRIC])
def test_a_scheduler_sets_the_rate_of_every_step(name):
    given = {"warmup_steps": 1, **NEEDED.get(name, {})}
    warm, later = rates(run("gmpo", lr_scheduler_type=name, **given))
    flat = name == "constant"  # the only one that knows no warm-up
    assert (warm == later) == flat
    assert later > 0


@pytest.mark.parametrize("name", BY_METRIC)
def test_a_scheduler_that_follows_a_metric_needs_evaluations(tmp_path, name):
    with pytest.raises(ValueError, match=f"{name} requires an eval strategy"):
        build(SCENARIOS["gmpo"], {"lr_scheduler_type": name}, tmp_path)
    assert len(rates(run("eval", lr_scheduler_type=name))) == 2
