"""Completions by transformers' continuous batching: requests join and leave a running batch over a paged cache."""

import dataclasses
import difflib
from collections.abc import Sequence
from typing import Any

import torch
from transformers import ContinuousBatchingConfig, GenerationConfig

from gmpo.rollout.engine import Completion, Request, Sampling
from gmpo.rollout.generation_mode import Autocast, generating
from gmpo.sharding import sharded
from gmpo.unwrap import without_adapter

SAMPLING = ("max_new_tokens", "temperature", "eos_token_id")  # what generation_kwargs may hold here
OWN = ("return_logprobs", "seed")  # options of ContinuousBatchingConfig that this engine sets
CPU_BATCH_TOKENS = 1024  # of one step, where the options don't say


class ContinuousEngine:
    """Makes completions with transformers' `ContinuousBatchingManager`.

    It reports the log-prob of each token, but not what top_k and the like left to draw from, so these are refused.
    Random numbers are drawn for the whole batch: they depend on which requests meet in it.

    Args:
        policy: Gives the trainer's model as it is now, without wrappers but PEFT's.
        eos: Tokens that end a completion.
        pad: Token that fills what is not written.
        options: Keywords of `ContinuousBatchingConfig`.
        autocast: Makes the context of mixed precision.
        gather: Make sharded parameters whole while generating.

    Raises:
        ValueError: For an unknown keyword, or one that this engine sets itself.
    """

    def __init__(
        self,
        policy: Any,
        *,
        eos: Sequence[int],
        pad: int,
        options: dict[str, Any] | None = None,
        autocast: Autocast | None = None,
        gather: bool = True,
    ) -> None:
        self.policy, self.eos, self.pad = policy, tuple(eos), pad
        self.options = checked_options(options or {})
        self.autocast, self.gather = autocast, gather

    def publish(self, version: int) -> None:
        """Nothing to do: the module is the trainer's own."""

    def close(self) -> None:
        """Nothing to do."""

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[list[Completion]]:
        """Every rank must call where the policy is sharded, be it with nothing to do."""
        config = generation_config(sampling, self.eos, self.pad)
        policy = self.policy()
        if not self.gather and sharded(policy):
            raise ValueError(
                "use_transformers_continuous_batching runs in a thread of its own, which can't keep step with other "
                "ranks. Leave ds3_gather_for_generation at True, or turn continuous batching off."
            )
        prompts = [request.prompt.ids for request in requests for _ in range(request.count)]
        seed = hash(tuple((request.seed, request.first) for request in requests)) % 2**31
        model = without_adapter(policy)
        with (
            torch.random.fork_rng(),
            generating(policy, autocast=self.autocast, gather=self.gather),
        ):
            if not requests:
                return []
            torch.manual_seed(seed)
            options = sized(self.options, prompts, config.max_new_tokens or 1, model.device)
            batching = ContinuousBatchingConfig(**options, return_logprobs=True, seed=seed)
            outputs = iter(run_to_end(model, prompts, config, batching))
        return [
            [self._completion(next(outputs), config) for _ in range(request.count)]
            for request in requests
        ]

    def _completion(self, output: Any, config: GenerationConfig) -> Completion:
        ids = list(output.generated_tokens)
        ended = bool(ids) and ids[-1] in config.eos_token_id  # pyright: ignore[reportOperatorIssue]
        return Completion(
            ids=ids, finish_reason="stop" if ended else "length", logps=list(output.logprobs)
        )


def run_to_end(
    model: Any,
    prompts: list[list[int]],
    config: GenerationConfig,
    batching: ContinuousBatchingConfig,
) -> list[Any]:
    """What became of each prompt, in order.

    All prompts are there before the first step, so that the same call makes the same batches.

    Raises:
        RuntimeError: If the manager's thread stops before all are answered, or a request fails.
    """
    manager = model.init_continuous_batching(
        generation_config=config, continuous_batching_config=batching
    )
    names = manager.add_requests(prompts, max_new_tokens=config.max_new_tokens)
    manager.start()
    results: dict[str, Any] = {}
    try:
        while len(results) < len(names):
            output = manager.get_result(timeout=1)
            if output is None and not manager.is_running():
                raise RuntimeError(
                    f"Continuous batching stopped with {len(results)} of {len(names)} completions."
                )
            if output is not None and output.is_finished():
                if output.error is not None:
                    raise RuntimeError(f"Continuous batching failed: {output.error}")
                results[output.request_id] = output
    finally:
        manager.stop(block=True, timeout=5)
        manager.destroy()
    return [results[name] for name in names]


def sized(
    options: dict[str, Any],
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    device: torch.device,
) -> dict[str, Any]:
    """`options` with the size of the cache, where they leave it open: half of a GPU's memory, or what is needed.

    Left to itself, transformers would take most of the memory of a machine without a GPU.
    """
    if "num_blocks" in options or "max_memory_percent" in options:
        return options
    if device.type != "cpu":
        return {"max_memory_percent": 0.5, **options}
    page = options.get("page_size", ContinuousBatchingConfig().page_size)
    blocks = sum(-(-(len(prompt) + max_new_tokens) // page) + 1 for prompt in prompts)
    return {"max_batch_tokens": CPU_BATCH_TOKENS, **options, "num_blocks": blocks}


def generation_config(sampling: Sampling, eos: Sequence[int], pad: int) -> GenerationConfig:
    """The sampling options that continuous batching shares with the trainer's own log-probs.

    Raises:
        ValueError: For an option that cuts or bends the distribution, or that this engine does not know.
    """
    plain = {"top_p": 1.0, "top_k": 0, "min_p": None, "repetition_penalty": 1.0}
    changed = {
        name: getattr(sampling, name)
        for name, value in plain.items()
        if getattr(sampling, name) != value
    }
    changed |= {name: value for name, value in sampling.extra.items() if name not in SAMPLING}
    for name, value in changed.items():
        raise ValueError(
            f"{name}={value!r} does not go with use_transformers_continuous_batching, which does not report what it "
            "left to sample from, so that ratios would be off. Leave it out, or turn continuous batching off."
        )
    more = sampling.extra.get("eos_token_id") or []
    temperature = sampling.extra.get("temperature", sampling.temperature)
    return GenerationConfig(
        max_new_tokens=sampling.extra.get("max_new_tokens", sampling.max_new_tokens),
        do_sample=temperature > 0,
        temperature=temperature or 1.0,
        top_k=0,
        eos_token_id=[*eos, *(more if isinstance(more, list | tuple) else [more])],
        pad_token_id=pad,
    )


def checked_options(options: dict[str, Any]) -> dict[str, Any]:
    """`options`, if `ContinuousBatchingConfig` has them and this engine leaves them open."""
    known = {field.name for field in dataclasses.fields(ContinuousBatchingConfig)} - {*OWN}
    for name in options:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f" Did you mean {close[0]!r}?" if close else ""
            raise ValueError(
                f"transformers_continuous_batching_config has {name!r}, which can't be set.{hint}"
            )
    return dict(options)
