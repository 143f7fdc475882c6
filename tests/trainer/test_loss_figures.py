"""Figures that say what the loss is made of, and the entropies that steer its bonus."""

import pytest
import torch
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from gmpo.config import GRPOConfig
from gmpo.policy.moe import load_balancing_loss
from gmpo.trainer import GRPOTrainer
from tests.policy.cases import make_batch
from tests.tiny import WORDS, tiny_model
from tests.trainer.conftest import share_of_a

ADAPTIVE = {
    "use_adaptive_entropy": True,
    "entropy_coef": 0.1,
    "entropy_coef_delta": 0.05,
    "entropy_target": 5.0,
}


def figures_of(trainer, name):
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def some_groups_alike(completions, **columns):
    """Reward groups of one prompt the same in every second call of four."""
    rewards = share_of_a(completions)
    return [0.0] * 4 + rewards[4:]


def mixture():
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=len(WORDS),
        hidden_size=32,
        intermediate_size=64,
        moe_intermediate_size=16,
        num_experts=4,
        num_experts_per_tok=2,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        decoder_sparse_step=1,
        pad_token_id=0,
        eos_token_id=1,
    )
    return Qwen3MoeForCausalLM(config)


@pytest.mark.parametrize("bonus", [{"entropy_coef": 0.5}, ADAPTIVE], ids=["constant", "adaptive"])
def test_the_loss_is_the_policy_loss_less_the_bonus(make_trainer, bonus):
    trainer = make_trainer(
        model=tiny_model(dtype=torch.float64), **bonus, gradient_accumulation_steps=2, max_steps=4
    )
    trainer.train()
    coefficients = figures_of(trainer, "entropy_coef")
    parts = zip(
        figures_of(trainer, "loss"),
        figures_of(trainer, "policy_loss"),
        figures_of(trainer, "entropy"),
        coefficients,
        strict=True,
    )
    first = True
    for loss, policy_loss, entropy, coefficient in parts:
        acting = 0.0 if first and bonus is ADAPTIVE else coefficient
        assert loss == pytest.approx(policy_loss - acting * entropy, abs=2e-6)
        first = False
    wanted = [0.5] * 4 if bonus is not ADAPTIVE else [0.1, 0.15, 0.2, 0.25]
    assert coefficients == pytest.approx(wanted)


def test_without_a_bonus_its_figures_are_not_logged(make_trainer):
    trainer = make_trainer()
    trainer.train()
    names = set().union(*trainer.state.log_history)
    assert not names & {"policy_loss", "entropy_coef", "aux_loss", "entropy/selected"}


@pytest.mark.parametrize("chunk", [None, 12])
def test_the_balance_of_experts_is_logged(make_trainer, monkeypatch, chunk):
    losses = []

    def remember(*args):
        losses.append(load_balancing_loss(*args))
        return losses[-1]

    monkeypatch.setattr("gmpo.policy.logprobs.load_balancing_loss", remember)
    trainer = make_trainer(
        model=mixture(), max_steps=1, router_aux_loss_coef=0.1, max_tokens_per_chunk=chunk
    )
    trainer.train()
    (logged,) = figures_of(trainer, "aux_loss")
    assert min(losses) <= logged <= max(losses)  # a mean over chunks, by rows
    if chunk is None:
        assert logged == pytest.approx(float(losses[0].detach()))
    else:
        assert len(losses) > 1


def test_the_adaptive_bonus_steers_by_all_rows(make_trainer):
    """Rows without signal are skipped where that is exact; the controller's entropy needs them."""
    logs = {}
    for mode in ("keep", "skip"):
        trainer = make_trainer(
            model=tiny_model(dtype=torch.float64),
            reward_funcs=some_groups_alike,
            zero_signal_groups=mode,
            max_steps=4,
            **{**ADAPTIVE, "entropy_target": 2.4},
        )
        trainer.train()
        names = ("entropy", "entropy_coef", "log_ratio/max", "log_ratio/min")
        logs[mode] = {name: figures_of(trainer, name) for name in names}
    for name, values in logs["keep"].items():
        assert logs["skip"][name] == pytest.approx(values), name


@pytest.mark.parametrize("loss_type", ["dapo", "bnpo"])
def test_masked_completions_leave_the_means_over_tokens(make_trainer, loss_type):
    trainer = make_trainer(
        cls=GRPOTrainer,
        config_class=GRPOConfig,
        loss_type=loss_type,
        mask_truncated_completions=True,
        epsilon=0.2,
    )
    batch = make_batch(holes=False)
    written = batch.mask.sum(1)
    batch.mask[0] = False  # a completion that ran into the limit
    (counts,) = trainer.stages.optimizer_batches.denominators([batch])
    assert counts.num_rows == len(batch)
    assert counts.tokens == counts.micro_batch_tokens == float(written[1:].sum())


def test_what_is_not_gspo_is_told_when_the_trainer_is_made(make_trainer):
    options = {"cls": GRPOTrainer, "config_class": GRPOConfig, "epsilon": 0.2}
    with pytest.warns(UserWarning, match=r"loss_type='dapo'.*For GSPO.*loss_type='grpo'"):
        make_trainer(importance_sampling_level="sequence", **options)


def test_dropout_in_the_policy_is_told_when_the_trainer_is_made(make_trainer):
    with pytest.warns(UserWarning, match="disable_dropout=True"):
        make_trainer(model=tiny_model(attention_dropout=0.1))
