"""A model that vLLM's kernels take and that starts in seconds, and what its log-probs must be."""

from collections import Counter
from dataclasses import replace

import torch
from peft import LoraConfig, get_peft_model

from tests.tiny import tiny_model

CPU = {"enforce_eager": True, "kv_cache_memory_bytes": 2**26}  # engine options for tests
SEQUENCES = [[5, 6, 7, 8, 9, 10, 11], [15, 3, 15, 4, 15, 5, 14, 6, 13], list(range(2, 16)) * 3]
KINDS = ("whole", "merged adapter", "adapter")


def small_model(*, dtype=torch.float32, tied=True, seed=0, **options):
    sizes = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
    }
    return tiny_model(dtype=dtype, tie_word_embeddings=tied, seed=seed, **sizes, **options)


def small_policy(kind="whole", **options):
    model = small_model(**options)
    if kind == "whole":
        return model
    torch.manual_seed(1)
    return get_peft_model(model, LoraConfig(r=8, target_modules="all-linear"))


def train(policy, *, steps, lr=5e-3, seed=0):
    """Optimizer steps on random tokens, large enough to move every log-prob."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW([p for p in policy.parameters() if p.requires_grad], lr=lr)
    for _ in range(steps):
        ids = torch.randint(2, 16, (4, 12), generator=generator)
        policy(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


@torch.no_grad()
def trainer_logps(policy, ids, temperature=1.0):
    """Log-probs of ids[1:] as plain transformers computes them."""
    logits = policy(input_ids=torch.tensor([ids])).logits[0, :-1].float() / temperature
    return logits.log_softmax(-1).gather(-1, torch.tensor(ids[1:])[:, None])[:, 0]


def distances(score, policy, sequences=None):
    """|engine - trainer| of every token of the fixed sequences."""
    sequences = SEQUENCES if sequences is None else sequences
    return torch.cat(
        [(torch.tensor(score(ids)) - trainer_logps(policy, ids)).abs() for ids in sequences]
    )


def base_weights(policy):
    return {
        name: p.detach().clone() for name, p in policy.named_parameters() if not p.requires_grad
    }


class Conversations:
    """Work of several turns: each sample is answered by a few tokens and goes on, `turns` times."""

    def __init__(self, requests, *, turns=3, budget=6):
        self.waiting = list(requests)
        self.turns = turns
        self.budget = budget
        self.turn = Counter()  # by sample
        self.open = 0
        self.given = []  # (request, number, completion), in the order of finishing

    def take(self, room, *, wait):
        if not self.waiting and not self.open:
            return None
        taken, self.waiting = self.waiting[:room], self.waiting[room:]
        self.open += sum(request.count for request in taken)
        return taken

    def give(self, request, number, completion):
        self.open -= 1
        self.given.append((request, number, completion))
        first = request.first + number
        sample = (id(request.prompt), first)
        self.turn[sample] += 1
        if self.turn[sample] < self.turns:
            so_far = [*request.so_far, *completion.ids, 3, 9]
            budget = self.budget + self.turn[sample]  # another one each turn
            self.waiting.append(
                replace(request, count=1, first=first, so_far=so_far, max_new_tokens=budget)
            )


def check_conversations(policy, work, samples, turns=3):
    """Compare all log-probs with a plain pass over each whole conversation."""
    assert len(work.given) == samples * turns
    for request, _, completion in work.given:
        before = [*request.prompt.ids, *request.so_far]
        expected = trainer_logps(policy, [*before, *completion.ids])[len(before) - 1 :]
        assert (torch.tensor(completion.logps) - expected).abs().max() < 1e-4
        budget = request.max_new_tokens or work.budget
        assert len(completion.ids) == budget or completion.ids[-1] == 1
