import math

import pytest
import yaml

from gmpo.cli.dry_run import arithmetic, plan, total_steps
from gmpo.cli.parse import ScriptOptions
from gmpo.config import GMPOConfig, GRPOConfig


@pytest.fixture
def config(tmp_path):
    def make(**options):
        return GMPOConfig(**{"output_dir": str(tmp_path), "use_cpu": True, **options})

    return make


def test_the_plan_is_yaml_that_asks_for_the_same_run(config):
    script = ScriptOptions(
        model="m", dataset="reasoning_gym:chain_sum", dataset_kwargs={"size": 8}, dry_run=True
    )
    options = yaml.safe_load(plan(script, config(temperature=0.7, num_generations=4), 8))
    assert options["dataset_kwargs"] == {"size": 8}
    assert (options["temperature"], options["num_generations"], options["top_p"]) == (0.7, 4, 1.0)
    assert "dry_run" not in options


def test_what_differs_from_the_defaults_comes_first(config):
    text = plan(ScriptOptions(model="m", dataset="d"), config(temperature=0.7, top_p=1.0), 8)
    first, _, rest = text.partition("# everything else")
    assert "temperature: 0.7" in first
    assert "model: m" in first
    assert "top_p: 1.0" not in first
    assert "top_p: 1.0" in rest


def test_only_options_of_the_objective_are_printed(config, tmp_path):
    script = ScriptOptions(model="m", dataset="d")
    gmpo = yaml.safe_load(plan(script, config(loss_type="gmpo", mean_power=-1.0), 8)).keys()
    assert {
        "epsilon",
        "delta",
        "mean_power",
        "mean_power_final",
        "importance_sampling_level",
        "beta",
    } <= gmpo
    assert not gmpo & {"loss_type", "sapo_temperature_neg", "vespo_k_pos"}
    sapo = yaml.safe_load(
        plan(script, GRPOConfig(str(tmp_path), loss_type="sapo", use_cpu=True), 8)
    ).keys()
    assert {"loss_type", "sapo_temperature_neg", "beta"} <= sapo
    assert not sapo & {"epsilon", "delta", "mean_power", "mean_power_final", "vespo_k_pos"}


@pytest.mark.parametrize(
    ("options", "printed"),
    [
        ({}, {}),
        ({"steps_per_generation": 4}, {"steps_per_generation": 4}),
        ({"generation_batch_size": 32}, {"generation_batch_size": 32}),
    ],
    ids=str,
)
def test_of_the_sizes_those_that_were_given_are_printed(config, options, printed):
    shown = yaml.safe_load(plan(ScriptOptions(model="m", dataset="d"), config(**options), 8))
    assert {
        name: shown[name]
        for name in shown.keys() & {"steps_per_generation", "generation_batch_size"}
    } == printed


def test_a_secret_is_not_printed(config):
    text = plan(ScriptOptions(model="m", dataset="d"), config(hub_token="hf_secret"), 8)
    assert "hf_secret" not in text


def test_the_arithmetic_names_prompts_completions_and_steps(config):
    options = config(
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        steps_per_generation=8,
        num_generations=8,
        num_iterations=2,
        num_train_epochs=2,
    )
    # a collection is 4 * 8 = 32 rows of 4 prompts, seen twice: 16 micro-batches, an update after every 2 of them
    # 21 prompts make 5 whole collections an epoch: 5 * 16 / 2 = 40 updates, 80 in two epochs
    assert list(arithmetic(options, 21)) == [
        "# a collection: 4 prompts x 8 = 32 completions",
        "# an optimizer step: 8 completions of 1 process(es); 8 per collection",
        "# an epoch: 5 collections of the 21 prompts",
        "# optimizer steps: 80",
    ]


def test_a_window_that_clips_nothing_is_pointed_out(config):
    assert any("no clipping" in line for line in arithmetic(config(), 8))
    assert not any("no clipping" in line for line in arithmetic(config(num_iterations=2), 8))


@pytest.mark.parametrize(
    ("options", "num_prompts", "steps"),
    [
        ({"max_steps": 7}, 100, 7),
        ({"max_steps": 7}, None, 7),
        ({}, None, None),
        ({"num_train_epochs": 1.5}, 10, 15),
        (
            {"gradient_accumulation_steps": 4, "steps_per_generation": 1, "num_train_epochs": 1},
            10,
            math.ceil(10 / 4),
        ),
    ],
)
def test_total_steps_are_those_of_the_trainer(config, options, num_prompts, steps):
    assert total_steps(config(**options), num_prompts) == steps


def test_too_few_prompts_for_a_collection_are_refused(config):
    with pytest.raises(ValueError, match=r"has 3 prompt.* needs 4"):
        total_steps(config(steps_per_generation=4), 3)
