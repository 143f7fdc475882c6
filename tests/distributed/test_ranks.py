"""Two ranks (gloo, on CPUs) make the update that one rank makes."""

import os
import socket

import pytest
import torch
import torch.multiprocessing as mp
from datasets import Dataset

from gmpo import GMPOConfig, GMPOTrainer, GRPOConfig, GRPOTrainer
from tests.tiny import tiny_model, tiny_tokenizer

PROMPTS = Dataset.from_list([{"prompt": " ".join("abcdefgh"[: 1 + i % 6])} for i in range(8)])


def score(completions, **columns):
    """0 for every completion of some prompts, so that a rank may have nothing to learn from."""
    return [float(text.split().count("a")) for text in completions]


def train(output_dir, rows, **options):
    cls, config_class = (GRPOTrainer, GRPOConfig) if "loss_type" in options else (GMPOTrainer, GMPOConfig)
    config = config_class(
        output_dir,
        per_device_train_batch_size=rows,
        **{
            "num_generations": 4,
            "gradient_accumulation_steps": 2,
            "num_iterations": 2,
            "max_completion_length": 5,
            "max_steps": 4,
            "logging_steps": 2,
            "learning_rate": 0.1,
            "optim": "sgd",
            "max_grad_norm": 0.0,
            "save_strategy": "no",
            "gradient_checkpointing": False,
            "disable_tqdm": True,
            "use_cpu": True,
            **options,
        },
    )
    model = tiny_model(dtype=torch.float64)
    trainer = cls(model, score, config, PROMPTS, processing_class=tiny_tokenizer())
    trainer.train()
    return trainer


def free_port():
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


CASES = {
    "plain": {},
    "reference": {"beta": 0.1},
    "resampling": {"zero_signal_groups": "resample", "gradient_accumulation_steps": 1},
    "chunks": {"max_tokens_per_chunk": 12},
    "entropy selection": {"top_entropy_quantile": 0.5, "gradient_accumulation_steps": 1},
    "a group over both ranks": {"num_generations": 16},
    "token aggregate": {"loss_type": "dapo"},
}


def as_rank(rank, port, folder):
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    torch.set_num_threads(1)
    results = {}
    for name, options in CASES.items():
        trainer = train(folder, 4, ddp_backend="gloo", **options)
        weights = {key: p.detach() for key, p in trainer.unwrapped_policy().named_parameters()}
        results[name] = {"weights": weights, "logs": logs_of(trainer)}
    torch.save(results, os.path.join(folder, f"rank{rank}.pt"))
    torch.distributed.destroy_process_group()


def logs_of(trainer):
    return [entry for entry in trainer.state.log_history if "loss" in entry]


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("ranks"))
    mp.spawn(as_rank, args=(free_port(), folder), nprocs=2)
    return [torch.load(os.path.join(folder, f"rank{rank}.pt")) for rank in (0, 1)]


@pytest.mark.parametrize("case", CASES)
def test_two_ranks_make_the_update_of_one(tmp_path, two_ranks, case):
    alone = train(str(tmp_path), 8, **CASES[case])
    start = dict(tiny_model(dtype=torch.float64).named_parameters())
    for name, value in alone.model.named_parameters():
        assert not torch.equal(value, start[name]), name
        for theirs in two_ranks:
            torch.testing.assert_close(theirs[case]["weights"][name], value.detach(), rtol=1e-7, atol=1e-8)
    for theirs, ours in zip(two_ranks[0][case]["logs"], logs_of(alone), strict=True):
        for name in ("loss", "reward", "reward_std", "entropy", "completions/mean_length", "num_tokens"):
            assert theirs.get(name) == pytest.approx(ours.get(name), rel=1e-5, abs=1e-6), name
