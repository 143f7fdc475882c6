"""Requests, and tiny models of several families with logits that sampling can tell apart."""

from collections.abc import Callable

import torch
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from gmpo.rollout.engine import Completion, Request
from gmpo.rollout.local.hf_generate import GenerateEngine
from gmpo.rollout.local.shared_prefix import SharedPrefixEngine
from gmpo.types import Prompt

VOCABULARY = 32
EOS = 2
WINDOW = 5
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": EOS,
}
SLIDING = {
    "sliding_window": WINDOW,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
}
MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES)),
    "gemma3": lambda: Gemma3ForCausalLM(
        Gemma3TextConfig(**SIZES, **SLIDING, query_pre_attn_scalar=8)
    ),
    "gemma2": lambda: Gemma2ForCausalLM(Gemma2Config(**SIZES, **SLIDING, query_pre_attn_scalar=8)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**SIZES, sliding_window=WINDOW)),
    "mixtral": lambda: MixtralForCausalLM(MixtralConfig(**SIZES, num_local_experts=4)),
    "qwen2_moe": lambda: Qwen2MoeForCausalLM(
        Qwen2MoeConfig(
            **SIZES,
            **SLIDING,
            use_sliding_window=True,
            num_experts=4,
            num_experts_per_tok=2,
            moe_intermediate_size=16,
        )
    ),
    "qwen3_moe": lambda: Qwen3MoeForCausalLM(
        Qwen3MoeConfig(**SIZES, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16)
    ),
}


def tiny(name: str = "llama", *, seed: int = 0) -> PreTrainedModel:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = MODELS[name]()
        for parameter in model.parameters():
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=0.25)
    return model.eval()


def prompts(*lengths: int, seed: int = 0) -> list[Prompt]:
    generator = torch.Generator().manual_seed(seed)
    return [
        Prompt(torch.randint(3, VOCABULARY, (length,), generator=generator).tolist(), "")
        for length in lengths
    ]


def requests(*lengths: int, count: int = 3) -> list[Request]:
    return [Request(prompt, count, seed) for seed, prompt in enumerate(prompts(*lengths))]


def shared(model, tokenizer=None, **options) -> SharedPrefixEngine:
    return SharedPrefixEngine(lambda: model, tokenizer, **{"eos": (EOS,), **options})


def generate(model, tokenizer=None, **options) -> GenerateEngine:
    return GenerateEngine(lambda: model, tokenizer, **{"eos": (EOS,), "pad": 0, **options})


ENGINES = {"shared_prefix": shared, "generate": generate}


def tokens(groups: list[list[Completion]]) -> list[list[list[int]]]:
    return [[completion.ids for completion in group] for group in groups]


def only(*allowed: int) -> dict[str, list[int]]:
    """Options that leave no other token than these."""
    return {"suppress_tokens": [token for token in range(VOCABULARY) if token not in allowed]}


def full_logps(
    model, prompt: list[int], ids: list[int], *, temperature: float = 1.0
) -> torch.Tensor:
    """Log-probs of completion tokens by one plain forward pass over everything."""
    with torch.no_grad():
        logits = (
            model(input_ids=torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1].float()
        )
    return (logits / temperature).log_softmax(-1).gather(-1, torch.tensor(ids)[:, None])[:, 0]
