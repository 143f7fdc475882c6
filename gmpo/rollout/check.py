"""Combinations of rollout options that can't act together."""

from dataclasses import fields
from typing import Any

from gmpo.rollout.settings import RolloutSettings
from gmpo.rollout.vllm.sampling import NAMES, check_extra

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


# Options of which vLLM reports what they leave, if there is a top_k among them.
CUTS = ("top_p", "top_k", "min_p")
REPORTED = (*CUTS, "repetition_penalty")


def needs_token_sets(settings: RolloutSettings) -> bool:
    """Return whether vLLM must report which tokens it drew from."""
    extra: dict[str, Any] = settings.generation_kwargs or {}  # pyright: ignore
    if not settings.use_vllm or settings.logps_support == "full":
        return False
    return any(extra.get(name, getattr(settings, name)) not in SHAPING[name] for name in CUTS)


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
    if settings.use_vllm:
        reason = "vLLM does not report which tokens it drew from"
        refused = [name for name in shaping if name not in REPORTED]
        if not refused and needs_token_sets(settings) and "top_k" not in shaping:
            refused = shaping
            reason += " without a top_k"
            remedy = f"Set top_k, to a large number perhaps. Or: {remedy}"
    else:
        reason = "it changes the logits of the tokens that can be drawn"
        refused = [name for name in shaping if name in BENDING]
    if refused:
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


def check_names(settings: RolloutSettings) -> None:
    """Raise a ValueError for an option of generation_kwargs that vLLM does not have."""
    extra: dict[str, Any] = settings.generation_kwargs or {}  # pyright: ignore
    named = {NAMES.get(name, name): value for name, value in extra.items() if name != "do_sample"}
    check_extra(named, settings.vllm_structured_outputs_regex)


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
    if settings.use_vllm:
        check_names(settings)
    if settings.vllm_server_addresses is not None and settings.vllm_server_base_url is not None:
        raise ValueError(
            f"vllm_server_addresses={settings.vllm_server_addresses!r} and vllm_server_base_url="
            f"{settings.vllm_server_base_url!r} are both set. Keep one of them."
        )
