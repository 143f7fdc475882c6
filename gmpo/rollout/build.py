"""The table of engines, and what each is built from."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from transformers import PreTrainedModel

from gmpo.rollout.check import engine_name
from gmpo.rollout.engine import Engine
from gmpo.rollout.exactness import CheckedEngine, LocalEngine
from gmpo.rollout.generation_mode import Autocast
from gmpo.rollout.local.hf_continuous import ContinuousEngine
from gmpo.rollout.local.hf_generate import GenerateEngine
from gmpo.rollout.local.shared_prefix import SharedPrefixEngine
from gmpo.rollout.prompts.encoder import PromptEncoder
from gmpo.rollout.settings import RolloutSettings


@dataclass(frozen=True, slots=True)
class Parts:
    """The parts that an engine is built from."""

    settings: RolloutSettings
    policy: Callable[[], PreTrainedModel]
    encoder: PromptEncoder
    autocast: Autocast | None
    seed: int
    trust_remote_code: bool
    float32_head: bool


def build_engine(
    settings: RolloutSettings,
    policy: Callable[[], PreTrainedModel],
    encoder: PromptEncoder,
    *,
    autocast: Autocast | None = None,
    seed: int = 0,
    trust_remote_code: bool = False,
    float32_head: bool = False,
) -> Engine:
    """Return the engine that the settings name.

    Args:
        settings: Without combinations that `check.check_rollout` refuses.
        policy: Gives the trainer's model without DDP or other wrappers, as it is now; a PEFT model
            is fine.
        encoder: For the tokenizer, and the tokens that end and pad.
        autocast: Makes the context of mixed precision, if the trainer computes in it.
        seed: The run's, for an engine that draws random numbers besides those of its requests.
        trust_remote_code: Let an engine with its own model class run the model's code.
        float32_head: The trainer computes logits in float32.
    """
    parts = Parts(settings, policy, encoder, autocast, seed, trust_remote_code, float32_head)
    return ENGINES[engine_name(settings)](parts)


def automatic(parts: Parts) -> CheckedEngine:
    """Return the fastest engine that serves the model."""
    return checked(parts, [shared_prefix(parts), generate(parts), generate_by_length(parts)])


def shared_prefix_only(parts: Parts) -> CheckedEngine:
    """Return the shared-prefix engine, or an error where it does not do."""
    remedy = "Set generation_engine to 'generate' or 'auto'."
    return checked(parts, [shared_prefix(parts)], remedy=remedy)


def generate_only(parts: Parts) -> CheckedEngine:
    """Return transformers' generate."""
    return checked(parts, [generate(parts), generate_by_length(parts)])


def continuous_only(parts: Parts) -> CheckedEngine:
    """Return transformers' continuous batching, or an error where it does not do."""
    remedy = "Leave use_transformers_continuous_batching off."
    return checked(parts, [continuous(parts)], remedy=remedy)


def checked(
    parts: Parts, engines: list[LocalEngine], *, remedy: str | None = None
) -> CheckedEngine:
    """Return the first of some engines that computes what the policy computes."""
    return CheckedEngine(
        engines,
        parts.policy,
        eos=parts.encoder.eos,
        autocast=parts.autocast,
        gather=parts.settings.ds3_gather_for_generation,
        remedy=remedy,
    )


def shared_prefix(parts: Parts) -> SharedPrefixEngine:
    return SharedPrefixEngine(
        parts.policy,
        parts.encoder.tokenizer,
        eos=parts.encoder.eos,
        autocast=parts.autocast,
        gather=parts.settings.ds3_gather_for_generation,
    )


def generate(parts: Parts, *, by_length: bool = False) -> GenerateEngine:
    return GenerateEngine(
        parts.policy,
        parts.encoder.tokenizer,
        eos=parts.encoder.eos,
        pad=parts.encoder.pad,
        autocast=parts.autocast,
        cache_implementation=parts.settings.cache_implementation,
        gather=parts.settings.ds3_gather_for_generation,
        by_length=by_length,
    )


generate_by_length = partial(generate, by_length=True)


def continuous(parts: Parts) -> ContinuousEngine:
    options: Any = parts.settings.transformers_continuous_batching_config  # JSON has been read
    return ContinuousEngine(
        parts.policy,
        eos=parts.encoder.eos,
        pad=parts.encoder.pad,
        options=options,
        autocast=parts.autocast,
        gather=parts.settings.ds3_gather_for_generation,
    )


def colocated(parts: Parts) -> Engine:
    """Return vLLM in this process."""
    from gmpo.rollout.vllm.colocated import ColocatedEngine
    from gmpo.rollout.vllm.llm import RunOptions

    return ColocatedEngine(
        parts.settings,
        parts.policy,
        parts.encoder.tokenizer,
        eos=parts.encoder.eos,
        autocast=parts.autocast,
        run_options=RunOptions(parts.seed, parts.trust_remote_code, parts.float32_head),
    )


def served(parts: Parts) -> Engine:
    """Return vLLM behind servers."""
    from gmpo.rollout.vllm.server import ServerEngine

    return ServerEngine(
        parts.settings,
        parts.policy,
        parts.encoder.tokenizer,
        eos=parts.encoder.eos,
        autocast=parts.autocast,
    )


ENGINES: dict[str, Callable[[Parts], Engine]] = {
    "auto": automatic,
    "shared_prefix": shared_prefix_only,
    "generate": generate_only,
    "continuous": continuous_only,
    "colocate": colocated,
    "server": served,
}
