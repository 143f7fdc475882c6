"""The fast engine of this process: every prompt is read once for its group."""

from collections.abc import Callable, Sequence
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from gmpo.rollout.engine import Completion, FixedWork, Request, Sampling, Work
from gmpo.rollout.generation_mode import Autocast, generating
from gmpo.rollout.local.cache import SharedPrefixCache, attention_over
from gmpo.rollout.local.decoder import Decoder, Limits, packed_logits
from gmpo.rollout.local.generation_options import sampling_config, stop_criteria
from gmpo.rollout.local.memory import cache_bytes
from gmpo.rollout.local.sampler import Sampler
from gmpo.rollout.sampling import LOOP_OPTIONS
from gmpo.sharding import sharded
from gmpo.unwrap import uses_prompt_learning, without_adapter

LAYER_KINDS = {"full_attention", "sliding_attention"}  # that the cache can serve


class SharedPrefixEngine:
    """Makes completions with gmpo's own decoding loop around the trainer's module.

    Args:
        policy: Gives the trainer's model as it is now, without wrappers but PEFT's.
        tokenizer: For stop strings.
        eos: Tokens that end a completion.
        autocast: Makes the context of mixed precision.
        gather: Make sharded parameters whole while generating.
        rows: Completions that are written at a time, at most.
        cache_bytes: Memory for keys and values, about; None for half of a GPU's free memory, or
            4 GiB on a CPU.
        prefill_tokens: Prompt tokens of one forward pass, about.
    """

    name = "the shared-prefix engine"
    overlaps = False  # it is the trainer's own module that writes

    def __init__(
        self,
        policy: Callable[[], PreTrainedModel],
        tokenizer: PreTrainedTokenizerBase,
        *,
        eos: Sequence[int],
        autocast: Autocast | None = None,
        gather: bool = True,
        rows: int = 256,
        cache_bytes: int | None = None,
        prefill_tokens: int = 8192,
    ) -> None:
        self.policy = policy
        self.tokenizer = tokenizer
        self.eos = tuple(eos)
        self.autocast = autocast
        self.gather = gather
        self.rows = rows
        self.cache_bytes = cache_bytes
        self.prefill_tokens = prefill_tokens
        self._bytes_per_token: int | None = None

    def unsupported_reason(self, sampling: Sampling) -> str | None:
        """Return why the model or the options can't be served; None if they can, as far as seen."""
        return unsupported_reason(self.policy(), sampling, gather=self.gather)

    def publish(self, version: int) -> None:
        """Do nothing: the module is the trainer's own."""

    def close(self) -> None:
        """Do nothing."""

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[list[Completion]]:
        """Write completions.

        Every rank must call where the policy is sharded, even with nothing to do.
        """
        work = FixedWork(sorted(requests, key=lambda request: -len(request.context)))
        self.serve(work, sampling)
        return [work.completions(request) for request in requests]

    def serve(self, work: Work, sampling: Sampling) -> None:
        """Serve until there is no more work: rows join as they come, and leave as they finish.

        Every rank must call where the policy is sharded, even with nothing to do.
        """
        policy = self.policy()
        model = without_adapter(policy)
        config = sampling_config(sampling, self.eos)

        with generating(policy, autocast=self.autocast, gather=self.gather):
            limits = Limits(self.rows, self._cache_tokens(model), self.prefill_tokens)
            sampler = Sampler(
                model, config, device=model.device, logps_support=sampling.logps_support
            )
            ends = stop_criteria(config, self.tokenizer)
            Decoder(model, sampler, ends, limits).serve(work)

    def _cache_tokens(self, model: PreTrainedModel) -> int:
        """Return how many tokens' keys and values there is room for."""
        if self._bytes_per_token is None:
            self._bytes_per_token = bytes_per_token(model)
        room = cache_bytes(model.device) if self.cache_bytes is None else self.cache_bytes
        return room // self._bytes_per_token


def bytes_per_token(model: PreTrainedModel) -> int:
    """Return the size of one token's keys and values in all layers, as the cache stores them.

    One token is read to see them: configs say it in many ways, some have a value per layer, and
    what is stored depends on how a model computes attention.
    """
    cache = SharedPrefixCache(model.config.get_text_config().num_hidden_layers, model.device)
    with attention_over(model, cache), cache.reading([1]):
        packed_logits(model, cache, [0], [0], keep=1)

    stores = [store for store in cache.prompts if store is not None]
    return sum(store.keys[:1, :, :1].nbytes + store.values[:1, :, :1].nbytes for store in stores)


def supports_logits_to_keep(model: Any) -> bool:
    """Return whether a model can compute the logits of some tokens only."""
    return model._supports_logits_to_keep()


def unsupported_reason(
    model: PreTrainedModel, sampling: Sampling, *, gather: bool = True
) -> str | None:
    """Return why the engine can't serve a model or options; None if it can, as far as seen."""
    if uses_prompt_learning(model):
        return "the adapter learns virtual prompt tokens"

    model = without_adapter(model)
    config = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ()) - LAYER_KINDS
    loop_options = [name for name in LOOP_OPTIONS if sampling.extra.get(name) is not None]
    devices = set(getattr(model, "hf_device_map", {}).values())

    reasons = {
        "it is an encoder-decoder": model.config.is_encoder_decoder,
        "its attention does not go through transformers' attention interface": (
            not model._supports_attention_backend
        ),
        f"it has layers of {', '.join(sorted(kinds))}": kinds,
        "it keeps a state besides keys and values": getattr(model, "_is_stateful", False),
        "its layers share keys and values": getattr(config, "num_kv_shared_layers", 0),
        "it computes logits of all tokens only": not supports_logits_to_keep(model),
        "it lies on several devices": len(devices) > 1,
        "its parameters stay sharded": not gather and sharded(model),
        f"generation_kwargs asks for {', '.join(loop_options)}": loop_options,
    }
    return next((reason for reason, holds in reasons.items() if holds), None)
