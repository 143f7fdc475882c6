"""Generation alone: gmpo's shared-prefix engine and transformers' `generate`, in turn in one process.

    python -m benchmarks.rollout [--model FOLDER] [--rounds 5]

Both sides sample from the same distribution (temperature 1, no truncation), each with its own random numbers, so the
lengths of their completions differ a little: the table gives tokens beside seconds.  `generate` gets what trainers
give it: every prompt once per completion, padded on the left.
"""

import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from benchmarks import compare
from benchmarks.step import prompts_of
from gmpo.policy.head.onednn import use_onednn
from gmpo.rollout.engine import Request, Sampling
from gmpo.rollout.local.hf_generate import left_padded
from gmpo.rollout.local.shared_prefix import SharedPrefixEngine
from gmpo.rollout.prompts.model_facts import ending_tokens, padding_token
from gmpo.types import Prompt

CASES = ((2, 50, 8), (8, 200, 8))  # prompts, about how many tokens of each, completions of each
SIDES = ("gmpo", "generate")


@dataclass
class Case:
    prompts: int
    prompt_tokens: int
    completions: int
    seconds: dict[str, list[float]] = field(default_factory=lambda: {side: [] for side in SIDES})
    tokens: dict[str, list[int]] = field(default_factory=lambda: {side: [] for side in SIDES})

    def median(self, side: str) -> float:
        return statistics.median(self.seconds[side])


def main() -> None:
    options = compare.model_options(__doc__)
    options.add_argument("--completion-tokens", type=int, default=48)
    args = options.parse_args()
    folder = compare.model_folder(args)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if args.bf16 else torch.float32
    models = {
        side: AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(device).eval()
        for side in SIDES
    }
    use_onednn(models["gmpo"])  # as gmpo does with a policy
    tokenizer = AutoTokenizer.from_pretrained(folder)
    cases = [Case(*sizes) for sizes in CASES]
    for case in cases:
        prompts = tokenized(tokenizer, folder, case)
        sides = {
            "gmpo": ours(
                models["gmpo"], tokenizer, prompts, case.completions, args.completion_tokens
            ),
            "generate": theirs(
                models["generate"], tokenizer, prompts, case.completions, args.completion_tokens
            ),
        }
        for round in range(-args.warmup, args.rounds):
            for side, work in sides.items():
                seconds, tokens = compare.undisturbed(lambda work=work: timed(work), os.getpid())
                if round >= 0:
                    case.seconds[side].append(seconds)
                    case.tokens[side].append(tokens)
    title = f"Generation of at most {args.completion_tokens} tokens per completion, {str(dtype).removeprefix('torch.')}."
    compare.report("rollout", title, compare.table(cases, COLUMNS), args)


def tokenized(tokenizer: Any, folder: str, case: Case) -> list[list[int]]:
    messages = prompts_of(folder, case.prompt_tokens, count=case.prompts)
    return [
        tokenizer.apply_chat_template(m, add_generation_prompt=True)["input_ids"] for m in messages
    ]


def ours(
    model: Any, tokenizer: Any, prompts: list[list[int]], count: int, budget: int
) -> Callable[[], int]:
    engine = SharedPrefixEngine(
        lambda: model, tokenizer, eos=ending_tokens(tokenizer, model.generation_config)
    )
    seeds = iter(range(10**9))

    def work() -> int:
        requests = [Request(Prompt(ids, ""), count, next(seeds)) for ids in prompts]
        groups = engine.generate(requests, Sampling(budget))
        return sum(len(completion.ids) for group in groups for completion in group)

    return work


def theirs(
    model: Any, tokenizer: Any, prompts: list[list[int]], count: int, budget: int
) -> Callable[[], int]:
    eos, pad = ending_tokens(tokenizer, model.generation_config), padding_token(tokenizer)
    config = GenerationConfig(
        max_new_tokens=budget,
        do_sample=True,
        temperature=1.0,
        top_k=0,
        eos_token_id=list(eos),
        pad_token_id=pad,
    )
    ids, mask = left_padded([ids for ids in prompts for _ in range(count)], pad, model.device)

    def work() -> int:
        with torch.no_grad():
            output = model.generate(input_ids=ids, attention_mask=mask, generation_config=config)
        completions = output[:, ids.shape[1] :]
        ended = torch.isin(completions, torch.tensor(eos, device=model.device)).int().cumsum(1)
        return int(
            (ended == 0).sum() + (ended.sum(1) > 0).sum()
        )  # tokens before the first eos, and that one

    return work


def timed(work: Callable[[], int]) -> tuple[float, int]:
    start = time.perf_counter()
    tokens = work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start, tokens


def shown(case: Case, side: str) -> str:
    return compare.spread(case.seconds[side])


def speed(case: Case, side: str) -> str:
    return f"{sum(case.tokens[side]) / sum(case.seconds[side]):.0f}"


COLUMNS = {
    "prompts": lambda case: f"{case.prompts} of about {case.prompt_tokens} tokens",
    "completions of each": lambda case: str(case.completions),
    "gmpo, s": lambda case: shown(case, "gmpo"),
    "generate, s": lambda case: shown(case, "generate"),
    "generate / gmpo": lambda case: f"{case.median('generate') / case.median('gmpo'):.2f}",
    "gmpo, tokens/s": lambda case: speed(case, "gmpo"),
    "generate, tokens/s": lambda case: speed(case, "generate"),
}

if __name__ == "__main__":
    main()
