"""Small models of many kinds, ragged batches, and the scores that their own logits give."""

import contextlib
from collections.abc import Iterator

import pytest
import torch
import transformers
from torch import Tensor, nn

from gmpo.policy.logprobs import scatter
from gmpo.types import Batch

VOCABULARY = 50
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
BOTH = ["sliding_attention", "full_attention"]
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}

# Windows are shorter than the rows.  name -> (family, what differs from SIZES)
MODELS = {
    "llama": ("Llama", {}),
    "llama-tied": ("Llama", {"tie_word_embeddings": True}),
    "llama-bias": ("Llama", {}),
    "qwen3": ("Qwen3", {"head_dim": 8}),
    "nemotron": ("Nemotron", {}),  # hands no keywords on to its attention
    "gpt2": (
        "GPT2",
        {
            "n_embd": 32,
            "n_head": 4,
            "n_layer": 2,
            "resid_pdrop": 0.0,
            "embd_pdrop": 0.0,
            "attn_pdrop": 0.0,
        },
    ),
    "mistral-window": ("Mistral", {"sliding_window": 3}),
    "gemma2-window-softcap": (
        "Gemma2",
        {"head_dim": 8, "sliding_window": 3, "final_logit_softcapping": 2.0},
    ),
    "gemma3-window": ("Gemma3Text", {"head_dim": 8, "sliding_window": 3, "layer_types": BOTH}),
    "cohere-scale": ("Cohere", {"logit_scale": 0.3}),
    "granite-scale": ("Granite", {"logits_scaling": 6.0}),
    "mixtral": ("Mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 3}),
    "qwen3-moe": ("Qwen3Moe", {"head_dim": 8, **EXPERTS}),
    "gpt-oss": (
        "GptOss",
        {
            "head_dim": 8,
            "sliding_window": 3,
            "layer_types": BOTH,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
        },
    ),
}
RECURRENT = {
    "mamba": ("Mamba", {}),
    "lfm2-conv": ("Lfm2", {"layer_types": ["conv", "full_attention"]}),
    "recurrent-gemma": ("RecurrentGemma", {"attention_window_size": 4}),
}


def make_model(name: str, dtype: torch.dtype = torch.float64, **options) -> nn.Module:
    """In training mode, with weights large enough that every token matters to every other."""
    family, differs = (MODELS | RECURRENT)[name]
    config = getattr(transformers, f"{family}Config")(**SIZES | differs | options)
    experts = {"experts_implementation": "eager"} if hasattr(config, "output_router_logits") else {}
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = transformers.AutoModelForCausalLM.from_config(config, **experts).to(dtype)
        if name == "llama-bias":
            model.lm_head = nn.Linear(SIZES["hidden_size"], VOCABULARY, bias=True, dtype=dtype)
        for parameter in model.parameters():
            nn.init.normal_(parameter.data, std=0.3)
    return model.train()


def make_batch(
    *, groups: int = 3, group_size: int = 3, seed: int = 0, longest: int = 8, holes: bool = True
) -> Batch:
    """Ragged rows: one empty completion, one of `longest` tokens, and tokens inside that are not trained on."""
    generator = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int, *size: int) -> Tensor:
        return torch.randint(low, high, size, generator=generator)

    rows = groups * group_size
    prompts = [draw(1, VOCABULARY, int(draw(1, 7))) for _ in range(groups)]
    lengths = draw(1, longest + 1, rows)
    lengths[1], lengths[2] = longest, 0
    filled = torch.arange(longest) < lengths[:, None]
    mask = filled & (torch.rand(rows, longest, generator=generator) > 0.2) if holes else filled
    return Batch(
        prompt_ids=[prompts[row // group_size] for row in range(rows)],
        completion_ids=torch.where(filled, draw(1, VOCABULARY, rows, longest), 0),
        lengths=lengths,
        mask=mask,
        num_completion_tokens=mask.sum(1),
        advantages=torch.randn(rows, generator=generator),
        group=torch.arange(groups).repeat_interleave(group_size),
    )


def naive_scores(model: nn.Module, batch: Batch, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """Log-probs and entropies, [B, T], from the model's logits of one row after the other."""
    logps, entropies = [], []
    for row, prompt in enumerate(batch.prompt_ids):
        written = batch.completion_ids[row, : batch.lengths[row]]
        logits = model(input_ids=torch.cat([prompt, written])[None], use_cache=False).logits[0]
        every = (logits[len(prompt) - 1 :] / temperature).log_softmax(-1)[: len(written)]
        padding = (0, batch.mask.shape[1] - len(written))
        logps.append(nn.functional.pad(every.gather(-1, written[:, None]).squeeze(-1), padding))
        entropies.append(nn.functional.pad(-(every.exp() * every).sum(-1), padding))
    return torch.stack(logps) * batch.mask, torch.stack(entropies) * batch.mask


def weighted(logps: Tensor, entropy: Tensor, rows: Tensor) -> Tensor:
    """A loss of rows that is not linear in their scores, and different for each."""
    strength = (rows + 1.0)[:, None]
    return (strength * (logps.sum(1, keepdim=True) * 0.1).exp()).sum() + (
        strength.cos() * entropy.square()
    ).sum()


def weighted_rows(batch: Batch, numbers: Tensor | None = None):
    """`weighted` as `LogProbs.loss` calls it: for some rows, with values of the trained tokens only.

    Args:
        numbers: [B] what each row of `batch` counts as; None for its own number.
    """

    def loss(rows: Tensor, logps: Tensor, entropy: Tensor) -> Tensor:
        mask = batch.rows(rows).mask
        counted = rows if numbers is None else numbers[rows]
        return weighted(scatter(logps, mask), scatter(entropy, mask), counted)

    return loss


def gradients(loss: Tensor, model: nn.Module) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(
    found: dict[str, Tensor], expected: dict[str, Tensor], *, rtol: float, atol: float
) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(
            found[name], value, rtol=rtol, atol=atol, msg=lambda text, name=name: f"{name}: {text}"
        )


@contextlib.contextmanager
def float64_throughout() -> Iterator[None]:
    """Norms and routers that go to float32 whatever the model's dtype go to float64 instead."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "float32", torch.float64)
        patch.setattr(torch, "float", torch.float64)
        patch.setattr(Tensor, "float", Tensor.double)
        yield
