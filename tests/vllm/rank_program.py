"""One of two ranks that share a vLLM engine by tensor parallelism; started by test_ranks.py."""

import torch
import torch._dynamo
from torch import distributed

from gmpo.rollout.engine import Request, Sampling
from gmpo.rollout.settings import RolloutSettings
from gmpo.rollout.vllm.colocated import ColocatedEngine
from gmpo.types import Prompt
from tests.tiny import tiny_tokenizer
from tests.vllm.small import CPU, distances, small_policy, train


def main() -> None:
    torch._dynamo.config.disable = True
    distributed.init_process_group("gloo")
    policy = small_policy()
    settings = RolloutSettings(
        use_vllm=True, vllm_tensor_parallel_size=2, vllm_max_model_length=64, vllm_engine_kwargs=CPU
    )
    engine = ColocatedEngine(settings, lambda: policy, tiny_tokenizer(), eos=(1,))
    prompts = [[5, 6], [7, 8, 9]][: distributed.get_rank() + 1]  # rank 1 has more of them
    for version in range(3):
        engine.publish(version)
        assert distances(engine._score, policy).max() < 1e-4
        requests = [Request(Prompt(ids, "text"), 1, seed=7) for ids in prompts]
        groups = engine.generate(requests, Sampling(5, temperature=0.0))
        assert [group[0].ids for group in groups] == [greedy(policy, ids) for ids in prompts]
        train(policy, steps=1, seed=version)
    distributed.barrier()
    print(f"rank {distributed.get_rank()} is content", flush=True)


@torch.no_grad()
def greedy(policy, ids: list[int]) -> list[int]:
    return policy.generate(torch.tensor([ids]), max_new_tokens=5, do_sample=False)[
        0, len(ids) :
    ].tolist()


if __name__ == "__main__":
    main()
