"""Settings to engine."""

from collections.abc import Callable
from functools import partial
from typing import Any

from gmpo.rollout.engine import Engine
from gmpo.rollout.generation_mode import Autocast
from gmpo.rollout.local.checked import CheckedEngine
from gmpo.rollout.local.hf_continuous import ContinuousEngine, generation_config
from gmpo.rollout.local.hf_generate import GenerateEngine
from gmpo.rollout.local.sampler import sampling_config
from gmpo.rollout.local.shared_prefix import SharedPrefixEngine
from gmpo.rollout.prompts.encoder import PromptEncoder
from gmpo.rollout.sampling import sampling_from
from gmpo.rollout.settings import RolloutSettings

Policy = Callable[[], Any]


def build_engine(
    settings: RolloutSettings,
    policy: Policy,
    encoder: PromptEncoder,
    *,
    autocast: Autocast | None = None,
    seed: int = 0,
    trust_remote_code: bool = False,
    float32_head: bool = False,
) -> Engine:
    """The engine that the settings name.

    Args:
        policy: Gives the trainer's model without DDP or other wrappers, as it is now; a PEFT model is fine.
        encoder: For the tokenizer, and the tokens that end and pad.
        autocast: Makes the context of mixed precision, if the trainer computes in it.
        seed: The run's, for an engine that draws random numbers besides those of its requests.
        trust_remote_code: Let an engine with its own model class run the model's code.
        float32_head: The trainer computes logits in float32.

    Raises:
        ValueError: An option of generation_kwargs that can't act, or generation_engine='shared_prefix' with one that
            needs the other engine.
    """
    if settings.use_vllm:
        from gmpo.rollout.vllm.colocated import ColocatedEngine
        from gmpo.rollout.vllm.llm import RunOptions
        from gmpo.rollout.vllm.server import ServerEngine

        vllm_engine = {
            "colocate": partial(
                ColocatedEngine, run_options=RunOptions(seed, trust_remote_code, float32_head)
            ),
            "server": ServerEngine,
        }[settings.vllm_mode]
        return vllm_engine(settings, policy, encoder.tokenizer, eos=encoder.eos, autocast=autocast)
    sampling_config(sampling_from(settings), encoder.eos)
    return BUILDERS[generation_engine(settings)](settings, policy, encoder, autocast)


def generation_engine(settings: RolloutSettings) -> str:
    if settings.use_transformers_continuous_batching:
        check_alone(settings)
        return "continuous"
    if settings.cache_implementation is None:
        return settings.generation_engine
    if settings.generation_engine == "shared_prefix":
        raise ValueError(
            f"cache_implementation={settings.cache_implementation!r} is an option of transformers' generate, which "
            "generation_engine='shared_prefix' does not use. Set generation_engine to 'generate', or leave out "
            "cache_implementation."
        )
    return "generate"


def check_alone(settings: RolloutSettings) -> None:
    """Raise a ValueError for options of the other engines beside continuous batching."""
    for name, default in (("generation_engine", "auto"), ("cache_implementation", None)):
        if getattr(settings, name) != default:
            raise ValueError(
                f"{name}={getattr(settings, name)!r} does nothing with use_transformers_continuous_batching, which is "
                f"an engine with a cache of its own. Leave one of them out."
            )


def continuous(
    settings: RolloutSettings, policy: Policy, encoder: PromptEncoder, autocast: Autocast | None
) -> ContinuousEngine:
    generation_config(sampling_from(settings), encoder.eos, encoder.pad)
    return ContinuousEngine(
        policy,
        eos=encoder.eos,
        pad=encoder.pad,
        options=settings.transformers_continuous_batching_config,  # pyright: ignore[reportArgumentType]
        autocast=autocast,
        gather=settings.ds3_gather_for_generation,
    )


def generate(
    settings: RolloutSettings, policy: Policy, encoder: PromptEncoder, autocast: Autocast | None
) -> GenerateEngine:
    return GenerateEngine(
        policy,
        encoder.tokenizer,
        eos=encoder.eos,
        pad=encoder.pad,
        autocast=autocast,
        cache_implementation=settings.cache_implementation,
        gather=settings.ds3_gather_for_generation,
    )


def shared_prefix(
    settings: RolloutSettings, policy: Policy, encoder: PromptEncoder, autocast: Autocast | None
) -> SharedPrefixEngine:
    return SharedPrefixEngine(
        policy,
        encoder.tokenizer,
        eos=encoder.eos,
        autocast=autocast,
        gather=settings.ds3_gather_for_generation,
    )


BUILDERS: dict[str, Callable[..., Engine]] = {
    "auto": lambda *given: CheckedEngine(shared_prefix(*given), otherwise=generate(*given)),
    "shared_prefix": lambda *given: CheckedEngine(shared_prefix(*given), otherwise=None),
    "generate": generate,
    "continuous": continuous,
}
