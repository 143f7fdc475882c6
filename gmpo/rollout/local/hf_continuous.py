"""Completions by transformers' continuous batching: requests join and leave a running batch."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from transformers import ContinuousBatchingConfig, GenerationConfig, PreTrainedModel
from transformers.generation.continuous_batching import PagedAttentionCache
from transformers.generation.continuous_batching.requests import GenerationOutput

from gmpo.rollout.engine import Completion, Request, Sampling, Work, serve_in_rounds
from gmpo.rollout.generation_mode import Autocast, generating
from gmpo.rollout.local.generation_options import ending_tokens
from gmpo.rollout.local.memory import bytes_per_token, cache_bytes
from gmpo.sharding import sharded
from gmpo.unwrap import uses_prompt_learning, without_adapter

ROUND = 256  # requests that are written together, at most, where they come as they are ready
CPU_BATCH_TOKENS = 1024  # of one step, where the options don't say


class ContinuousEngine:
    """Makes completions with transformers' `ContinuousBatchingManager`.

    It reports the log-prob of each token, but not what top_k and the like left to draw from, so
    these are refused.  Random numbers are drawn for the whole batch: they depend on which requests
    meet in it.

    Args:
        policy: Gives the trainer's model as it is now, without wrappers but PEFT's.
        eos: Tokens that end a completion.
        pad: Token that fills what is not written.
        options: Keywords of `ContinuousBatchingConfig`, as `check.check_continuous` allows them.
        autocast: Makes the context of mixed precision.
        gather: Make sharded parameters whole while generating.
    """

    name = "transformers' continuous batching"
    overlaps = False  # it is the trainer's own module that writes

    def __init__(
        self,
        policy: Callable[[], PreTrainedModel],
        *,
        eos: Sequence[int],
        pad: int,
        options: dict[str, Any] | None = None,
        autocast: Autocast | None = None,
        gather: bool = True,
    ) -> None:
        self.policy, self.eos, self.pad = policy, tuple(eos), pad
        self.options = dict(options or {})
        self.autocast, self.gather = autocast, gather

    def unsupported_reason(self, sampling: Sampling) -> str | None:
        """Return why the model or the options can't be served; None if they can, as far as seen."""
        policy = self.policy()
        if uses_prompt_learning(policy):
            return "the adapter learns virtual prompt tokens, which the base model would not see"
        if not self.gather and sharded(policy):
            return (
                "it runs in another thread, which can't keep step with other ranks, and "
                "ds3_gather_for_generation is False"
            )
        return None

    def publish(self, version: int) -> None:
        """Do nothing: the module is the trainer's own."""

    def close(self) -> None:
        """Do nothing."""

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[list[Completion]]:
        """Write completions.

        Every rank must call where the policy is sharded, even with nothing to do.
        """
        if any(request.stop for request in requests):
            raise ValueError(
                "use_transformers_continuous_batching can't end completions at a text, as tools "
                "need it. Turn continuous batching off."
            )
        policy = self.policy()
        config = generation_config(sampling, self.eos, self.pad)
        samples = [request for request in requests for _ in range(request.count)]
        prompts = [request.context for request in samples]
        budgets = [request.max_new_tokens or config.max_new_tokens or 1 for request in samples]
        starts = [(each.seed, each.first + len(each.so_far)) for each in requests]
        seed = hash(tuple(starts)) % 2**31
        model = without_adapter(policy)

        with (
            torch.random.fork_rng(),
            generating(policy, autocast=self.autocast, gather=self.gather),
            autocast_inside(model, self.autocast),
        ):
            if not requests:
                return []
            torch.manual_seed(seed)
            options = self._sized(model, prompts, max(budgets))
            batching = ContinuousBatchingConfig(**options, return_logprobs=True, seed=seed)
            outputs = run_to_end(model, prompts, budgets, config, batching)

        completions = iter([self._completion(output, config) for output in outputs])
        return [list(islice(completions, request.count)) for request in requests]

    def serve(self, work: Work, sampling: Sampling) -> None:
        """Serve until there is no more work, in rounds: what is ready is written together."""
        serve_in_rounds(self, work, sampling, room=ROUND)

    def _sized(
        self, model: PreTrainedModel, prompts: Sequence[Sequence[int]], max_new_tokens: int
    ) -> dict[str, Any]:
        """Return the options with the size of the cache, where they leave it open.

        Left to itself, transformers would take most of the memory of a machine without a GPU.
        """
        if "num_blocks" in self.options or "max_memory_percent" in self.options:
            return self.options
        if model.device.type != "cpu":
            return {"max_memory_percent": 0.5, **self.options}

        room = cache_bytes(model.device) // bytes_per_token(model)
        lengths = [len(prompt) + max_new_tokens for prompt in prompts]
        page = self.options.get("page_size", ContinuousBatchingConfig().page_size)
        blocks = num_blocks(lengths, page_size=page, room=room)
        return {"max_batch_tokens": CPU_BATCH_TOKENS, **self.options, "num_blocks": blocks}

    def _completion(self, output: GenerationOutput, config: GenerationConfig) -> Completion:
        ids = list(output.generated_tokens)
        ends: Any = config.eos_token_id  # a list, by `generation_config`
        ended = bool(ids) and ids[-1] in ends
        return Completion(
            ids=ids, finish_reason="stop" if ended else "length", logps=list(output.logprobs)
        )


@contextmanager
def autocast_inside(model: PreTrainedModel, autocast: Autocast | None) -> Iterator[None]:
    """Run forward passes of `model` in mixed precision within the block, in every thread.

    The manager computes in its own thread, which contexts of this one don't reach.
    """
    if autocast is None:
        yield
        return

    entered: list[Any] = []

    def enter(module: torch.nn.Module, args: object) -> None:
        entered.append(autocast())
        entered[-1].__enter__()

    def leave(module: torch.nn.Module, args: object, output: object) -> None:
        entered.pop().__exit__(None, None, None)

    hooks = [
        model.register_forward_pre_hook(enter),
        model.register_forward_hook(leave, always_call=True),
    ]
    # A patched method: the cache has the weights' precision and takes no other, while autocast
    # makes keys of one and values of the other.
    paged: Any = PagedAttentionCache
    update = paged.update
    paged.update = cast_update(update)
    try:
        yield
    finally:
        paged.update = update
        for hook in hooks:
            hook.remove()


def cast_update(update: Callable[..., tuple[Tensor, Tensor]]) -> Callable[..., Any]:
    """Return a cache's `update` that takes keys and values of any precision."""

    def cast(
        cache: PagedAttentionCache,
        key_states: Tensor,
        value_states: Tensor,
        *where: Any,
        **named: Any,
    ) -> tuple[Tensor, Tensor]:
        keys, values = key_states.to(cache.dtype), value_states.to(cache.dtype)
        return update(
            cache, keys, values, *where, **named
        )  # newer versions give places by position

    return cast


def run_to_end(
    model: Any,
    prompts: Sequence[list[int]],
    budgets: Sequence[int],
    config: GenerationConfig,
    batching: ContinuousBatchingConfig,
) -> list[Any]:
    """Return transformers' output for each prompt, in order.

    All prompts are there before the first step, so that the same call makes the same batches.

    Raises:
        RuntimeError: If the manager's thread stops before all are answered, or a request fails.
    """
    manager = model.init_continuous_batching(
        generation_config=config, continuous_batching_config=batching
    )
    names = added_requests(manager, prompts, budgets, config)
    manager.start()

    results: dict[str, Any] = {}
    try:
        while len(results) < len(names):
            output = manager.get_result(timeout=1)
            if output is None and not manager.is_running():
                status = getattr(manager, "background_thread_status", None)
                cause = getattr(status, "fatal_error", None)
                raise RuntimeError(
                    f"Continuous batching stopped with {len(results)} of {len(names)} completions: "
                    f"{cause or 'see the log of transformers for the reason'}."
                ) from cause
            if output is not None and output.is_finished():
                if output.error is not None:
                    raise RuntimeError(f"Continuous batching failed: {output.error}")
                results[output.request_id] = output
    finally:
        manager.stop(block=True, timeout=5)
        manager.destroy()
    return [results[name] for name in names]


def added_requests(
    manager: Any,
    prompts: Sequence[list[int]],
    budgets: Sequence[int],
    config: GenerationConfig,
) -> list[str]:
    """Add the requests, and return their names in order."""
    if len(set(budgets)) == 1:  # in the order in which prompts share their beginnings
        return manager.add_requests(list(prompts), max_new_tokens=budgets[0])
    return [
        manager.add_request(ids, max_new_tokens=budget, eos_token_id=config.eos_token_id)
        for ids, budget in zip(prompts, budgets, strict=True)
    ]


def num_blocks(lengths: Sequence[int], *, page_size: int, room: int) -> int:
    """Return the blocks of a cache for all sequences at once, or as many as there is room for.

    One sequence always fits; the others wait for its blocks.

    Args:
        lengths: Tokens of each sequence, prompt and completion.
        room: Tokens that the memory holds.

    Example:
        lengths [9, 5] in pages of 4: 3 + 1 and 2 + 1 blocks -> 7; with room for 20 tokens -> 5.
    """
    needed = [-(-length // page_size) + 1 for length in lengths]
    return max(max(needed), min(sum(needed), room // page_size))


def generation_config(sampling: Sampling, eos: Sequence[int], pad: int) -> GenerationConfig:
    """Return the sampling options that continuous batching shares with the trainer's log-probs."""
    temperature = sampling.extra.get("temperature", sampling.temperature)
    return GenerationConfig(
        max_new_tokens=sampling.extra.get("max_new_tokens", sampling.max_new_tokens),
        do_sample=temperature > 0,
        temperature=temperature or 1.0,
        top_k=0,
        eos_token_id=ending_tokens(eos, sampling.extra.get("eos_token_id")),
        pad_token_id=pad,
    )
