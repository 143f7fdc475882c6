"""Adapters, DDP and FSDP2 around a model: same scores, same gradients, all ranks together."""

import os
import socket

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from peft import LoraConfig, PrefixTuningConfig, get_peft_model

from gmpo.policy.head import chunked as tiles
from gmpo.policy.logprobs import LogProbs
from gmpo.policy.settings import PolicySettings
from tests.policy.cases import (
    VOCABULARY,
    assert_same_gradients,
    float64_throughout,
    gradients,
    make_batch,
    make_model,
    naive_scores,
    weighted,
    weighted_rows,
)

LAYOUTS = ("padded", "packed", "shared_prefix")
ADAPTERS = {
    "attention": {"target_modules": ["q_proj", "v_proj"]},
    "everything": {"target_modules": "all-linear"},
    "head": {"target_modules": ["q_proj", "lm_head"]},
    "own head": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "some embeddings": {"target_modules": ["q_proj"], "trainable_token_indices": [3, 4]},
}


def adapted(config, name="gemma3-window"):
    return get_peft_model(make_model(name), config).double()


@pytest.fixture
def small_tiles(monkeypatch):
    monkeypatch.setattr(tiles, "TILE_BYTES", 10 * VOCABULARY * 8)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("which", ADAPTERS)
def test_adapters_give_the_scores_and_gradients_of_the_logits(which, layout, small_tiles):
    batch = make_batch(longest=12)
    with float64_throughout():
        model = adapted(LoraConfig(init_lora_weights=False, **ADAPTERS[which]))
        logps, entropy = naive_scores(model, batch)
        whole = weighted(logps, entropy, torch.arange(len(batch)))
        expected = gradients(whole, model)
        logprobs = LogProbs(PolicySettings(batch_layout=layout))
        loss = logprobs.loss(model, batch, weighted_rows(batch))
        found = gradients(loss, model)
    torch.testing.assert_close(logprobs.compute(model, batch).logps, logps, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(loss, whole, rtol=1e-10, atol=1e-10)
    assert_same_gradients(found, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["llama", "qwen3", "qwen3-moe"])
def test_adapters_of_other_kinds_of_models_do_too_with_checkpointing(name, layout):
    batch = make_batch()
    with float64_throughout():
        model = adapted(LoraConfig(init_lora_weights=False, **ADAPTERS["attention"]), name)
        logps, entropy = naive_scores(model, batch)
        expected = gradients(weighted(logps, entropy, torch.arange(len(batch))), model)
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
        found = gradients(
            LogProbs(PolicySettings(batch_layout=layout)).loss(model, batch, weighted_rows(batch)),
            model,
        )
    assert_same_gradients(found, expected, rtol=1e-10, atol=1e-10)


def test_a_frozen_head_gives_the_same_gradients_without_those_of_the_entropy(small_tiles):
    batch = make_batch(longest=12)
    with float64_throughout():
        model = adapted(LoraConfig(init_lora_weights=False, target_modules=["q_proj", "v_proj"]))
        logps, _ = naive_scores(model, batch)
        expected = gradients(logps.square().sum(), model)
        logprobs = LogProbs(PolicySettings())
        loss = logprobs.loss(
            model, batch, lambda rows, logps, entropy: logps.square().sum(), want_entropy_grad=False
        )
        found = gradients(loss, model)
    assert_same_gradients(found, expected, rtol=1e-10, atol=1e-10)


def test_virtual_tokens_keep_to_the_rectangle():
    batch = make_batch()
    with float64_throughout():
        model = adapted(PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
        logps, _ = naive_scores(model, batch)
        with pytest.warns(UserWarning, match="virtual tokens"):
            scores = LogProbs(PolicySettings()).compute(model, batch)
    torch.testing.assert_close(scores.logps, logps, rtol=1e-10, atol=1e-10)


def test_a_compiled_model_is_scored_like_the_model():
    batch, model = make_batch(), make_model("llama", torch.float32)
    compiled = torch.compile(model, backend="eager")
    expected = gradients(LogProbs(PolicySettings()).loss(model, batch, weighted_rows(batch)), model)
    logprobs = LogProbs(PolicySettings())
    for _ in range(2):
        found = gradients(logprobs.loss(compiled, batch, weighted_rows(batch)), model)
        assert_same_gradients(found, expected, rtol=1e-4, atol=1e-4)


def free_port():
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def ddp(**options):
    return lambda model: torch.nn.parallel.DistributedDataParallel(model, **options)


def fsdp(model):
    from torch.distributed.fsdp import fully_shard

    mesh = dist.device_mesh.init_device_mesh("cpu", (2,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model.lm_head, mesh=mesh)
    return fully_shard(model, mesh=mesh)


WRAPPERS = {
    "DDP": ddp(),
    "DDP, unused parameters": ddp(find_unused_parameters=True),
    "DDP, static graph": ddp(static_graph=True),
    "FSDP2": fsdp,
}


def as_rank(rank, port, folder):
    os.environ.update(
        RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2)
    batch = make_batch()
    mine = torch.arange(len(batch)).chunk(2)[rank]
    results = {}
    for wrapper, wrap in WRAPPERS.items():
        for layout in LAYOUTS:
            model = make_model("gemma3-window", torch.float32, tie_word_embeddings=False)
            wrapped, logprobs = wrap(model), LogProbs(PolicySettings(batch_layout=layout))
            for _ in range(2):  # the second pass needs the bookkeeping of the first to be in order
                model.zero_grad()
                logprobs.loss(
                    wrapped,
                    batch.rows(mine),
                    weighted_rows(batch.rows(mine), mine),
                ).backward()
            grads = {name: p.grad for name, p in model.named_parameters()}
            results[wrapper, layout] = {
                name: 2 * (grad.full_tensor() if hasattr(grad, "full_tensor") else grad)
                for name, grad in grads.items()
            }
    if rank == 0:
        torch.save(results, os.path.join(folder, "results"))
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("ranks"))
    mp.spawn(as_rank, (free_port(), folder), nprocs=2)
    return torch.load(os.path.join(folder, "results"))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_two_ranks_sum_their_gradients_to_that_of_all_rows(two_ranks, wrapper, layout):
    batch = make_batch()
    model = make_model("gemma3-window", torch.float32, tie_word_embeddings=False)
    logps, entropy = naive_scores(model, batch)
    expected = gradients(weighted(logps, entropy, torch.arange(len(batch))), model)
    assert_same_gradients(two_ranks[wrapper, layout], expected, rtol=1e-4, atol=1e-4)
