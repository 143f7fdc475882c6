"""Loss and the gradient of every parameter, through a model, against the peer's trainers."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from gmpo.config import GMPOConfig, GRPOConfig
from gmpo.learn import MicroBatch
from gmpo.objective.types import Denominators
from gmpo.trainer import GMPOTrainer, GRPOTrainer
from gmpo.types import Batch
from tests.parity.cases import MAX_COMPLETION_LENGTH
from tests.parity.peer import Peer

pytestmark = pytest.mark.parity
GROUP, TEMPERATURE = 4, 0.7
OPTIONS: dict[str, dict[str, Any]] = {
    "gmpo": {},
    "gmpo_with_kl": {"beta": 0.1},
    "grpo": {"loss_type": "grpo"},
    "dapo": {"loss_type": "dapo"},
    "bnpo": {"loss_type": "bnpo"},
    "dr_grpo": {"loss_type": "dr_grpo"},
    "grpo_with_kl": {"loss_type": "grpo", "beta": 0.1, "use_bias_correction_kl": True},
    "luspo": {"loss_type": "luspo", "importance_sampling_level": "sequence"},
    "cispo": {"loss_type": "cispo", "epsilon_high": 1.5},
    "sapo": {"loss_type": "sapo"},
    "vespo": {"loss_type": "vespo"},
}
SHARED = {
    "num_generations": GROUP,
    "per_device_train_batch_size": 2 * GROUP,
    "max_completion_length": MAX_COMPLETION_LENGTH,
    "temperature": TEMPERATURE,
    "use_bias_correction_kl": False,
}


def plain_logps(model: Any, batch: Batch) -> Tensor:
    """[B, T], one row at a time, the way one would write it first."""
    logps = torch.zeros(batch.mask.shape)
    for row, length in enumerate(batch.lengths.tolist()):
        prompt = batch.prompt_ids[row]
        ids = torch.cat([prompt, batch.completion_ids[row, :length]])
        distribution = (model(ids[None]).logits[0] / TEMPERATURE).log_softmax(-1)
        logps[row, :length] = distribution[len(prompt) - 1 : -1].gather(
            1, ids[len(prompt) :, None]
        )[:, 0]
    return logps


@pytest.fixture(scope="module")
def batch(model_folder: Path) -> Batch:
    """Two groups: prompts of 3 and 7 tokens, completions of 1 to 9, some tokens of a tool among them."""
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(4, 30, (size,), generator=generator) for size in (3, 7)]
    lengths = torch.tensor([9, 1, 4, 6, 2, 8, 5, 7])
    within = torch.arange(9) < lengths[:, None]
    mask = within.clone()
    mask[3, 2:4] = mask[5, 0] = False
    rows = Batch(
        prompt_ids=[prompts[row // GROUP] for row in range(2 * GROUP)],
        completion_ids=torch.randint(4, 30, within.shape, generator=generator).where(within, 0),
        lengths=lengths,
        mask=mask,
        num_completion_tokens=mask.sum(1),
        advantages=torch.randn(2 * GROUP, generator=generator),
        group=torch.arange(2 * GROUP) // GROUP,
    )
    with torch.no_grad():
        logps = plain_logps(AutoModelForCausalLM.from_pretrained(model_folder), rows)

    def moved(by: float) -> Tensor:
        return torch.where(mask, logps + by * torch.randn(mask.shape, generator=generator), 0)

    return replace(rows, old_logps=moved(0.4), ref_logps=moved(0.5))


def peers_inputs(batch: Batch) -> dict[str, Tensor]:
    """The batch under the peer's names: prompts padded on the left, completions on the right."""
    assert batch.old_logps is not None and batch.ref_logps is not None
    width = max(len(ids) for ids in batch.prompt_ids)
    prompts = torch.zeros(len(batch), width, dtype=torch.int64)
    prompt_mask = torch.zeros_like(prompts)
    for row, ids in enumerate(batch.prompt_ids):
        prompts[row, width - len(ids) :] = ids
        prompt_mask[row, width - len(ids) :] = 1
    return {
        "prompt_ids": prompts,
        "prompt_mask": prompt_mask,
        "completion_ids": batch.completion_ids,
        "completion_mask": (torch.arange(batch.mask.shape[1]) < batch.lengths[:, None]).long(),
        "tool_mask": batch.mask.long(),
        "old_per_token_logps": batch.old_logps,
        "ref_per_token_logps": batch.ref_logps,
        "advantages": batch.advantages,
        "num_items_in_batch": batch.mask.sum(),
    }


@pytest.fixture(scope="module")
def answers(peer: Peer, batch: Batch) -> dict[str, dict[str, Tensor]]:
    """The peer's gradients by parameter, and its "loss", of every objective."""
    inputs = peers_inputs(batch)
    return {
        name: peer.gradients(inputs, gmpo=name.startswith("gmpo"), options={**SHARED, **options})
        for name, options in OPTIONS.items()
    }


def our_gradients(
    name: str, batch: Batch, folder: Path, tmp_path: Path, **options: Any
) -> dict[str, Tensor]:
    trainer_class, config_class = (
        (GMPOTrainer, GMPOConfig) if name.startswith("gmpo") else (GRPOTrainer, GRPOConfig)
    )
    options = {**SHARED, "steps_per_generation": 2, **OPTIONS[name], **options}
    trainer = trainer_class(
        AutoModelForCausalLM.from_pretrained(folder),
        lambda completions, **_: [0.0] * len(completions),
        args=config_class(
            str(tmp_path), use_cpu=True, report_to="none", gradient_checkpointing=False, **options
        ),
        train_dataset=Dataset.from_dict({"prompt": ["a", "b", "c", "d"]}),
        processing_class=AutoTokenizer.from_pretrained(folder),
    )
    tokens = float(batch.mask.sum())
    denominators = Denominators(len(batch), tokens, tokens, 1, MAX_COMPLETION_LENGTH)
    trainer.model.train()
    loss = trainer.compute_loss(trainer.model, MicroBatch(batch, denominators))
    loss.backward()
    gradients = {name: p.grad for name, p in trainer.model.named_parameters() if p.grad is not None}
    return {**gradients, "loss": loss.detach()}


@pytest.mark.parametrize("layout", ["shared_prefix", "packed", "padded"])
@pytest.mark.parametrize("name", OPTIONS)
def test_loss_and_every_gradient_are_the_peers(
    name, layout, answers, batch, model_folder, tmp_path
):
    ours = our_gradients(name, batch, model_folder, tmp_path, batch_layout=layout)
    theirs = answers[name]
    assert ours.keys() == theirs.keys()
    largest = max(float(value.abs().max()) for value in theirs.values())
    for key, expected in theirs.items():
        torch.testing.assert_close(
            ours[key], expected, rtol=1e-5, atol=1e-5 * largest, msg=lambda m, k=key: f"{k}: {m}"
        )
