"""What a model's configuration says: its context, and the tokens that end and pad."""

from typing import Any

from transformers import AutoConfig, GenerationConfig


def configs(model: Any, settings: Any) -> tuple[Any, Any]:
    """Config and generation config (None: there is none) of a model given as an object, or by name or path."""
    if not isinstance(model, str):
        return model.config, getattr(model, "generation_config", None)
    wanted = getattr(settings, "model_init_kwargs", None) or {}
    where = {
        name: wanted[name]
        for name in ("revision", "cache_dir", "token", "subfolder")
        if name in wanted
    }
    trust = getattr(settings, "trust_remote_code", False) or wanted.get("trust_remote_code", False)
    config = AutoConfig.from_pretrained(model, trust_remote_code=trust, **where)
    try:
        return config, GenerationConfig.from_pretrained(model, **where)
    except OSError:
        return config, None


def context_length(config: Any) -> int | None:
    """Tokens that a model can hold, from its config; None: it says nothing."""
    length = getattr(config.get_text_config(), "max_position_embeddings", None)
    return length if isinstance(length, int) and length > 0 else None


def ending_tokens(tokenizer: Any, generation_config: Any = None) -> tuple[int, ...]:
    """Every token that ends a completion: the tokenizer's, then those of the model's generation config.

    Raises:
        ValueError: There is none.
    """
    of_model = getattr(generation_config, "eos_token_id", None)
    of_model = of_model if isinstance(of_model, list | tuple) else [of_model]
    tokens = [token for token in (tokenizer.eos_token_id, *of_model) if token is not None]
    if not tokens:
        raise ValueError(
            "Neither the tokenizer nor the model's generation config has an end-of-sequence token, so no completion "
            "could end. Set tokenizer.eos_token."
        )
    return tuple(dict.fromkeys(int(token) for token in tokens))


def padding_token(tokenizer: Any) -> int:
    """The token that fills rectangles: pad, else eos.

    Raises:
        ValueError: The tokenizer has neither.
    """
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    raise ValueError(
        "The tokenizer has neither a pad token nor an eos token. Set tokenizer.pad_token."
    )
