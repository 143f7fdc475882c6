"""The whole of GMPO on one page: no trainer, no options, gmpo's own functions.

    python -m examples.minimal_loop

A model of two layers starts from random weights and learns to repeat a letter: the prompt is one of
eight letters, and a completion's reward is the share of its tokens that are that letter.  It takes
some ten seconds on a CPU.

What a real run needs and this page leaves out, with the place where gmpo has it:

    a pretrained model, chat templates                   gmpo/policy/load.py, gmpo/rollout/prompts/
    each prompt read once for its group                  gmpo/rollout/local/, gmpo/policy/layout/
    the correction for a sampler that rounds otherwise   gmpo/objective/correction.py
    KL to a reference, entropy bonus, other objectives   gmpo/objective/
    micro-batches, several ranks, checkpoints            gmpo/trainer.py
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from gmpo.objective.gmpo import gmpo
from gmpo.objective.types import SurrogateInputs
from gmpo.reward.advantages import group_advantages
from gmpo.reward.settings import RewardSettings

PAD, EOS, FIRST_LETTER, NUM_LETTERS = 0, 1, 2, 8
PROMPTS, GROUP, LENGTH = 8, 8, 6  # prompts of a collection, completions of each, tokens of each
UPDATES = 4  # optimizer steps on one collection: from the second on, the clip window can act
EPSILON = 0.4  # the paper's window of the log-ratio, in nats


@dataclass
class Collection:
    """Completions, and everything that the updates on them need."""

    tokens: Tensor  # [B, 1 + LENGTH] prompt and completion
    mask: Tensor  # [B, LENGTH] bool, tokens that the policy wrote
    advantages: Tensor  # [B, 1]
    old_logps: Tensor  # [B, LENGTH] of the policy that wrote them
    mean_reward: float


def new_model() -> LlamaForCausalLM:
    """Return a model of two layers with random weights."""
    config = LlamaConfig(
        vocab_size=FIRST_LETTER + NUM_LETTERS,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=16,
        pad_token_id=PAD,
        eos_token_id=EOS,
    )
    return LlamaForCausalLM(config)


def completion_logps(model: LlamaForCausalLM, tokens: Tensor) -> Tensor:
    """Return the log-prob of each completion token, [B, LENGTH], in nats."""
    # The state at token t predicts token t + 1.
    logits = model(input_ids=tokens, use_cache=False).logits[:, :-1]
    logps = logits.float().log_softmax(-1).gather(-1, tokens[:, 1:, None])
    return logps.squeeze(-1)


@torch.no_grad()
def collect(model: LlamaForCausalLM) -> Collection:
    """Sample a group for each prompt, score it, and take its advantages."""
    model.eval()
    prompts = torch.randint(FIRST_LETTER, FIRST_LETTER + NUM_LETTERS, (PROMPTS, 1))
    tokens = model.generate(
        prompts,
        attention_mask=torch.ones_like(prompts),
        do_sample=True,
        num_return_sequences=GROUP,
        max_new_tokens=LENGTH,
    )
    tokens = torch.nn.functional.pad(tokens, (0, 1 + LENGTH - tokens.shape[1]), value=PAD)
    prompt, completion = tokens[:, :1], tokens[:, 1:]
    mask = completion != PAD

    right = (completion == prompt) & mask
    rewards = right.sum(1) / mask.sum(1)  # [B]

    # One column, because there is one reward function; rows of a group are contiguous.
    result = group_advantages(rewards[:, None], GROUP, RewardSettings(scale_rewards="group"))
    return Collection(
        tokens=tokens,
        mask=mask,
        advantages=result.advantages[:, None],
        old_logps=completion_logps(model, tokens),
        mean_reward=float(rewards.mean()),
    )


def loss_of(model: LlamaForCausalLM, batch: Collection) -> tuple[Tensor, float]:
    """Return GMPO's loss, and the share of tokens that the window caps."""
    logps = completion_logps(model, batch.tokens)
    inputs = SurrogateInputs(
        logps=logps,
        log_ratio=torch.where(batch.mask, logps - batch.old_logps, 0),
        advantages=batch.advantages,
        mask=batch.mask,
        select=batch.mask,
        correction=torch.ones(1, 1),  # the sampler and the learner are one model here
    )
    surrogate = gmpo(inputs, epsilon=EPSILON, epsilon_high=EPSILON)

    capped = (surrogate.capped_low | surrogate.capped_high)[batch.mask].float().mean()
    return surrogate.loss.mean(), float(capped)  # every completion weighs the same


def main(collections: int = 60, seed: int = 0) -> list[float]:
    """Train, and return the mean reward of each collection."""
    torch.manual_seed(seed)
    model = new_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.0)
    rewards = []

    for number in range(collections):
        batch = collect(model)
        rewards.append(batch.mean_reward)

        model.train()
        for _ in range(UPDATES):
            loss, capped = loss_of(model, batch)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()

        if number % 5 == 0 or number == collections - 1:
            print(f"collection {number:3}  reward {rewards[-1]:.2f}  capped {capped:.1%}")
    return rewards


if __name__ == "__main__":
    main()
