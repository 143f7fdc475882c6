"""The fast engine of this process: every prompt is read once for its group."""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from gmpo.rollout.engine import Completion, Request, Sampling
from gmpo.rollout.generation_mode import Autocast, generating
from gmpo.rollout.local.cache import SharedPrefixCache, attention_over
from gmpo.rollout.local.decoder import Decoder, Limits, packed_logits
from gmpo.rollout.local.sampler import LOOP_OPTIONS, Sampler, sampling_config, stop_criteria
from gmpo.sharding import sharded
from gmpo.unwrap import uses_prompt_learning, without_adapter

CHECKED = 24  # tokens of the check: the more there are, the less one that is unseen weighs


class SharedPrefixEngine:
    """Makes completions with a decoding loop of our own around the trainer's module.

    Args:
        policy: Gives the trainer's model as it is now, without wrappers but PEFT's.
        tokenizer: For stop strings.
        eos: Tokens that end a completion.
        autocast: Makes the context of mixed precision.
        gather: Make sharded parameters whole while generating.
        rows: Completions that are written at a time, at most.
        cache_bytes: Memory for keys and values, about; None: half of the GPU's free memory, or 4 GiB on a CPU.
        prefill_tokens: Prompt tokens of one forward pass, about.
    """

    def __init__(
        self,
        policy: Callable[[], Any],
        tokenizer: Any,
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

    def deviation(self, prompt: Sequence[int]) -> float:
        """How far the next-token distributions of this engine's forward passes are from the model's own, in nats.

        The expected distance of a token's log-probs, a mean over tokens.  Of some tokens, the prompt over and over, the
        first half is read as a prompt and the second as two completions of it.
        """
        policy = self.policy()
        model = without_adapter(policy)
        tokens = (list(prompt) * CHECKED)[:CHECKED]
        half = CHECKED // 2
        with generating(policy, autocast=self.autocast, gather=self.gather):
            expected = model(
                input_ids=torch.tensor([tokens], device=model.device), use_cache=False
            ).logits
            got = forced(model, tokens[:half], tokens[half:])
        return distance(expected[0, half - 1 :, None], got)

    def publish(self, version: int) -> None:
        """Nothing to do: the module is the trainer's own."""

    def close(self) -> None:
        """Nothing to do."""

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[list[Completion]]:
        """Every rank must call where the policy is sharded, be it with nothing to do."""
        policy = self.policy()
        model = without_adapter(policy)
        config = sampling_config(sampling, self.eos)
        with generating(policy, autocast=self.autocast, gather=self.gather):
            if not requests:
                return []
            limits = Limits(self.rows, self._cache_tokens(model), self.prefill_tokens)
            sampler = Sampler(
                model, config, device=model.device, logps_support=sampling.logps_support
            )
            groups = Decoder(model, sampler, stop_criteria(config, self.tokenizer), limits).write(
                requests
            )
        return [[sequence.completion() for sequence in group] for group in groups]

    def _cache_tokens(self, model: Any) -> int:
        room = self.cache_bytes
        if room is None:
            free = (
                torch.cuda.mem_get_info(model.device)[0]
                if model.device.type == "cuda"
                else 2 * 4 * 2**30
            )
            room = free // 2
        return room // bytes_per_token(model)


def forced(model: Any, prompt: Sequence[int], completion: Sequence[int]) -> torch.Tensor:
    """Logits [1 + tokens, 2, V] of two equal completions, which the prefix cache serves token by token."""
    cache = SharedPrefixCache(model.config.get_text_config().num_hidden_layers, model.device)
    with attention_over(model, cache):
        with cache.reading([len(prompt)]):
            last = torch.tensor([len(prompt) - 1], device=model.device)
            outputs = [
                packed_logits(model, cache, prompt, range(len(prompt)), keep=last).expand(2, -1)
            ]
        cache.enter([0, 0])
        for position, token in enumerate(completion, len(prompt)):
            cache.begin_step()
            outputs.append(packed_logits(model, cache, [token] * 2, [position] * 2))
            cache.end_step()
    return torch.stack(outputs)


def distance(expected: torch.Tensor, got: torch.Tensor) -> float:
    """Mean over tokens of sum_j p_j |log p_j - log q_j|, of logits [..., V] with p, as many or more of them with q."""
    expected, got = expected.float().log_softmax(-1), got.float().log_softmax(-1)
    gap = torch.where(expected.isinf(), 0.0, expected.exp() * (expected - got).abs())
    return float(gap.sum(-1).mean())


def unsupported_reason(model: Any, sampling: Sampling, *, gather: bool = True) -> str | None:
    """Why the shared-prefix engine can't serve this model or these options; None: it can, as far as one can see."""
    if uses_prompt_learning(model):
        return "the adapter learns virtual prompt tokens"
    model = without_adapter(model)
    config = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ()) - {
        "full_attention",
        "sliding_attention",
    }
    loop_options = [name for name in LOOP_OPTIONS if sampling.extra.get(name) is not None]
    reasons = {
        "it is an encoder-decoder": model.config.is_encoder_decoder,
        "its attention does not go through transformers' attention interface": not model._supports_attention_backend,
        f"it has layers of {', '.join(sorted(kinds))}": kinds,
        "it keeps a state besides keys and values": getattr(model, "_is_stateful", False),
        "its layers share keys and values": getattr(config, "num_kv_shared_layers", 0),
        "it computes logits of all tokens only": not model._supports_logits_to_keep(),
        "it lies on several devices": len(set(getattr(model, "hf_device_map", {}).values())) > 1,
        "its parameters stay sharded": not gather and sharded(model),
        f"generation_kwargs asks for {', '.join(loop_options)}": loop_options,
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


def bytes_per_token(model: Any) -> int:
    """Keys and values of one token in all layers."""
    config = model.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 2 * config.num_hidden_layers * heads * size * model.dtype.itemsize
