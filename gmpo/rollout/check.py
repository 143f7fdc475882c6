"""Combinations of rollout options that can't act together, found before a weight is loaded."""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from gmpo.option import advice, check_options
from gmpo.rollout.sampling import LOOP_OPTIONS, SAMPLING_OPTIONS, further_options
from gmpo.rollout.settings import RolloutSettings
from gmpo.rollout.vllm.sampling import NAMES, check_extra

# Options of generation_kwargs that change logits of tokens which can still be drawn, in a way the
# trainer can't redo.
BENDING = ("sequence_bias", "exponential_decay_length_penalty")

# Options that cut or bend the distribution, by the values at which they don't.
SHAPING: dict[str, tuple[Any, ...]] = {
    "top_p": (1.0, None),
    "top_k": (0, -1, None),
    "min_p": (0.0, None),
    "repetition_penalty": (1.0, None),
    "typical_p": (1.0, None),
    "presence_penalty": (0.0, None),
    "frequency_penalty": (0.0, None),
    "top_h": (0, None),
    "epsilon_cutoff": (0, None),
    "eta_cutoff": (0, None),
    "no_repeat_ngram_size": (0, None),
    "min_new_tokens": (0, None),
    "min_tokens": (0, None),
    "min_length": (0, None),
    "bad_words_ids": (0, None),
    "bad_words": (0, None),
    "suppress_tokens": (0, None),
    "begin_suppress_tokens": (0, None),
    "logit_bias": (0, None),
    "forced_bos_token_id": (0, None),
    "forced_eos_token_id": (0, None),
    "allowed_token_ids": (0, None),
    "structured_outputs": (0, None),
    "sequence_bias": (0, None),
    "exponential_decay_length_penalty": (0, None),
}

# Options of which vLLM reports what they leave, if there is a top_k among them.
CUTS = ("top_p", "top_k", "min_p")
REPORTED = (*CUTS, "repetition_penalty")

# Of generation_kwargs, what continuous batching can do without cutting the distribution.
CONTINUOUS_SAMPLING = ("max_new_tokens", "temperature", "eos_token_id")
# Fields that cut or bend the distribution, by the value at which they don't.
CONTINUOUS_PLAIN = {"top_p": 1.0, "top_k": 0, "min_p": None, "repetition_penalty": 1.0}
# Options of ContinuousBatchingConfig that the engine sets.
CONTINUOUS_OWN = ("return_logprobs", "seed")

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


def check_rollout(settings: RolloutSettings) -> None:
    """Raise a ValueError for the first option that could not act as it is set."""
    check_vllm_options(settings)
    check_support(settings)
    if settings.use_vllm:
        check_vllm_names(settings)
    else:
        check_local_engine(settings)
        check_generation_kwargs(settings)


# -- engines of this process ---------------------------------------------------------------------


def engine_name(settings: RolloutSettings) -> str:
    """Return the row of the table of engines that the settings mean."""
    if settings.use_vllm:
        return settings.vllm_mode
    if settings.use_transformers_continuous_batching:
        return "continuous"
    if settings.cache_implementation is not None:
        return "generate"
    return settings.generation_engine


def check_local_engine(settings: RolloutSettings) -> None:
    """Raise a ValueError for options of one engine beside another one."""
    if settings.use_transformers_continuous_batching:
        check_continuous(settings)
        return

    if settings.transformers_continuous_batching_config:
        raise ValueError(
            f"transformers_continuous_batching_config="
            f"{settings.transformers_continuous_batching_config!r} would do nothing. Set "
            "use_transformers_continuous_batching=True, or leave it out."
        )
    if settings.generation_engine != "shared_prefix":
        return
    given = {"cache_implementation": settings.cache_implementation, **further_options(settings)}
    for name in LOOP_OPTIONS:
        if given.get(name) is not None:
            raise ValueError(
                f"{name}={given[name]!r} is an option of transformers' generate, which "
                "generation_engine='shared_prefix' does not use. Set generation_engine to "
                f"'generate', or leave out {name}."
            )


def check_continuous(settings: RolloutSettings) -> None:
    """Raise a ValueError for options that continuous batching can't do."""
    for name, default in (("generation_engine", "auto"), ("cache_implementation", None)):
        if getattr(settings, name) != default:
            raise ValueError(
                f"{name}={getattr(settings, name)!r} does nothing with "
                "use_transformers_continuous_batching, which has its own engine and cache. Leave "
                "one of them out."
            )

    extra = further_options(settings)
    given = {name: getattr(settings, name) for name in CONTINUOUS_PLAIN}
    changed = {name: value for name, value in given.items() if value != CONTINUOUS_PLAIN[name]}
    changed |= {name: value for name, value in extra.items() if name not in CONTINUOUS_SAMPLING}
    for name, value in changed.items():
        raise ValueError(
            f"{name}={value!r} can't be combined with use_transformers_continuous_batching, which "
            "does not report which tokens it drew from, so that ratios would be off. Leave it out, "
            "or turn continuous batching off."
        )
    check_batching_config(settings.transformers_continuous_batching_config or {})


def check_batching_config(options: Mapping[str, Any] | str) -> None:
    """Raise a ValueError for what `ContinuousBatchingConfig` does not have, or the engine sets."""
    from transformers import ContinuousBatchingConfig

    known = {field.name for field in fields(ContinuousBatchingConfig)} - {*CONTINUOUS_OWN}
    for name in options:
        if name not in known:
            raise ValueError(
                f"transformers_continuous_batching_config has {name!r}, which can't be set."
                f"{advice(name, known)}"
            )


def check_generation_kwargs(settings: RolloutSettings) -> None:
    """Raise a ValueError for sampling options that no engine of this process has."""
    extra = further_options(settings)
    known = (*SAMPLING_OPTIONS, *LOOP_OPTIONS)
    refused = sorted(set(extra) - {*known})
    if refused:
        raise ValueError(
            f"generation_kwargs has {', '.join(refused)}, which can't act: completions are "
            f"independent samples of the policy.{advice(refused[0], known)} Remove it, or use one "
            f"of {', '.join(known)}."
        )

    # Values have the bounds of the fields that they win over; a temperature of 0 is greedy.
    names = {field.name for field in fields(RolloutSettings)} & extra.keys()
    same = {name: extra[name] for name in names if (name, extra[name]) != ("temperature", 0)}
    try:
        check_options(RolloutSettings(**same))
    except ValueError as error:
        raise ValueError(f"generation_kwargs: {error}") from None

    budget = extra.get("max_new_tokens", 1)
    if not isinstance(budget, int) or budget < 1:
        raise ValueError(f"generation_kwargs: max_new_tokens={budget!r} must be 1 or more.")


# -- log-probs of what is sampled ----------------------------------------------------------------


def check_support(settings: RolloutSettings) -> None:
    """Raise a ValueError for sampling whose own distribution can't be scored.

    With logps_support="full" the whole temperature-scaled distribution is scored instead.
    """
    if settings.logps_support == "full":
        return
    extra = further_options(settings)
    remedy = (
        "Set logps_support='full' to score under the whole temperature-scaled distribution, or "
        "leave the option out."
    )
    if extra.get("do_sample") is False or extra.get("temperature", 1.0) == 0:
        raise ValueError(
            f"generation_kwargs={extra!r} takes the most probable token, whose log-prob is always "
            f"0. {remedy}"
        )

    given = {name: getattr(settings, name) for name in SHAPING if hasattr(settings, name)} | extra
    shaping = [name for name in SHAPING if name in given and given[name] not in SHAPING[name]]
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

    if not refused:
        return
    listed = ", ".join(f"{name}={given[name]!r}" for name in refused)
    raise ValueError(f"{listed} can't be scored with logps_support='sampled': {reason}. {remedy}")


def needs_token_sets(settings: RolloutSettings) -> bool:
    """Return whether vLLM must report which tokens it drew from."""
    if not settings.use_vllm or settings.logps_support == "full":
        return False
    extra = further_options(settings)
    return any(extra.get(name, getattr(settings, name)) not in SHAPING[name] for name in CUTS)


# -- vLLM ----------------------------------------------------------------------------------------


def check_vllm_options(settings: RolloutSettings) -> None:
    """Raise a ValueError for an option that the chosen engine would not use."""
    if not settings.use_vllm:
        useless: tuple[str, ...] = (*BOTH_MODES, *COLOCATED_ONLY, *SERVER_ONLY)
        remedy = "Set use_vllm=True"
    elif settings.vllm_mode == "colocate":
        useless = (*SERVER_ONLY, *WITHOUT_VLLM)
        remedy = "It is not for use_vllm=True with vllm_mode='colocate': change those"
    else:
        useless = (*COLOCATED_ONLY, *WITHOUT_VLLM)
        remedy = "Give it to the server (gmpo serve MODEL ...)"

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


def check_vllm_names(settings: RolloutSettings) -> None:
    """Raise a ValueError for an option of generation_kwargs that vLLM does not have."""
    extra = further_options(settings)
    named = {NAMES.get(name, name): value for name, value in extra.items() if name != "do_sample"}
    check_extra(named, settings.vllm_structured_outputs_regex)
