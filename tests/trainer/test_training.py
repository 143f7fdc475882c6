"""A whole run: learning, invariance of the update to how it is cut, logs, evaluation."""

import json
import math
from pathlib import Path

import pytest
import torch
from datasets import Dataset, IterableDataset
from torch import nn

from gmpo.trainer import GRPOTrainer
from tests.tiny import tiny_model
from tests.trainer.conftest import PROMPTS, share_of_a


def logs_of(trainer):
    return [entry for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_a_tiny_model_learns_to_write_one_token_more_often_or_less_with_the_sign_flipped(
    make_trainer, sign
):
    def reward(completions, **columns):
        return [sign * score for score in share_of_a(completions)]

    trainer = make_trainer(
        reward_funcs=reward, max_steps=40, steps_per_generation=4, learning_rate=3e-3
    )
    trainer.train()
    shares = [sign * entry["reward"] for entry in logs_of(trainer) if "reward" in entry]
    first, last = sum(shares[:2]) / 2, sum(shares[-2:]) / 2
    assert (last > 0.6) if sign > 0 else (last < first / 2)


def test_the_clip_window_acts_from_the_second_step_of_a_collection_on(make_trainer):
    def letters(completions, **columns):  # hardly ever the same for two completions
        return [float(sum(map(ord, text))) for text in completions]

    trainer = make_trainer(
        reward_funcs=letters, max_steps=4, steps_per_generation=4, learning_rate=5e-3, epsilon=0.02
    )
    trainer.train()
    shares = [entry["clip_ratio/region_mean"] for entry in logs_of(trainer)]
    assert shares[0] == 0.0
    assert all(share > 0.0 for share in shares[1:])


@pytest.mark.parametrize("loss_type", ["gmpo", "grpo", "dapo", "dr_grpo"])
def test_cutting_the_optimizer_batch_differently_gives_the_same_update(
    make_trainer, weights, loss_type
):
    results = []
    cls = {} if loss_type == "gmpo" else {"cls": GRPOTrainer}
    for rows, accumulation, chunk in ((8, 1, None), (4, 2, None), (2, 4, None), (8, 1, 20)):
        trainer = make_trainer(
            **cls,
            loss_type=loss_type,
            model=tiny_model(dtype=torch.float64),
            per_device_train_batch_size=rows,
            gradient_accumulation_steps=accumulation,
            steps_per_generation=accumulation,
            num_iterations=2,
            max_tokens_per_chunk=chunk,
            batch_layout="padded",  # norms compute in float32, so that layouts agree to 1e-8 only
            max_steps=2,
            optim="sgd",
            max_grad_norm=0.0,
            learning_rate=0.1,
        )
        trainer.train()
        results.append(weights(trainer.model))
    before = weights(tiny_model(dtype=torch.float64))
    assert max((results[0][name] - before[name]).abs().max() for name in before) > 1e-4
    for other in results[1:]:
        for name, value in results[0].items():
            torch.testing.assert_close(other[name], value, rtol=1e-10, atol=1e-12)


def test_groups_without_signal_are_skipped_with_the_same_update(make_trainer, weights):
    def reward(prompts, completions, **columns):  # prompts of one word get one reward for all
        return [
            0.5 if len(p.split()) == 1 else s
            for p, s in zip(prompts, share_of_a(completions), strict=True)
        ]

    results = {}
    for mode in ("skip", "keep"):
        trainer = make_trainer(
            reward_funcs=reward,
            model=tiny_model(dtype=torch.float64),
            zero_signal_groups=mode,
            train_dataset=Dataset.from_list([{"prompt": "a"}, {"prompt": "a b c"}] * 2),
        )
        trainer.train()
        results[mode] = weights(trainer.model)
        assert logs_of(trainer)[0]["frac_reward_zero_std"] > 0
    for name, value in results["keep"].items():
        torch.testing.assert_close(results["skip"][name], value, rtol=1e-9, atol=1e-12)


def test_rows_with_a_signal_share_the_passes_of_an_optimizer_step(make_trainer, weights):
    def reward(prompts, completions, **columns):  # every other prompt has no signal
        return [
            0.5 if len(p.split()) == 1 else s
            for p, s in zip(prompts, share_of_a(completions), strict=True)
        ]

    results, passes = {}, {}
    for mode in ("skip", "keep"):
        trainer = make_trainer(
            reward_funcs=reward,
            model=tiny_model(dtype=torch.float64),
            zero_signal_groups=mode,
            gradient_accumulation_steps=4,
            steps_per_generation=4,
            train_dataset=Dataset.from_list([{"prompt": "a"}, {"prompt": "a b c"}] * 4),
            max_steps=1,
        )
        passes[mode] = 0
        loss = trainer.stages.logprobs.loss

        def counted(*args, mode=mode, loss=loss, **keywords):
            passes[mode] += 1
            return loss(*args, **keywords)

        trainer.stages.logprobs.loss = counted
        trainer.train()
        results[mode] = weights(trainer.model)
    # four micro-batches of two groups each; the four groups that have a signal fill two of them
    assert passes == {"keep": 4, "skip": 2}
    for name, value in results["keep"].items():
        torch.testing.assert_close(
            results["skip"][name], value, rtol=1e-6, atol=1e-8
        )  # Llama norms in float32


def test_without_any_signal_the_weights_stay_and_nothing_is_nan(make_trainer, weights):
    trainer = make_trainer(reward_funcs=lambda completions, **columns: [1.0] * len(completions))
    before = weights(trainer.model)
    trainer.train()
    for name, value in weights(trainer.model).items():
        assert torch.equal(value, before[name])
    assert all(math.isfinite(entry["loss"]) for entry in logs_of(trainer))


def test_message_prompts_give_message_completions(make_trainer):
    seen = []

    def reward(prompts, completions, **columns):
        seen.extend(zip(prompts, completions, strict=True))
        return [0.0, 1.0] * (len(completions) // 2)

    rows = [{"prompt": [{"role": "user", "content": "a b"}]} for _ in range(8)]
    make_trainer(reward_funcs=reward, train_dataset=Dataset.from_list(rows), max_steps=1).train()
    prompt, completion = seen[0]
    assert prompt == [{"role": "user", "content": "a b"}]
    assert completion[0]["role"] == "assistant"
    assert isinstance(completion[0]["content"], str)


def test_a_streamed_dataset_trains_like_a_map_style_one(make_trainer, weights):
    results = []
    for dataset in (PROMPTS, IterableDataset.from_generator(lambda: iter(PROMPTS))):
        trainer = make_trainer(train_dataset=dataset, shuffle_dataset=False)
        trainer.train()
        results.append(weights(trainer.model))
    for name, value in results[0].items():
        torch.testing.assert_close(results[1][name], value)


def test_the_same_seed_gives_the_same_run_and_another_one_another(make_trainer):
    rewards = []
    for seed in (1, 1, 2):
        trainer = make_trainer(seed=seed)
        trainer.train()
        rewards.append([entry["loss"] for entry in logs_of(trainer)])
    assert rewards[0] == rewards[1] != rewards[2]


def test_every_log_is_a_line_of_metrics_jsonl_with_the_names_of_the_field(make_trainer):
    trainer = make_trainer()
    trainer.train()
    text = Path(trainer.args.output_dir, "metrics.jsonl").read_text(encoding="utf-8")
    lines = [json.loads(line) for line in text.splitlines()]
    first = lines[0]
    for name in (
        "num_tokens",
        "completions/mean_length",
        "completions/clipped_ratio",
        "rewards/share_of_a/mean",
        "rewards/share_of_a/std",
        "reward",
        "reward_std",
        "frac_reward_zero_std",
        "entropy",
        "clip_ratio/low_mean",
        "clip_ratio/high_mean",
        "clip_ratio/region_mean",
        "step_time",
        "log_ratio/min",
        "log_ratio/max",
        "rho/positive/mean",
        "rho/negative/max",
        "sampling/sampling_logp_difference/mean",
        "time/generate",
        "time/learn",
    ):
        assert name in first, name
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4]


def test_the_sampler_reports_the_log_probs_that_the_trainer_computes(make_trainer):
    trainer = make_trainer(temperature=0.7)
    trainer.train()
    assert logs_of(trainer)[0]["sampling/sampling_logp_difference/max"] < 1e-4


def test_evaluation_gives_metrics_for_each_set_and_they_choose_the_best_model(make_trainer):
    sets = {"short": PROMPTS.select(range(3)), "long": PROMPTS.select(range(3, 8))}
    trainer = make_trainer(
        eval_dataset=sets,
        eval_strategy="steps",
        eval_steps=2,
        num_generations_eval=2,
        per_device_eval_batch_size=4,
        save_strategy="steps",
        save_steps=2,
        load_best_model_at_end=True,
        metric_for_best_model="eval_long_reward",
    )
    trainer.train()
    evaluations = [entry for entry in trainer.state.log_history if "eval_long_reward" in entry]
    assert len(evaluations) == 2
    assert trainer.state.best_metric == max(entry["eval_long_reward"] for entry in evaluations)
    metrics = trainer.evaluate()
    assert {
        "eval_short_loss",
        "eval_short_reward",
        "eval_long_completions/mean_length",
    } <= metrics.keys()


def test_every_evaluation_set_keeps_its_completions(make_trainer):
    sets = {"short": PROMPTS.select(range(2)), "long": PROMPTS.select(range(4, 6))}
    trainer = make_trainer(
        eval_dataset=sets,
        num_generations_eval=2,
        per_device_eval_batch_size=4,
        log_completions=True,
        report_to="none",
    )
    trainer.evaluate()
    folder = Path(trainer.args.output_dir, "completions")
    assert sorted(file.name for file in folder.iterdir()) == [
        "eval_long_000000.parquet",
        "eval_short_000000.parquet",
    ]
    for name, rows in sets.items():
        written = Dataset.from_parquet(str(folder / f"eval_{name}_000000.parquet"))
        assert written["prompt"] == [prompt for prompt in rows["prompt"] for _ in range(2)]


def test_evaluation_counts_every_prompt_once_and_leaves_the_training_metrics_alone(make_trainer):
    calls = []

    def reward(completions, **columns):
        calls.append(len(completions))
        return share_of_a(completions)

    trainer = make_trainer(
        reward_funcs=reward,
        eval_dataset=PROMPTS.select(range(5)),
        num_generations_eval=2,
        per_device_eval_batch_size=4,
    )
    trainer.evaluate()
    assert calls == [4, 4, 2]  # 5 prompts, 2 completions each, 2 prompts per batch


def test_compute_metrics_gets_completions_and_their_rewards(make_trainer):
    seen = {}

    def compute(prediction):
        seen["ids"], seen["rewards"], seen["prompts"] = (
            prediction.predictions,
            prediction.label_ids,
            prediction.inputs,
        )
        return {"longest": float((prediction.predictions != -100).sum(1).max())}

    trainer = make_trainer(
        compute_metrics=compute,
        include_for_metrics=["inputs", "loss"],
        eval_dataset=PROMPTS.select(range(5)),
        num_generations_eval=2,
        per_device_eval_batch_size=4,
    )
    metrics = trainer.evaluate()
    assert seen["rewards"].shape == (10, 1)
    assert metrics["eval_longest"] == metrics["eval_completions/max_length"]
    texts = trainer.processing_class.batch_decode(seen["ids"].clip(0), skip_special_tokens=True)
    assert share_of_a(texts) == pytest.approx(seen["rewards"][:, 0].tolist())
    assert [row[row != -100].tolist() for row in seen["prompts"][:3]] == [
        [5],
        [5],
        [5, 6],
    ]  # a, a, a b


def test_a_reward_sees_the_step_that_the_training_is_at(make_trainer):
    seen = []

    def reward(completions, trainer_state, **columns):
        seen.append(trainer_state.global_step)
        return share_of_a(completions)

    make_trainer(reward_funcs=reward, max_steps=3, steps_per_generation=1).train()
    assert seen == [0, 1, 2]


def test_dropping_the_last_evaluation_batch_leaves_whole_batches(make_trainer):
    calls = []
    make_trainer(
        reward_funcs=lambda completions, **columns: (
            calls.append(len(completions)),
            share_of_a(completions),
        )[1],
        eval_dataset=PROMPTS.select(range(5)),
        num_generations_eval=2,
        per_device_eval_batch_size=4,
        dataloader_drop_last=True,
    ).evaluate()
    assert calls == [4, 4]


def test_the_kl_term_pulls_toward_the_reference(make_trainer, weights):
    def distance(beta):
        trainer = make_trainer(beta=beta, max_steps=12, learning_rate=3e-3)
        start = weights(trainer.model)
        trainer.train()
        assert ("kl" in logs_of(trainer)[-1]) == (beta > 0)
        return sum(
            float((p - start[name]).square().sum()) for name, p in weights(trainer.model).items()
        )

    assert distance(10.0) < distance(0.0)


def test_compute_loss_is_the_loss_that_is_trained_on(make_trainer):
    trainer = make_trainer(max_steps=1)
    recorded = []
    original = trainer.training_step

    def step(model, inputs, num_items_in_batch=None):
        recorded.append(
            (trainer.compute_loss(model, inputs).item(), original(model, inputs).item())
        )
        return torch.zeros(())

    trainer.training_step = step
    trainer.train()
    assert recorded[0][0] == pytest.approx(recorded[0][1], rel=1e-5, abs=1e-7)


def test_gradients_of_a_step_are_those_of_the_paper(make_trainer):
    """One SGD step on a fresh collection: grad = -sum_rows A / (L rows) sum_t d logp_t."""
    trainer = make_trainer(
        model=tiny_model(dtype=torch.float64),
        max_steps=1,
        optim="sgd",
        learning_rate=1.0,
        max_grad_norm=0.0,
        steps_per_generation=1,
        lr_scheduler_type="constant",
    )
    kept = []
    original = trainer.training_step

    def step(model, inputs, num_items_in_batch=None):
        kept.append(inputs.batch)
        return original(model, inputs)

    trainer.training_step = step
    reference = tiny_model(dtype=torch.float64)
    trainer.train()
    (batch,) = kept
    loss = torch.zeros((), dtype=torch.float64)
    for i, prompt in enumerate(batch.prompt_ids):
        length = int(batch.lengths[i])
        ids = torch.cat([prompt, batch.completion_ids[i, :length]])
        logps = (
            reference(ids[None])
            .logits[0, :-1]
            .log_softmax(-1)
            .gather(-1, ids[1:, None])[len(prompt) - 1 :, 0]
        )
        loss = loss - batch.advantages[i].double() * logps.mean() / len(batch)
    loss.backward()
    for (name, trained), start in zip(
        trainer.model.named_parameters(), reference.parameters(), strict=True
    ):
        assert isinstance(start, nn.Parameter)
        torch.testing.assert_close(
            trained.detach(), start.detach() - start.grad, rtol=1e-5, atol=1e-7, msg=name
        )


def test_in_mixed_precision_completions_are_sampled_in_it(make_trainer):
    """The Trainer's `compute_loss_context_manager` is empty: accelerate wraps only the forward."""
    for bf16, expected in ((True, torch.bfloat16), (False, torch.float32)):
        for engine in make_trainer(bf16=bf16, use_cpu=True).stages.engine.engines:
            with engine.autocast():
                assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == expected
