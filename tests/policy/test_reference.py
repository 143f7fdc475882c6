"""The reference is the policy as it was given, and moves only when it is told to."""

import pytest
import torch
from peft import LoraConfig, get_peft_model

from gmpo.policy.logprobs import LogProbs
from gmpo.policy.reference import (
    AdapterCopy,
    BaseOfAdapter,
    FrozenCopy,
    ReferenceState,
    ReferenceSync,
    make_reference,
)
from gmpo.policy.settings import PolicySettings
from tests.policy.cases import make_batch, make_model


def adapted():
    model = get_peft_model(
        make_model("llama"), LoraConfig(target_modules=["q_proj", "v_proj"])
    ).double()
    return model


def change(model):
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1


def logps(reference, policy, batch):
    with torch.no_grad(), reference.active(policy) as model:
        return LogProbs(PolicySettings()).compute(model, batch).logps


def test_no_kl_no_reference():
    assert make_reference(make_model("llama"), 0.0) is None


def test_a_copy_is_frozen_in_evaluation_mode_and_independent():
    policy, batch = make_model("llama"), make_batch()
    reference = make_reference(policy, 0.1)
    before = logps(reference, policy, batch)
    change(policy)
    assert isinstance(reference, FrozenCopy)
    torch.testing.assert_close(logps(reference, policy, batch), before, rtol=0, atol=0)
    assert not any(parameter.requires_grad for parameter in reference.model.parameters())
    assert not reference.model.training and policy.training
    assert all(parameter.requires_grad for parameter in policy.parameters())


def test_the_copy_is_of_the_model_as_given_not_of_its_name():
    policy = make_model("llama")
    policy.config._name_or_path = "somewhere/else"
    reference = make_reference(policy, 0.1)
    for mine, theirs in zip(reference.model.parameters(), policy.parameters(), strict=True):
        assert torch.equal(mine, theirs) and mine.data_ptr() != theirs.data_ptr()


def test_under_a_fresh_adapter_the_reference_is_its_base_without_a_copy():
    policy, batch = adapted(), make_batch()
    reference = make_reference(policy, 0.1)
    before = logps(reference, policy, batch)
    change(policy)
    assert isinstance(reference, BaseOfAdapter)
    torch.testing.assert_close(logps(reference, policy, batch), before, rtol=1e-12, atol=1e-12)
    now = LogProbs(PolicySettings()).compute(policy, batch).logps
    assert (now - before).abs().max() > 1e-3


STARTS = {  # adapters that do something before the first update, and one that does not
    "random": {"init_lora_weights": False},
    "pissa": {"init_lora_weights": "pissa"},
    "olora": {"init_lora_weights": "olora"},
    "dora": {"init_lora_weights": False, "use_dora": True},
    "embedding": {"init_lora_weights": False, "target_modules": ["embed_tokens"]},
    "fresh": {},
    "fresh embedding": {"target_modules": ["embed_tokens"]},
}


@pytest.mark.parametrize("start", STARTS)
def test_the_reference_of_an_adapter_is_the_policy_at_the_start(start):
    options = {"target_modules": ["q_proj", "v_proj"], "r": 4, **STARTS[start]}
    model = make_model("llama").float()  # PiSSA and OLoRA refuse float64
    policy, batch = get_peft_model(model, LoraConfig(**options)).double(), make_batch()
    reference = make_reference(policy, 0.1)
    before = LogProbs(PolicySettings()).compute(policy, batch).logps.detach()
    torch.testing.assert_close(logps(reference, policy, batch), before, rtol=1e-12, atol=1e-12)

    change(policy)
    torch.testing.assert_close(logps(reference, policy, batch), before, rtol=1e-12, atol=1e-12)
    now = LogProbs(PolicySettings()).compute(policy, batch).logps
    assert (now - before).abs().max() > 1e-3
    assert isinstance(reference, BaseOfAdapter) == start.startswith("fresh")


def test_the_reference_of_stacked_adapters_keeps_the_frozen_one():
    options = {"target_modules": ["q_proj"], "init_lora_weights": False}
    policy, batch = get_peft_model(make_model("llama"), LoraConfig(**options)), make_batch()
    policy.add_adapter("second", LoraConfig(target_modules=["v_proj"]))
    policy.base_model.set_adapter(["default", "second"])
    for name, parameter in policy.named_parameters():
        parameter.requires_grad_("second" in name.split("."))
    policy = policy.double()

    reference = make_reference(policy, 0.1)
    before = LogProbs(PolicySettings()).compute(policy, batch).logps.detach()
    torch.testing.assert_close(logps(reference, policy, batch), before, rtol=1e-12, atol=1e-12)
    change(policy)
    torch.testing.assert_close(logps(reference, policy, batch), before, rtol=1e-12, atol=1e-12)


def test_a_trained_module_beside_lora_is_copied_too():
    options = {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}
    policy = get_peft_model(make_model("llama"), LoraConfig(**options))
    reference = make_reference(policy, 0.1)
    assert isinstance(reference, AdapterCopy)
    assert any("lm_head" in name for name in reference.copies)


@pytest.mark.parametrize("make", [lambda: make_model("llama"), adapted], ids=["model", "adapter"])
def test_only_ranks_that_write_keep_the_moved_reference(make):
    reference = make_reference(make(), 0.1, sync=True)
    assert ReferenceState(reference, keep=False).state_dict() == {}
    kept = ReferenceState(reference, keep=True).state_dict()
    assert kept.keys() == reference.tensors().keys()
    assert all(kept[name].data_ptr() != t.data_ptr() for name, t in reference.tensors().items())


def test_sync_mixes_every_k_steps():
    policy = make_model("llama")
    reference = make_reference(policy, 0.1, sync=True)
    start = [parameter.clone() for parameter in reference.model.parameters()]
    change(policy)
    sync = ReferenceSync(reference, alpha=0.25, steps=2)
    assert not sync.after_step(policy, 1)
    assert all(map(torch.equal, reference.model.parameters(), start))
    assert sync.after_step(policy, 2)
    for mine, before in zip(reference.model.parameters(), start, strict=True):
        torch.testing.assert_close(mine, before + 0.25 * 0.1)  # 0.75 before + 0.25 (before + 0.1)
    assert not any(parameter.requires_grad for parameter in reference.model.parameters())


def test_sync_under_an_adapter_moves_a_copy_of_its_weights():
    policy, batch = adapted(), make_batch()
    trained = {name: p.detach().clone() for name, p in policy.named_parameters() if p.requires_grad}
    reference = make_reference(policy, 0.1, sync=True)
    start = logps(reference, policy, batch)
    change(policy)
    torch.testing.assert_close(logps(reference, policy, batch), start, rtol=1e-12, atol=1e-12)
    for name, parameter in policy.named_parameters():  # scoring put the policy's own weights back
        if parameter.requires_grad:
            torch.testing.assert_close(parameter, trained[name] + 0.1, rtol=1e-12, atol=1e-12)
    ReferenceSync(reference, alpha=1.0, steps=1).after_step(policy, 1)
    now = LogProbs(PolicySettings()).compute(policy, batch).logps
    torch.testing.assert_close(logps(reference, policy, batch), now, rtol=1e-12, atol=1e-12)
    assert (now - start).abs().max() > 1e-3


@pytest.mark.parametrize(
    "make", [lambda: make_model("llama-tied"), adapted], ids=["whole model", "adapter"]
)
def test_a_moved_reference_survives_a_resume(make):
    policy, batch = make(), make_batch()
    reference = make_reference(policy, 0.1, sync=True)
    sync = ReferenceSync(reference, alpha=0.5, steps=1)
    change(policy)
    sync.after_step(policy, 1)
    expected = logps(reference, policy, batch)

    resumed = make_reference(policy, 0.1, sync=True)
    assert (logps(resumed, policy, batch) - expected).abs().max() > 1e-3
    ReferenceState(resumed).load_state_dict(ReferenceState(reference).state_dict())
    torch.testing.assert_close(logps(resumed, policy, batch), expected, rtol=1e-12, atol=1e-12)
