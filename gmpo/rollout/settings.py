"""Options of the rollout stage: sampling, engines, chat templates."""

from dataclasses import dataclass, fields
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
        "What log-probs, ratios and entropies are of: 'sampled' is the distribution that tokens are drawn from, cut by "
        "top_p, top_k, min_p and other options that mask tokens, with the repetition penalty, so that the ratio of an "
        "unmoved policy is 1; 'full' is the temperature-scaled distribution over the whole vocabulary.",
        choices=("sampled", "full"),
    )
    generation_kwargs: dict[str, Any] | str | None = option(
        None,
        "Further sampling options of the engine (GenerationConfig, SamplingParams); they win over the fields above.",
    )
    chat_template_kwargs: dict[str, Any] | str | None = option(
        None, "Keywords for every chat template call."
    )
    generation_engine: str = option(
        "auto",
        "For generation in this process without vLLM: 'shared_prefix' prefills each prompt once for its group and lets "
        "finished completions leave the batch; 'generate' is transformers' own loop. 'auto' takes the first where the "
        "model and the sampling options allow it.",
        choices=("auto", "shared_prefix", "generate"),
    )
    cache_implementation: str | None = option(None, "Cache class of transformers' generate.")
    use_transformers_continuous_batching: bool = option(
        False,
        "Generate with transformers' continuous batching: a paged cache that requests join and leave. Random numbers "
        "then depend on which completions are made together.",
    )
    transformers_continuous_batching_config: dict[str, Any] | str | None = option(
        None,
        "Keywords of transformers' ContinuousBatchingConfig; without max_memory_percent a GPU gives half.",
    )
    use_transformers_paged: bool = option(
        False, "Old name of use_transformers_continuous_batching."
    )
    ds3_gather_for_generation: bool = option(
        True,
        "ZeRO-3: gather the parameters for generation (fast); False generates from shards (less memory, slow).",
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
        "Addresses of several vLLM servers, which share the prompts; they win over vllm_server_base_url.",
    )
    vllm_server_host: str = option(
        "0.0.0.0", "Host of the vLLM server; 0.0.0.0 stands for this machine."
    )
    vllm_server_port: int = option(8000, "Port of the vLLM server.", low=1, high=65535)
    vllm_server_timeout: float = option(
        240.0,
        "Seconds that any request to the server may take, and that it may take to appear.",
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
        "How weights reach a server: 'nccl', or 'file', in vllm_weight_folder. 'auto': NCCL if both sides have GPUs.",
        choices=("auto", "nccl", "file"),
    )
    vllm_weight_folder: str | None = option(
        None,
        "Folder that trainer and server both see, for weights in files; None: shared memory of one machine.",
    )
    vllm_publication_tolerance: float | None = option(
        None,
        "Mean distance, in nats, of vLLM's log-probs of a fixed text from the trainer's that is accepted after the "
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
        "Further keywords of vLLM's LLM for a colocated engine, such as enforce_eager or enable_lora.",
    )


# Options of generation_kwargs that change logits of tokens which can still be drawn, in a way the trainer can't redo.
BENDING = ("sequence_bias", "exponential_decay_length_penalty")
# Options that cut or bend the distribution, by the values at which they don't.
SHAPING = {
    "top_p": (1.0, None),
    "top_k": (0, -1, None),
    "min_p": (0.0, None),
    "repetition_penalty": (1.0, None),
    "typical_p": (1.0, None),
    "presence_penalty": (0.0, None),
    "frequency_penalty": (0.0, None),
    **dict.fromkeys(
        (
            *(
                "top_h",
                "epsilon_cutoff",
                "eta_cutoff",
                "no_repeat_ngram_size",
                "min_new_tokens",
                "min_tokens",
            ),
            *(
                "min_length",
                "bad_words_ids",
                "bad_words",
                "suppress_tokens",
                "begin_suppress_tokens",
                "logit_bias",
            ),
            *(
                "forced_bos_token_id",
                "forced_eos_token_id",
                "allowed_token_ids",
                "structured_outputs",
                *BENDING,
            ),
        ),
        (0, None),
    ),
}


def check_support(settings: RolloutSettings) -> None:
    """Raise a ValueError for sampling whose very distribution, with logps_support="sampled", can't be scored."""
    extra: dict[str, Any] = settings.generation_kwargs or {}  # pyright: ignore
    if settings.logps_support == "full":
        return
    remedy = "Set logps_support='full' to score under the whole temperature-scaled distribution, or leave the option out."
    if extra.get("do_sample") is False or extra.get("temperature", 1.0) == 0:
        raise ValueError(
            f"generation_kwargs={extra!r} takes the most probable token, whose log-prob is always 0. {remedy}"
        )
    given = {name: getattr(settings, name) for name in SHAPING if hasattr(settings, name)} | extra
    shaping = [
        name for name, plain in SHAPING.items() if name in given and given[name] not in plain
    ]
    if settings.use_vllm and settings.vllm_structured_outputs_regex is not None:
        given["vllm_structured_outputs_regex"] = settings.vllm_structured_outputs_regex
        shaping.append("vllm_structured_outputs_regex")
    refused = shaping if settings.use_vllm else [name for name in shaping if name in BENDING]
    if refused:
        reason = (
            "vLLM does not report which tokens it drew from"
            if settings.use_vllm
            else "it changes the logits of the tokens that can be drawn"
        )
        listed = ", ".join(f"{name}={given[name]!r}" for name in refused)
        raise ValueError(
            f"{listed} can't be scored with logps_support='sampled': {reason}. {remedy}"
        )


COLOCATED_ONLY = (
    "vllm_model_impl",
    "vllm_enable_sleep_mode",
    "vllm_gpu_memory_utilization",
    "vllm_max_model_length",
    "vllm_tensor_parallel_size",
    "vllm_engine_kwargs",
)
SERVER_ONLY = (
    "vllm_server_base_url",
    "vllm_server_addresses",
    "vllm_server_host",
    "vllm_server_port",
    "vllm_server_timeout",
    "vllm_server_reconnect",
    "vllm_group_port",
    "vllm_weight_transfer",
    "vllm_weight_folder",
)
BOTH_MODES = ("vllm_mode", "vllm_structured_outputs_regex", "vllm_publication_tolerance")
WITHOUT_VLLM = (
    "generation_engine",
    "cache_implementation",
    "ds3_gather_for_generation",
    "use_transformers_continuous_batching",
)


def check_vllm_options(settings: RolloutSettings) -> None:
    """Raise a ValueError for an option that the chosen engine would not use."""
    if not settings.use_vllm:
        useless, remedy = (*BOTH_MODES, *COLOCATED_ONLY, *SERVER_ONLY), "Set use_vllm=True"
    elif settings.vllm_mode == "colocate":
        useless, remedy = (
            (*SERVER_ONLY, *WITHOUT_VLLM),
            "It is not for use_vllm=True with vllm_mode='colocate': change those",
        )
    else:
        useless, remedy = (
            (*COLOCATED_ONLY, *WITHOUT_VLLM),
            "Give it to the server (gmpo serve MODEL ...)",
        )
    defaults = {field.name: field.default for field in fields(RolloutSettings)}
    for name in useless:
        value = getattr(settings, name)
        if value != defaults[name]:
            raise ValueError(
                f"{name}={value!r} would do nothing. {remedy}, or leave it at {defaults[name]!r}."
            )
    if settings.vllm_server_addresses is not None and settings.vllm_server_base_url is not None:
        raise ValueError(
            f"vllm_server_addresses={settings.vllm_server_addresses!r} and vllm_server_base_url="
            f"{settings.vllm_server_base_url!r} are both set. Keep one of them."
        )
