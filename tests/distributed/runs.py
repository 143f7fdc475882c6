"""The same training by one rank and by two (gloo, on CPUs), whose weights are copies of each other or sharded."""

import importlib.util
import os
import socket

import pytest
import torch
import torch.multiprocessing as mp
from datasets import Dataset

from gmpo.config import GMPOConfig, GRPOConfig
from gmpo.rollout.weights.named import named_weights
from gmpo.trainer import GMPOTrainer, GRPOTrainer
from tests.tiny import tiny_model, tiny_tokenizer

PROMPTS = Dataset.from_list([{"prompt": " ".join("abcdefgh"[: 1 + i % 6])} for i in range(8)])
ZERO_3 = {
    "zero_optimization": {
        "stage": 3,
        "stage3_param_persistence_threshold": 0,
        "stage3_gather_16bit_weights_on_model_save": True,
    },
    "zero_allow_untested_optimizer": True,
    "zero_force_ds_cpu_optimizer": False,
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
}
KINDS = {  # how two ranks hold the weights -> what asks for it
    "copies": {},
    "fsdp2": {
        "fsdp": True,
        "fsdp_config": {"transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]},
    },
    "zero3": {"deepspeed": ZERO_3},
}


def marked(kinds):
    """Kinds of ranks as parameters of tests, which are skipped where what they need is missing."""
    missing = importlib.util.find_spec("deepspeed") is None
    marks = [
        pytest.mark.deepspeed,
        pytest.mark.skipif(missing, reason="needs DeepSpeed: make test-vllm"),
    ]
    return [pytest.param(kind, marks=marks if kind == "zero3" else ()) for kind in kinds]


def score(completions, **columns):
    """0 for every completion of some prompts, so that a rank may have nothing to learn from."""
    return [float(text.split().count("a")) for text in completions]


def trainer(output_dir, rows, *, dtype=torch.float64, model=None, peft_config=None, **options):
    cls, config_class = (
        (GRPOTrainer, GRPOConfig) if "loss_type" in options else (GMPOTrainer, GMPOConfig)
    )
    config = config_class(
        output_dir,
        per_device_train_batch_size=rows,
        per_device_eval_batch_size=rows // 2,  # of 5 prompts, the last is a batch of its own
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
            "report_to": [],
            "use_cpu": True,
            **options,
        },
    )
    torch.manual_seed(0)  # for the first weights of adapters
    model = model or tiny_model(dtype=dtype)
    return cls(
        model,
        score,
        config,
        PROMPTS,
        eval_dataset=PROMPTS.select(range(5)),
        processing_class=tiny_tokenizer(),
        peft_config=peft_config,
        compute_metrics=counted,
    )


def counted(prediction):
    """Rows, and tokens of their prompts."""
    tokens = int((prediction.inputs >= 0).sum()) if prediction.inputs is not None else 0
    return {"rows": len(prediction.predictions), "prompt_tokens": tokens}


def result_of(run):
    """What a run has made: its weights, and the log lines of its steps."""
    weights = {name: tensor.clone() for name, tensor in named_weights(run.unwrapped_policy())}
    return {
        "weights": weights,
        "logs": [entry for entry in run.state.log_history if "loss" in entry],
        "evaluations": [entry for entry in run.state.log_history if "eval_loss" in entry],
    }


def with_two_ranks(kind, program, folder):
    """What program(folder, options) gives, for each rank; `options` ask for ranks of this kind."""
    mp.spawn(as_rank, args=(kind, free_port(), program, str(folder)), nprocs=2)
    return [torch.load(os.path.join(folder, f"rank{rank}.pt")) for rank in (0, 1)]


def as_rank(rank, kind, port, program, folder):
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE="2",
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    os.environ["DS_ACCELERATOR"] = "cpu"
    torch.set_num_threads(1)
    if kind == "fsdp2":
        shard_on_cpus()
    results = program(folder, {"ddp_backend": "gloo", "ddp_timeout": 60, **KINDS[kind]})
    torch.save(results, os.path.join(folder, f"rank{rank}.pt"))
    torch.distributed.destroy_process_group()


def shard_on_cpus():
    """Let accelerate shard on CPUs, where it makes copies instead whatever it is asked for."""
    from accelerate.state import AcceleratorState, PartialState
    from accelerate.utils import DistributedType

    whole = AcceleratorState.__init__

    def sharded(self, *arguments, fsdp_plugin=None, **keywords):
        whole(self, *arguments, fsdp_plugin=fsdp_plugin, **keywords)
        if fsdp_plugin is not None:
            self.fsdp_plugin = fsdp_plugin
            if self._mixed_precision != "no":
                fsdp_plugin.set_mixed_precision(self._mixed_precision)
            self.distributed_type = PartialState._shared_state["distributed_type"] = (
                DistributedType.FSDP
            )

    AcceleratorState.__init__ = sharded


def free_port():
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def assert_same_training(theirs, ours, *, start, rtol=1e-7, atol=1e-8):
    """Both moved from `start` to the same place, and logged the same."""
    assert any(not torch.equal(value, start[name]) for name, value in ours["weights"].items())
    for name, value in ours["weights"].items():
        torch.testing.assert_close(theirs["weights"][name], value, rtol=rtol, atol=atol)
    assert {"loss", "reward", "num_tokens"} <= ours["logs"][0].keys()
    for their_entry, entry in zip(theirs["logs"], ours["logs"], strict=True):
        for name in (
            "loss",
            "reward",
            "reward_std",
            "entropy",
            "completions/mean_length",
            "num_tokens",
        ):
            assert their_entry.get(name) == pytest.approx(entry.get(name), rel=1e-5, abs=1e-6), name
    for their_entry, entry in zip(theirs["evaluations"], ours["evaluations"], strict=True):
        for name in ("eval_loss", "eval_reward", "eval_rows", "eval_prompt_tokens"):
            assert their_entry[name] == pytest.approx(entry[name], rel=1e-5, abs=1e-6), name
