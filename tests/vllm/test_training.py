"""Training with a colocated vLLM, start to end."""

import pytest
import torch
from datasets import Dataset

from gmpo.config import GMPOConfig
from gmpo.trainer import GMPOTrainer
from tests.tiny import tiny_tokenizer
from tests.vllm.small import CPU, distances, small_policy

pytest.importorskip("vllm")
pytestmark = [pytest.mark.vllm, pytest.mark.timeout(900)]

PROMPTS = Dataset.from_list([{"prompt": " ".join("abcdefgh"[: 1 + i % 6])} for i in range(8)])


def reward(completions, **columns):
    return [float(text.split().count("a")) for text in completions]


def trainer(folder, policy, **options):
    config = GMPOConfig(
        str(folder),
        **{
            "use_vllm": True,
            "vllm_engine_kwargs": CPU,
            "per_device_train_batch_size": 8,
            "num_generations": 4,
            "max_completion_length": 6,
            "max_steps": 3,
            "num_iterations": 1,
            "steps_per_generation": 2,
            "learning_rate": 1e-2,
            "logging_steps": 1,
            "gradient_checkpointing": False,
            "disable_tqdm": True,
            "report_to": [],
            "use_cpu": True,
            **options,
        },
    )
    return GMPOTrainer(
        policy,
        reward,
        config,
        PROMPTS,
        eval_dataset=PROMPTS.select(range(4)),
        processing_class=tiny_tokenizer(),
    )


@pytest.mark.parametrize("kind", ["whole", "merged adapter"])
def test_a_run_generates_with_the_weights_that_it_has(tmp_path, kind):
    """Also after the best model was loaded at the end, and after a resume."""
    options = {
        "eval_strategy": "steps",
        "eval_steps": 1,
        "save_steps": 1,
        "load_best_model_at_end": True,
        "metric_for_best_model": "eval_reward",
    }
    run = trainer(tmp_path, small_policy(kind), **options)
    run.train()
    assert (
        run.stages.engine.version != run.stages.policy_version.current
    )  # the best model was loaded after the last collection
    run.evaluate()
    assert distances(run.stages.engine._score, run.unwrapped_policy()).max() < 1e-4
    run.stages.engine.close()
    again = trainer(tmp_path, small_policy(kind), **{**options, "max_steps": 4})
    again.train(resume_from_checkpoint=True)
    again.evaluate()
    assert distances(again.stages.engine._score, again.unwrapped_policy()).max() < 1e-4
    again.stages.engine.close()


def test_what_vllm_reports_is_what_the_trainer_computes(tmp_path):
    run = trainer(
        tmp_path, small_policy(), temperature=0.8, top_p=0.9, logps_support="full", logging_steps=1
    )
    run.train()
    logged = [entry for entry in run.state.log_history if any("sampling" in key for key in entry)]
    run.stages.engine.close()
    differences = [value for entry in logged for key, value in entry.items() if "difference" in key]
    assert differences and max(differences) < 1e-3
    assert all(torch.isfinite(torch.tensor(value)) for value in differences)


def test_in_mixed_precision_the_engine_computes_in_it_too(tmp_path):
    run = trainer(tmp_path, small_policy(), bf16=True)
    run.train()
    assert run.stages.engine.dtype == torch.bfloat16
    run.stages.engine.close()
