"""Facts from a model's configuration: its context, and the tokens that end and pad."""

from collections.abc import Mapping
from typing import Any

from transformers import (
    AutoConfig,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from gmpo.model_name import WHERE, base_model_name, without_place
from gmpo.rollout.settings import RolloutSettings

# Kinds of rotary embeddings that reach beyond the length the model was trained with.
STRETCHING = ("yarn", "dynamic", "longrope")


def configs(
    model: str | PreTrainedModel, settings: RolloutSettings
) -> tuple[PretrainedConfig, GenerationConfig | None]:
    """Return config and generation config of a model given as an object, or by name or path."""
    if not isinstance(model, str):
        return model.config, getattr(model, "generation_config", None)

    wanted = getattr(settings, "model_init_kwargs", None) or {}
    where = {name: wanted[name] for name in WHERE if name in wanted}
    trust = getattr(settings, "trust_remote_code", False) or wanted.get("trust_remote_code", False)

    # An adapter has no separate config: its base model's is the one.
    base = base_model_name(model, where)
    if base is not None:
        model, where = base, without_place(where)

    config = AutoConfig.from_pretrained(model, trust_remote_code=trust, **where)
    try:
        return config, GenerationConfig.from_pretrained(model, **where)
    except OSError:  # no such file: the model's own class takes the defaults from its config, too
        return config, GenerationConfig.from_model_config(config)


def context_length(config: PretrainedConfig) -> int | None:
    """Return the tokens that a model can hold, by its config; None if it does not say.

    Example:
        max_position_embeddings 32768 with YaRN of factor 4 on 32768 -> 131072
        max_position_embeddings 131072 with YaRN of factor 32 on 4096 -> 131072
    """
    config = config.get_text_config()
    length = getattr(config, "max_position_embeddings", None)
    if not isinstance(length, int) or length < 1:
        return None

    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    kinds = [rope, *(value for value in rope.values() if isinstance(value, Mapping))]
    return max(length, *(stretched_length(kind, length) for kind in kinds))


def stretched_length(rope: Mapping[str, Any], length: int) -> int:
    """Return how many positions the parameters of rotary embeddings reach, 0 if they don't say."""
    kind = rope.get("rope_type", rope.get("type"))
    factor = rope.get("factor")
    if kind not in STRETCHING or not isinstance(factor, int | float):
        return 0
    return int(factor * (rope.get("original_max_position_embeddings") or length))


def ending_tokens(
    tokenizer: PreTrainedTokenizerBase, generation_config: GenerationConfig | None = None
) -> tuple[int, ...]:
    """Return every token that ends a completion: the tokenizer's, then the model's.

    Raises:
        ValueError: If neither has one.
    """
    of_model: Any = getattr(generation_config, "eos_token_id", None)
    of_model = of_model if isinstance(of_model, list | tuple) else [of_model]
    own: Any = tokenizer.eos_token_id
    tokens = [token for token in (own, *of_model) if token is not None]
    if not tokens:
        raise ValueError(
            "Neither the tokenizer nor the model's generation config has an end-of-sequence token, "
            "so no completion could end. Set tokenizer.eos_token."
        )
    return tuple(dict.fromkeys(int(token) for token in tokens))


def padding_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the token that fills rectangles: pad, else eos.

    Raises:
        ValueError: If the tokenizer has neither.
    """
    tokens: tuple[Any, ...] = (tokenizer.pad_token_id, tokenizer.eos_token_id)
    for token in tokens:
        if token is not None:
            return int(token)
    raise ValueError(
        "The tokenizer has neither a pad token nor an eos token. Set tokenizer.pad_token."
    )
