"""Names by which vLLM finds gmpo's part in its processes, and its block size on CPUs."""

BACKEND = "gmpo"  # of weight transfer
WORKER = "gmpo.rollout.vllm.inside.worker"
EXTENSION = f"{WORKER}.WorkerExtension"
GUARD = "gmpo.rollout.vllm.inside.guard.Guard"

# Tokens.  A group reads its prompt once as far as it fills blocks, and vLLM's own on CPUs hold 128.
CPU_BLOCK = 32
