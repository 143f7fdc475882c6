"""Options of the rollout stage: sampling, engines, chat templates."""

from dataclasses import dataclass
from typing import Any

from gmpo.option import option


@dataclass
class RolloutSettings:
    max_completion_length: int = option(
        256, "Token budget of a completion, over all its turns.", low=1
    )
    temperature: float = option(
        1.0,
        "Sampling temperature; the trainer's log-probs are of the same scaled distribution.",
        low=0.0,
        high=100.0,
        low_open=True,
    )
    top_p: float = option(
        1.0,
        "Sample from the smallest set of tokens with this probability.",
        low=0.0,
        high=1.0,
        low_open=True,
    )
    top_k: int = option(0, "Sample from this many most probable tokens; 0 means all.", low=0)
    min_p: float | None = option(
        None,
        "Sample from tokens with at least this share of the highest probability.",
        low=0.0,
        high=1.0,
    )
    repetition_penalty: float = option(
        1.0,
        "Divide (positive) or multiply (negative) the logits of tokens seen before.",
        low=0.0,
        low_open=True,
    )
    logps_support: str = option(
        "sampled",
        "What log-probs, ratios and entropies are of: 'sampled' is the distribution that tokens "
        "are drawn from, cut by "
        "top_p, top_k, min_p and other options that mask tokens, with the repetition penalty, so "
        "that the ratio of an "
        "unmoved policy is 1; 'full' is the temperature-scaled distribution over the whole "
        "vocabulary.",
        choices=("sampled", "full"),
    )
    generation_kwargs: dict[str, Any] | str | None = option(
        None,
        "Further sampling options of the engine (GenerationConfig, SamplingParams); they win over "
        "the fields above.",
    )
    chat_template_kwargs: dict[str, Any] | str | None = option(
        None, "Keywords for every chat template call."
    )
    overlong_prompts: str = option(
        "error",
        "Prompts that leave no room for a completion in the model's context: 'error' refuses them "
        "before training, "
        "'drop' leaves them out, 'truncate_left' cuts their beginning.",
        choices=("error", "drop", "truncate_left"),
    )
    generation_engine: str = option(
        "auto",
        "For generation in this process without vLLM: 'shared_prefix' prefills each prompt once "
        "for its group and lets "
        "finished completions leave the batch; 'generate' is transformers' own loop. 'auto' takes "
        "the first where the "
        "model and the sampling options allow it.",
        choices=("auto", "shared_prefix", "generate"),
    )
    cache_implementation: str | None = option(None, "Cache class of transformers' generate.")
    use_transformers_continuous_batching: bool = option(
        False,
        "Generate with transformers' continuous batching: a paged cache that requests join and "
        "leave. Random numbers "
        "then depend on which completions are made together.",
    )
    transformers_continuous_batching_config: dict[str, Any] | str | None = option(
        None,
        "Keywords of transformers' ContinuousBatchingConfig; without max_memory_percent a GPU "
        "gives half.",
    )
    use_transformers_paged: bool = option(
        False, "Old name of use_transformers_continuous_batching."
    )
    ds3_gather_for_generation: bool = option(
        True,
        "ZeRO-3: gather the parameters for generation (fast); False generates from shards (less "
        "memory, slow).",
    )
    max_tool_calling_iterations: int | None = option(
        None, "Tool turns per completion; None: unlimited.", low=1, later=True
    )
    use_vllm: bool = option(
        False, "Generate with vLLM instead of transformers; docs/vllm.md tells how."
    )
    vllm_mode: str = option(
        "colocate",
        "vLLM in the training process or behind a server.",
        choices=("colocate", "server"),
    )
    vllm_model_impl: str = option(
        "vllm",
        "Model implementation inside a colocated vLLM.",
        choices=("vllm", "transformers", "auto"),
    )
    vllm_enable_sleep_mode: bool = option(False, "Free a colocated vLLM's memory while training.")
    vllm_structured_outputs_regex: str | None = option(
        None, "Completions must match this expression; vLLM's log-probs are then not used."
    )
    vllm_server_base_url: str | None = option(
        None, "Address of the vLLM server; wins over host and port."
    )
    vllm_server_addresses: list[str] | None = option(
        None,
        "Addresses of several vLLM servers, which share the prompts; they win over "
        "vllm_server_base_url.",
    )
    vllm_server_host: str = option(
        "0.0.0.0", "Host of the vLLM server; 0.0.0.0 stands for this machine."
    )
    vllm_server_port: int = option(8000, "Port of the vLLM server.", low=1, high=65535)
    vllm_server_timeout: float = option(
        240.0,
        "Seconds without a sign of life after which a server is lost; and that it may take to "
        "appear.",
        low=0.0,
        low_open=True,
    )
    vllm_server_reconnect: float = option(
        0.0,
        "Seconds to wait for a lost server to come back; 0: stop training, with a checkpoint.",
        low=0.0,
    )
    vllm_group_port: int = option(
        51216, "Port of the NCCL weight-update group on the trainer.", low=1, high=65535
    )
    vllm_weight_transfer: str = option(
        "auto",
        "How weights reach a server: 'nccl', or 'file', in vllm_weight_folder. 'auto': NCCL if "
        "both sides have GPUs.",
        choices=("auto", "nccl", "file"),
    )
    vllm_weight_folder: str | None = option(
        None,
        "Folder that trainer and server both see, for weights in files; None: shared memory of one "
        "machine.",
    )
    vllm_publication_tolerance: float | None = option(
        None,
        "Mean distance, in nats, of vLLM's log-probs of a fixed text from the trainer's that is "
        "accepted after the "
        "first publication; None: 0.001 in float32, 0.15 in half precision.",
        low=0.0,
        low_open=True,
    )
    vllm_gpu_memory_utilization: float = option(
        0.3,
        "Share of the device's memory for a colocated engine.",
        low=0.0,
        high=1.0,
        low_open=True,
    )
    vllm_max_model_length: int | None = option(
        None,
        "Longest sequence of a colocated engine, prompt and completion; None: the model's context.",
        low=1,
    )
    vllm_tensor_parallel_size: int = option(1, "Ranks that share one colocated engine.", low=1)
    vllm_engine_kwargs: dict[str, Any] | str | None = option(
        None,
        "Further keywords of vLLM's LLM for a colocated engine, such as enforce_eager or "
        "enable_lora.",
    )
