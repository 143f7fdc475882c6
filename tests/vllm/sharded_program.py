"""What two ranks that train with vLLM do; started by test_shards.py."""

import os
from functools import partial

import torch
import torch._dynamo
from peft import LoraConfig

from gmpo.rollout.vllm.server import ServerEngine
from tests.distributed.runs import result_of, trainer
from tests.vllm.small import CPU, SEQUENCES, small_model

SERVED = "a server"
RUNS = {
    "an engine each": {},
    "one engine for both": {"vllm_tensor_parallel_size": 2},
    "merged adapter": {
        "peft_config": LoraConfig(r=8, target_modules="all-linear", init_lora_weights=False)
    },
}


def train_and_score(folder, options):
    """Return, by run, the weights after training, and the engine's log-probs of fixed sequences."""
    torch._dynamo.config.disable = True
    colocated = {"vllm_max_model_length": 64, "vllm_engine_kwargs": CPU}
    results = {name: trained(folder, **colocated, **case, **options) for name, case in RUNS.items()}
    server = {
        "vllm_mode": "server",
        "vllm_server_base_url": os.environ["SERVER"],
        "vllm_server_timeout": 240.0,
    }
    return {**results, SERVED: trained(folder, **server, **options)}


def trained(folder, **options):
    run = trainer(folder, 4, model=small_model(), use_vllm=True, **options)
    run.train()
    engine = run.stages.engine
    engine.publish(run.stages.policy_version.current)
    if isinstance(engine, ServerEngine):
        scorers = [partial(engine._score, client) for client in engine.fleet.clients]
    else:
        scorers = [engine._score]
    result = {**result_of(run), "logps": [[score(ids) for ids in SEQUENCES] for score in scorers]}
    engine.close()
    return result
